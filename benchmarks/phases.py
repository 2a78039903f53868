"""One phase of a benchmark's path in this process: stock nnU-Net's training loop with a fixed number of steps."""

import ast
import json
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.paths import nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from tasks import SELF_TRAINING, STEPS_PER_EPOCH, TASKS

from nnunet_ssl.system.files import replacing

SECONDS_FILE = "seconds.json"  # processor time, in a run's folder


def phase(args) -> None:
    """A phase in this process: stock nnU-Net's training loop with a fixed number of steps."""
    task = TASKS[args.task]
    fold = 0 if args.method == SELF_TRAINING else task.fold
    seed_all(args.seed, 0)
    device = torch.device(args.device)
    trainer = get_trainer_from_args(args.dataset, f"{task.base}_quick", fold, args.trainer, device=device)
    trainer.num_iterations_per_epoch, trainer.num_epochs = STEPS_PER_EPOCH, task.steps // STEPS_PER_EPOCH
    trainer.num_val_iterations_per_epoch = 5  # monitoring only
    trainer.save_every = 1
    if args.start:
        trainer.supervised_part = 0.0  # of ours: the first phase was it
    for setting in args.settings:
        name, value = setting.split("=", 1)
        if not hasattr(trainer, name):
            raise SystemExit(f"{args.trainer} has no setting {name}.")
        setattr(trainer, name, literal(value))
    if args.device == "cpu":
        use_channels_last(trainer)
    if args.bf16:
        use_bf16(trainer)
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    if latest.is_file():
        trainer.load_checkpoint(str(latest))
        if not hasattr(trainer, "companions"):  # ours go on with the random state of the checkpoint
            seed_all(args.seed, 2 + trainer.current_epoch)
    elif args.start:
        trainer.initialize()
        weights = torch.load(args.start, map_location=device, weights_only=False)["network_weights"]
        trainer.network.load_state_dict(weights)
        seed_all(args.seed, 1)  # other batches than those of the first phase
    if not hasattr(trainer, "companions"):
        write_checkpoints_at_once(trainer)
    count_seconds(trainer, Path(nnUNet_results) / SECONDS_FILE)
    trainer.run_training()


def seed_all(seed: int, stream: int) -> None:
    """Seeds what draws weights and batches; every stream of a seed has other numbers."""
    number = seed + 1000 * stream
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(number)


def write_checkpoints_at_once(trainer) -> None:
    """A stock checkpoint appears when it is complete, as ours do: a half-written one would count as finished."""
    save = trainer.save_checkpoint

    def save_checkpoint(filename):
        with replacing(Path(filename)) as temporary:
            save(str(temporary))

    trainer.save_checkpoint = save_checkpoint


def count_seconds(trainer, file: Path) -> None:
    """After every epoch, adds its seconds of processor time to the file; other processes do not disturb them."""
    end, begin = trainer.on_epoch_end, time.process_time()

    def on_epoch_end():
        nonlocal begin
        epoch = trainer.current_epoch
        end()
        add_seconds(file, {str(epoch): time.process_time() - begin})
        begin = time.process_time()

    trainer.on_epoch_end = on_epoch_end


def use_channels_last(trainer) -> None:
    """Networks in the format whose convolutions are a quarter faster on a CPU, with instance norms that keep to it.

    Those of torch copy into the other format and back, which makes a step slower in 2D, and a tenth slower in 3D.
    Results differ by rounding.
    """
    initialize = trainer.initialize

    def initialize_channels_last():
        initialize()
        in_3d = len(trainer.configuration_manager.patch_size) == 3
        for network in (trainer.network, *vars(getattr(trainer, "companions", SimpleNamespace())).values()):
            network.to(memory_format=torch.channels_last_3d if in_3d else torch.channels_last)
            for norm in network.modules():
                if isinstance(norm, torch.nn.InstanceNorm2d | torch.nn.InstanceNorm3d):
                    norm.forward = partial(sample_by_sample, norm)

    trainer.initialize = initialize_channels_last


def sample_by_sample(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Instance normalisation of a batch: the batch normalisation of every sample by itself."""
    values = norm.weight, norm.bias, True, 0.0, norm.eps
    return torch.cat([F.batch_norm(sample, None, None, *values) for sample in x.split(1)])


def use_bf16(trainer) -> None:
    """Trains in bfloat16 autocast on a CPU, as nnU-Net trains in float16 on CUDA; losses in float32."""
    initialize, step = trainer.initialize, trainer.train_step

    def initialize_with_float_logits():
        initialize()
        for network in (trainer.network, *vars(getattr(trainer, "companions", SimpleNamespace())).values()):
            for layer in (layer for module in network.modules() for layer in getattr(module, "seg_layers", ())):
                layer.register_forward_hook(lambda module, inputs, output: output.float())

    trainer.initialize = initialize_with_float_logits
    trainer.train_step = torch.autocast("cpu", torch.bfloat16)(step)


def add_seconds(file: Path, seconds: dict[str, float]) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(known | seconds))


def cpu_seconds(file: Path) -> float:
    return sum(json.loads(file.read_text(encoding="utf-8")).values())


def literal(value: str):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a plain word
        return value
