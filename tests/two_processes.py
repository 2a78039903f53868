"""Trains every trainer in two processes over gloo, as nnU-Net does on two GPUs over NCCL; run by test_several_gpus.py.

nnU-Net's own launcher takes CUDA for granted. Here its trainer is told that the device is the CPU, nothing else.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock
from tiny_trainers import draw_nothing, every_trainer, make_trainer, seed
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl.blocks.networks import unwrap
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning


class TwoPhases(nnUNetTrainerCoLearning):
    """Its training has a folder of its own."""


SAMPLE_WISE = {"nnUNetTrainerMeanTeacher", "nnUNetTrainerCPS"}  # with no noise, the loss is a mean over the samples
STEPS = 3
CHECKPOINTS = []  # that this rank has written


def record_checkpoints():
    original = torch.save

    def save(content, target):
        if "checkpoint" in str(target):
            CHECKPOINTS.append(target)
        original(content, target)

    torch.save = save


def rank_main(rank, world_size, dataset, output):
    torch.set_num_threads(1)
    draw_nothing()
    dist.init_process_group("gloo", init_method=f"file://{output}/rendezvous", rank=rank, world_size=world_size)
    record_checkpoints()
    stock.DDP = lambda network, device_ids: DistributedDataParallel(network)
    train_all(dataset, output, rank)
    dist.destroy_process_group()


def train_all(dataset, output, rank):
    for trainer_class in every_trainer():
        if trainer_class.__name__ in SAMPLE_WISE:
            for configuration in ("2d", "3d_fullres"):
                file = output / f"joint_{trainer_class.__name__}_{configuration}_{rank}.pt"
                joint_batch(trainer_class, configuration, dataset, file, rank, world_size=dist.get_world_size())
        whole_training(trainer_class, dataset, output / f"whole_{trainer_class.__name__}_{rank}.pt", rank)
    two_phases(dataset, output, rank)


def on_cpu(trainer_class, dataset, configuration="3d_fullres", **settings):
    trainer = make_trainer(trainer_class, dataset, configuration, **settings)
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    return trainer


def whole_training(trainer_class, dataset, file, rank):
    """The stock loop; a rank has its own crops, masks and, but for nnU-Net's broadcast, its own random weights."""
    seed(rank)
    trainer = on_cpu(trainer_class, dataset, num_epochs=1, num_iterations_per_epoch=STEPS)
    trainer.initialize()  # before the start, as nnU-Net does for -pretrained_weights: companions are made anew
    save(trainer, file.with_name("begun_" + file.name))
    trainer.run_training()
    assert trainer.batch_size == 1  # of 2
    assert trainer.step == STEPS
    save(trainer, file)
    assert bool(CHECKPOINTS) == (rank == 0)

    seed(rank)
    resumed = on_cpu(trainer_class, dataset, num_epochs=1, num_iterations_per_epoch=STEPS)
    resumed.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    resumed.on_train_start()
    torch.save(torch.rand(4), file.with_name("random_" + file.name))
    resumed.train_step(next(resumed.dataloader_train))
    save(resumed, file.with_name("resumed_" + file.name))


def two_phases(dataset, output, rank):
    """A supervised epoch, whose networks are kept, and one of a method that trains two networks."""
    seed(rank)
    trainer = on_cpu(TwoPhases, dataset, num_epochs=2, supervised_part=0.5)
    begin = trainer.on_train_epoch_start

    def on_train_epoch_start():
        begin()
        save(trainer, output / f"phase_{trainer.current_epoch}_{rank}.pt")

    trainer.on_train_epoch_start = on_train_epoch_start
    trainer.run_training()
    assert trainer.step == 2
    save(trainer, output / f"phase_2_{rank}.pt")


def joint_batch(trainer_class, configuration, dataset, file, rank, world_size):
    """Three steps, in which a rank sees its part of a batch that one process would see whole."""
    seed()
    settings = {"enable_deep_supervision": False, **({"noise": 0.0} if hasattr(trainer_class, "noise") else {})}
    trainer = on_cpu(trainer_class, dataset, configuration, **settings)
    trainer.on_train_start()
    trainer.network.train()
    trainer.step = trainer.max_steps  # no ramp-up
    for batch in joint_batches(len(trainer.configuration_manager.patch_size)):
        trainer.train_step({name: tensor[rank::world_size] for name, tensor in batch.items()})
    save(trainer, file)


def joint_batches(dimensions):
    generator = torch.Generator().manual_seed(7)
    shape = (2, 1, *[16] * dimensions)
    for _ in range(STEPS):
        images = torch.randn((3, *shape), generator=generator)
        target = (torch.rand(shape, generator=generator) > 0.6).to(torch.int16)
        yield {"data": images[0], "target": target, "unlabeled": images[1], "unlabeled_weak": images[2]}


def save(trainer, file):
    networks = {"student": trainer.network, **vars(trainer.companions)}
    torch.save({name: unwrap(network).state_dict() for name, network in networks.items()}, file)


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:3]]
    mp.start_processes(rank_main, args=(2, *folders), nprocs=2, start_method="fork")  # nothing is imported again
