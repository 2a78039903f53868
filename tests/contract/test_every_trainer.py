"""The contract that every trainer keeps, in 2D and 3D, with plain and residual encoders."""

import shutil
import sys
from itertools import chain
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_trainers import EVERY_STREAM, every_trainer, make_trainer, seed

from nnunet_ssl.blocks.networks import unwrap
from nnunet_ssl.trainers.nnUNetTrainerCoM3HL import nnUNetTrainerCoM3HL
from nnunet_ssl.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_ssl.trainers.nnUNetTrainerDTC import nnUNetTrainerDTC
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerPSMT import nnUNetTrainerPSMT
from nnunet_ssl.trainers.nnUNetTrainerSASSNet import nnUNetTrainerSASSNet

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import step_time

CASES = [("3d_fullres", "tiny_dataset"), ("2d", "tiny_dataset"), ("3d_fullres", "tiny_residual_dataset")]
ONE_SCALE = {  # terms without deep supervision
    (nnUNetTrainerPSMT, "pseudo"),
    (nnUNetTrainerDTC, "labeled_distance"),
    (nnUNetTrainerSASSNet, "labeled_distance"),
}
every_method = pytest.mark.parametrize("trainer_class", every_trainer())
with_variants = pytest.mark.parametrize("trainer_class", every_trainer(variants=True))
everywhere = pytest.mark.parametrize(("configuration", "dataset"), CASES, ids=["3d", "2d", "3d-residual"])


def started(trainer_class, configuration, dataset, request, **settings):
    seed()
    trainer = make_trainer(trainer_class, request.getfixturevalue(dataset), configuration, **settings)
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def late(trainer):
    """The trainer after a third of its training, and after its pretraining: patches are still mixed."""
    trainer.step = trainer.max_steps // 3
    while not trainer.streams()[1]:
        trainer.step += 1
    trainer.current_epoch = trainer.step // trainer.num_iterations_per_epoch
    return trainer


def weights_of(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def groups_of_terms(trainer, batch):
    return list(trainer.losses(batch))


@every_method
@everywhere
def test_losses_are_named_finite_scalars(trainer_class, configuration, dataset, request):
    trainer = started(trainer_class, configuration, dataset, request)
    trainer.loss.weight_factors = [2 / 3, 1 / 3]  # networks of tests are so small that nnU-Net's second one is 0
    batch, groups = trainer._to_device(next(trainer.dataloader_train)), []
    for step in (0, trainer.max_steps - 1) if hasattr(trainer, "is_whole") else (0,):  # mixed and whole patches
        trainer.step = step
        groups += groups_of_terms(trainer, batch)
    assert any(groups)
    decoders = [getattr(network, "decoder", network) for network in map(unwrap, trainer.trained_networks())]
    second = [d.seg_layers[0].weight for d in decoders if hasattr(d, "seg_layers")]
    for group in groups:
        for name, value in group.items():
            assert isinstance(name, str)
            assert value.shape == ()
            assert torch.isfinite(value)
            if name.startswith(("supervised", "labeled", "pseudo")) and (trainer_class, name) not in ONE_SCALE:
                gradients = torch.autograd.grad(value, second, retain_graph=True, allow_unused=True)
                assert any(g is not None and g.any() for g in gradients), name  # deep supervision


@with_variants
@everywhere
def test_the_loss_has_a_gradient_with_respect_to_the_unlabeled_images(trainer_class, configuration, dataset, request):
    trainer = late(started(trainer_class, configuration, dataset, request))
    trainer.on_train_epoch_start()
    batch = trainer._to_device(next(trainer.dataloader_train))
    batch.unlabeled.requires_grad_()
    sum(value for group in groups_of_terms(trainer, batch) for value in group.values()).backward()
    gradient = batch.unlabeled.grad.flatten(1).abs().amax(1)
    assert (gradient > 0).all()  # of every sample


def joint(loader_items, size):
    """The first samples of several items of a loader as one item."""
    items = [{k: v for k, v in item.items() if k != "keys"} for item in loader_items]
    return {key: samples([item[key] for item in items], size) for key in items[0]}


def samples(values, size):
    if isinstance(values[0], list):  # the scales of deep supervision
        return [torch.cat(scale)[:size] for scale in zip(*values, strict=True)]
    return torch.cat(values)[:size]


@with_variants
def test_every_labeled_patch_is_used_within_two_steps_of_each_phase(trainer_class, tiny_dataset):
    # nnU-Net puts patches with foreground last in a batch: a method that uses the first ones only never sees them
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset, "2d", num_iterations_per_epoch=50, **EVERY_STREAM)
    trainer.on_train_start()
    trainer.network.train()
    items = [next(trainer.dataloader_train) for _ in range(2)]
    for begin in (0, trainer.max_steps // 3, trainer.max_steps - 2):  # every phase of every method
        for size in (1, 2, 3, 4):
            gradients = []
            for trainer.step in (begin, begin + 1):
                batch = trainer._to_device(joint(items, size))
                batch.image.requires_grad_()
                sum(value for terms in trainer.losses(batch) for value in terms.values()).backward()
                gradient = torch.zeros_like(batch.image) if batch.image.grad is None else batch.image.grad
                gradients.append(gradient.flatten(1).abs().amax(1))
            used = sum(gradients) > 0
            labeled, _ = trainer.streams()
            assert used.all() if labeled else not used.any(), f"batch of {size}, step {begin}: {used.tolist()}"


@with_variants
def test_what_no_step_of_an_epoch_learns_from_is_not_loaded(trainer_class, tiny_dataset):
    trainer = make_trainer(trainer_class, tiny_dataset, num_epochs=10, num_iterations_per_epoch=2)
    trainer.on_train_start()
    for trainer.current_epoch in range(10):
        trainer.step, found = 2 * trainer.current_epoch, []
        trainer.on_train_epoch_start()
        item = next(trainer.dataloader_train)
        for _ in range(2):
            found.append(trainer.streams())
            trainer.step += 1
        needed = tuple(map(any, zip(*found, strict=True)))
        assert ("data" in item, "unlabeled" in item) == needed, f"epoch {trainer.current_epoch}"


@every_method
@everywhere
def test_exactly_the_parameters_that_require_gradients_are_in_an_optimizer_each_in_one(
    trainer_class, configuration, dataset, request
):
    trainer = started(trainer_class, configuration, dataset, request)
    networks = [trainer.network, *vars(trainer.companions).values()]
    trained = {id(p) for network in networks for p in network.parameters() if p.requires_grad}
    optimizers = [trainer.optimizer, *trainer.optimizers.values()]
    optimized = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(optimized)
    assert {id(p) for p in trainer.network.parameters()} <= trained


@every_method
@everywhere
def test_a_step_trains_the_students_and_leaves_no_gradient_in_a_teacher(trainer_class, configuration, dataset, request):
    trainer = started(trainer_class, configuration, dataset, request)
    students, companions = trainer.trained_networks(), vars(trainer.companions).values()
    before = [torch.cat([p.detach().flatten() for p in n.parameters()]).clone() for n in students]
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    for network, old in zip(students, before, strict=True):
        assert not torch.equal(torch.cat([p.detach().flatten() for p in network.parameters()]), old)
    for teacher in [c for c in companions if all(c is not s for s in students)]:
        assert all(p.grad is None for p in teacher.parameters())
        assert not teacher.training
    assert trainer.step == 1


@every_method
def test_a_teacher_follows_the_student(trainer_class, tiny_dataset):
    seed()
    trainer = late(make_trainer(trainer_class, tiny_dataset))
    trainer.on_train_start()
    teachers = [unwrap(c) for name, c in vars(trainer.companions).items() if name.startswith("teacher")]
    students = [unwrap(network) for network in trainer.trained_networks()]
    if not teachers:
        pytest.skip("no network is named teacher")
    if hasattr(trainer.companions, "teacher"):  # OMF's is not updated any more
        for _ in range(4):
            old = weights_of(teachers[0])
            trainer.train_step(next(trainer.dataloader_train))
        distance = [(weights - weights_of(students[0])).abs().sum() for weights in (old, weights_of(teachers[0]))]
        assert 0 < distance[1] < distance[0]

    # far beyond the warm-up of the decay, and before the end of a pretraining
    trainer.num_iterations_per_epoch, trainer.step = 10_000, 2_000
    with torch.no_grad():
        for parameter in chain(*(network.parameters() for network in students)):
            parameter.add_(torch.randn_like(parameter))
    shares = [trainer.alpha, trainer.beta] if hasattr(trainer, "alpha") else [1 - trainer.teacher_decay]
    own = sum(share * weights_of(student) for share, student in zip(shares, students, strict=False))
    before = [weights_of(teacher) for teacher in teachers]
    trainer.after_step()
    pairs = [(old, weights_of(teacher)) for old, teacher in zip(before, teachers, strict=True)]
    updated = [(old, new) for old, new in pairs if not torch.equal(old, new)]  # some have their turn in other steps
    assert updated
    for old, new in updated:
        torch.testing.assert_close(new, (1 - sum(shares)) * old + own)


def poison(folder, cases):
    """Replaces everything that was derived from the labels of these cases."""
    rng = np.random.default_rng(0)
    for case in cases:
        for data in folder.glob(f"nnUNetPlans_*/{case}_seg.b2nd"):
            shape = blosc2.open(str(data)).shape
            data.unlink()
            blosc2.asarray(rng.integers(-1, 2, shape).astype(np.int16), urlpath=str(data), mode="w")
        for file in folder.glob(f"nnUNetPlans_*/{case}.pkl"):
            properties = load_pickle(str(file))
            properties["class_locations"] = {1: rng.integers(0, 4, (50, 4))}
            write_pickle(properties, str(file))
        for label in folder.glob(f"gt_segmentations/{case}.*"):
            label.write_bytes(b"garbage")


@every_method
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_labels_of_unlabeled_cases_change_nothing(trainer_class, configuration, tiny_dataset, tmp_path, monkeypatch):
    def first_losses():
        seed()
        trainer = late(make_trainer(trainer_class, tiny_dataset, configuration))
        trainer.on_train_start()
        trainer.network.train()
        return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(3)]

    expected = first_losses()
    copy = tmp_path / tiny_dataset.name
    shutil.copytree(tiny_dataset, copy)
    poison(copy, [f"case_{i:03d}" for i in range(3, 7)])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert first_losses() == expected
    # the garbage is where a trainer would find it: the same on labeled cases does change the losses
    poison(copy, ["case_000", "case_001"])
    learns_from_labels, _ = late(make_trainer(trainer_class, tiny_dataset)).streams()
    assert (first_losses() != expected) == learns_from_labels


@every_method
@everywhere
def test_a_checkpoint_continues_with_the_same_losses(trainer_class, configuration, dataset, request, tmp_path):
    trainer = started(trainer_class, configuration, dataset, request, **EVERY_STREAM)
    trainer.step = 1
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
    for name in ("mean_fg_dice", "ema_fg_dice"):
        trainer.logger.local_logger.my_fantastic_logging[name].append(0.5)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    expected = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(3)]

    seed(99)
    resumed = make_trainer(trainer_class, request.getfixturevalue(dataset), configuration, **EVERY_STREAM)
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed.on_train_start()
    resumed.network.train()
    assert resumed.step == 4
    assert [resumed.train_step(next(resumed.dataloader_train)) for _ in range(3)] == expected
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


@every_method
@everywhere
def test_the_stock_loop_trains_and_stock_code_predicts(trainer_class, configuration, dataset, request, tmp_path):
    seed()
    trainer = make_trainer(trainer_class, request.getfixturevalue(dataset), configuration)
    trainer.run_training()
    assert trainer.step == trainer.max_steps == 4
    checkpoint = f"{trainer.output_folder}/checkpoint_final.pth"

    predictor = nnUNetPredictor(tile_step_size=1, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    stock = make_trainer(nnUNetTrainer, request.getfixturevalue(dataset), configuration)
    stock.load_checkpoint(checkpoint)
    deployed = unwrap(trainer.inference_network()).state_dict()
    for weights in (predictor.list_of_parameters[0], stock.network.state_dict()):
        assert weights.keys() == deployed.keys()
        assert all(torch.equal(weights[name], deployed[name]) for name in deployed)


@every_method
def test_with_every_weight_at_zero_the_gradient_is_that_of_supervised_training(trainer_class, tiny_dataset):
    weights = {name: 0.0 for name in dir(trainer_class) if name.endswith("_weight")}
    # what changes the labeled scans or their loss is switched off as well
    plain = {"noise": 0.0, "cross_entropy": True, "patches_per_term": "full"}
    plain = {name: value for name, value in plain.items() if hasattr(trainer_class, name)}
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset, **weights, **plain)
    trainer.on_train_start()
    batch = trainer._to_device(next(trainer.dataloader_train))
    groups = groups_of_terms(trainer, batch)
    if not any(name.startswith("supervised") for group in groups for name in group):
        pytest.skip("the method has no supervised term on unmixed images")
    sum(value for group in groups for value in group.values()).backward()
    gradients = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    trainer.network.zero_grad()
    trainer.loss(trainer.network(batch.image), batch.target).backward()
    expected = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, expected)


@with_variants
def test_the_settings_are_documented_class_attributes(trainer_class):
    assert "__init__" not in vars(trainer_class)
    assert trainer_class.__doc__
    assert trainer_class.__name__.startswith("nnUNetTrainer")


def test_a_variant_changes_settings_that_its_method_has():
    for variant in set(every_trainer(variants=True)) - set(every_trainer()):
        own = {name: value for name, value in vars(variant).items() if not name.startswith("__")}
        assert variant.__base__ in every_trainer()
        assert own
        for name, value in own.items():
            assert not callable(value)
            assert type(value) is type(getattr(variant.__base__, name)), f"{variant}.{name}"


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerM3HL, nnUNetTrainerCoM3HL])
def test_what_is_loaded_for_steps_on_whole_patches_is_learned_from_once(trainer_class, tiny_dataset):
    trainer = make_trainer(trainer_class, tiny_dataset, num_epochs=1, num_iterations_per_epoch=20, noise=0.0)
    trainer.on_train_start()
    loaded, learned = [], []
    original = trainer.dataloader_train.loader
    trainer.dataloader_train.loader = (loaded.append(item) or item for item in original)
    trainer.network.encoder.register_forward_pre_hook(lambda _, args: learned.extend(args[0].detach()))
    trainer.step = 6  # of 20, the first 8 are on mixed patches
    for _ in range(12):
        trainer.train_step(next(trainer.dataloader_train))
    assert len(loaded) == 2 + 5
    for item in loaded[2:]:
        for patch in (*item["data"], *item["unlabeled"]):
            assert sum(torch.equal(patch, other) for other in learned) == 1


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerM3HL, nnUNetTrainerCPS])  # with a weak view, and without
def test_unlabeled_patches_can_be_augmented_on_the_device(trainer_class, tiny_dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_ssl_augment", "device")
    trainer = make_trainer(trainer_class, tiny_dataset)
    trainer.on_train_start()
    item = next(trainer.dataloader_train)
    assert "unlabeled" not in item
    batches = [trainer._to_device(item) for _ in range(8)]
    assert (batches[0].unlabeled_weak is None) == (trainer_class is nnUNetTrainerCPS)
    assert any(not torch.equal(batch.unlabeled, item["unlabeled_weak"]) for batch in batches)
    trainer.network.train()
    assert np.isfinite(trainer.train_step(item)["loss"])


# What the count of passes leaves out, in passes of this tiny network: heads and a class memory, a second decoder, the
# decoders of two teachers, a discriminator. OMF's count is that of its first phase.
NOT_COUNTED = {
    "nnUNetTrainerSSNet": 2.62,
    "nnUNetTrainerMCNet": 3.28,
    "nnUNetTrainerPSMT": 1.9,
    "nnUNetTrainerSASSNet": 0.53,
    "nnUNetTrainerOMF": -0.66,
}


@every_method
def test_a_step_computes_what_its_passes_need_and_no_more(trainer_class, tiny_dataset):
    # benchmarks/step_time.py takes the time; this finds a network that is asked twice, on any machine
    work = []
    for kind in (trainer_class, nnUNetTrainer):
        trainer = make_trainer(kind, tiny_dataset, num_iterations_per_epoch=10, **EVERY_STREAM)
        trainer.on_train_start()
        batch = next(trainer.dataloader_train)
        work.append(step_time.multiplications(late(trainer) if kind is trainer_class else trainer, batch))
    forward, backward = step_time.PASSES[trainer_class.__name__]
    expected = (forward + 2 * backward) / 3 + NOT_COUNTED.get(trainer_class.__name__, 0.0)
    assert work[0] / work[1] == pytest.approx(expected, rel=0.02)
