"""What is measured of networks and pseudo labels, and the Dice of every network."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from equations import CLASSES, EVERY_KIND, started
from PIL import Image
from tiny_trainers import EVERY_STREAM, every_trainer, make_trainer, seed
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_ssl.data.loading import Batch
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning
from nnunet_ssl.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_ssl.training.health import Health
from nnunet_ssl.training.observations import mean_dice, observe, pseudo_labeler

every = pytest.mark.parametrize("trainer_class", every_trainer())


def observed(trainer, batch):
    labeler = trainer.segmenting_networks()[pseudo_labeler(trainer.segmenting_networks())]
    return observe(trainer.network, labeler, batch, trainer.label_manager)


def read(trainer):
    with open(Path(trainer.output_folder) / "losses.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("trainer_class", [nnUNetTrainerMeanTeacher, nnUNetTrainerCPS])
def test_the_observations_are_what_they_are_called(trainer_class, labels, labels_dataset, size):
    trainer = started(trainer_class, labels_dataset)
    batch = labels.random_batch(size)
    if not trainer.weak_view:
        batch.unlabeled_weak = None
    values = {name: float(value) for name, value in observed(trainer, batch).items()}

    teacher = trainer_class is nnUNetTrainerMeanTeacher
    view = batch.unlabeled_weak if teacher else batch.unlabeled
    other = trainer.companions.teacher if teacher else trainer.companions.student_2
    first = 0 if labels.regions else 1
    found, own, sure = [], [], []
    for patch in view:
        probabilities = labels.probabilities(other(patch[None]))[0]
        found.append((labels.hard(other(patch[None]))[0, :2] > 0).any(0))
        own.append((labels.hard(trainer.network(patch[None]))[0, :2] > 0).any(0))
        sure.append(probabilities.max(0).values)
    found, own, sure = map(torch.stack, (found, own, sure))
    truth, annotated = labels.truth(batch.target)[:, first:], labels.annotated(batch.target)[:, 0]
    encode = trainer.network.encoder
    codes = [encode(patch[None])[-1].flatten() for patch in (batch.image[0], *view)]
    distances = [1 - a @ b / a.norm() / b.norm() for i, a in enumerate(codes) for b in codes[:i]]
    assert values == pytest.approx(
        {
            "labeled_foreground": (((truth > 0).any(1) & annotated).sum() / annotated.sum()).item(),
            "pseudo_foreground": found.float().mean().item(),
            "pseudo_confidence": sure[found].mean().item(),
            "agreement": (2 * (found & own).sum() / (found.sum() + own.sum())).item(),
            "feature_distance": (sum(distances) / len(distances)).item(),
        },
        rel=1e-4,
        abs=1e-6,
        nan_ok=True,
    )


def test_what_is_not_loaded_is_not_observed(tiny_dataset):
    trainer, batch = started(nnUNetTrainerMeanTeacher, tiny_dataset), CLASSES.random_batch(2)
    everything = observed(trainer, batch)
    labeled = Batch(batch.image, batch.target, None)
    assert observed(trainer, labeled) == {"labeled_foreground": everything["labeled_foreground"]}
    unlabeled = observed(trainer, Batch(None, None, batch.unlabeled, batch.unlabeled_weak))
    assert unlabeled.keys() == everything.keys() - {"labeled_foreground"}
    assert unlabeled["agreement"] == everything["agreement"]
    single = observed(trainer, Batch(None, None, batch.unlabeled[:1], batch.unlabeled_weak[:1]))
    assert "feature_distance" not in single


def test_a_method_of_one_network_and_a_network_without_stages(tiny_dataset):
    class Alone(SemiSupervisedTrainer):
        def losses(self, batch):
            yield {"supervised": self.loss(self.network(batch.image), batch.target)}

    trainer = started(Alone, tiny_dataset)
    expected = {"labeled_foreground", "pseudo_foreground", "pseudo_confidence", "feature_distance"}
    assert observed(trainer, CLASSES.random_batch(1)).keys() == expected
    trainer.network = torch.nn.Conv3d(1, 2, 1)
    assert observed(trainer, CLASSES.random_batch(1)).keys() == expected - {"feature_distance"}


class HostCopies(TorchDispatchMode):
    """Counts the operations for which a GPU would make the host wait."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else []
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        self.count += by_mask or name.startswith(("_local_scalar_dense", "nonzero", "masked_select", "unique"))
        return function(*args, **(kwargs or {}))


@every
def test_observing_changes_nothing_and_waits_for_nothing(trainer_class, tiny_dataset, monkeypatch):
    trainer = started(trainer_class, tiny_dataset, **EVERY_STREAM)
    batch = trainer._to_device(next(trainer.dataloader_train))
    networks = [*trainer.segmenting_networks().values()]
    for network in networks:  # a part that is in another mode than the whole
        part = next(network.children())
        part.train(not part.training)
    modes = [[module.training for module in network.modules()] for network in networks]
    weights = [p.clone() for network in networks for p in network.parameters()]
    state = torch.get_rng_state()
    ones = torch.ones(2)
    with HostCopies() as copies:
        assert (float(ones[0]), len(ones[ones > 0])) == (1, 2)
        assert copies.count == 2
        for name in ("cpu", "numpy", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, None)
        convert = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", lambda x, kind: convert(x, {torch.int16: kind}[kind]))  # to no device
        observed(trainer, batch)
        monkeypatch.undo()
    assert copies.count == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert [[module.training for module in network.modules()] for network in networks] == modes
    assert all(map(torch.equal, weights, (p for network in networks for p in network.parameters())))
    assert all(p.grad is None for network in networks for p in network.parameters())


def test_a_companion_that_does_not_segment_makes_no_pseudo_labels(tiny_dataset):
    class Discriminator(SemiSupervisedTrainer):
        def build_companions(self):
            return {"discriminator": torch.nn.Linear(3, 1).requires_grad_(False)}

    trainer = started(Discriminator, tiny_dataset)
    assert pseudo_labeler(trainer.segmenting_networks()) == "student"
    assert "agreement" not in observed(trainer, CLASSES.random_batch(2))


@every
def test_every_epoch_has_its_row(trainer_class, tiny_dataset):
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset, num_epochs=3)
    trainer.run_training()
    rows = read(trainer)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {"pseudo_foreground", "labeled_foreground", "feature_distance"} <= rows[0].keys()
    assert ("agreement" in rows[0]) == (len(trainer.segmenting_networks()) > 1)
    if trainer_class.rampup > 0:
        done = [2 * epoch / (trainer_class.rampup * 6) for epoch in (1, 2, 3)]  # of the ramp-up, 2 steps an epoch
        expected = [math.exp(-5 * (1 - min(part, 1)) ** 2) for part in done]
        assert [float(row["ramp"]) for row in rows] == pytest.approx(expected)
    else:
        assert "ramp" not in rows[0]
    for epoch, row in enumerate(rows):
        labeled, unlabeled = trainer._streams_of(epoch)
        assert (row["labeled_foreground"] != "") == labeled
        assert (row["pseudo_foreground"] != "") == (row["feature_distance"] != "") == unlabeled
        assert 0 < float(row["labeled_foreground"] or 0.5) < 1
        assert 0 <= float(row["pseudo_foreground"] or 0) <= 1
        assert float(row["feature_distance"] or 1) > 0
    # as the networks change, so do the observations
    assert len({row["feature_distance"] for row in rows}) == 3


@pytest.mark.pictures
@pytest.mark.parametrize("trainer_class", [nnUNetTrainerM3HL, nnUNetTrainerCoLearning])
def test_a_training_has_its_pictures(trainer_class, tiny_dataset):
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset)
    trainer.run_training()
    with Image.open(Path(trainer.output_folder) / "semi_supervised.png") as picture:
        assert picture.size == (1100, 1260)  # five panels
    assert Path(trainer.output_folder, "progress.png").stat().st_size > 10_000


def test_the_step_has_no_observations_but_the_last_of_an_epoch(tiny_dataset, monkeypatch):
    seen = []
    monkeypatch.setattr("nnunet_ssl.trainer.observe", lambda *args: seen.append(trainer.step) or {})
    trainer = started(nnUNetTrainerM3HL, tiny_dataset)
    trainer.num_iterations_per_epoch, trainer.step = 3, 0
    for _ in range(7):
        trainer.train_step(next(trainer.dataloader_train))
    assert seen == [3, 6]


def test_collapsed_features_have_no_distance(tiny_dataset):
    trainer = started(nnUNetTrainerM3HL, tiny_dataset)
    norm = [m for m in trainer.network.encoder.modules() if isinstance(m, torch.nn.InstanceNorm3d)][-1]
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.ones_(norm.bias)
    assert float(observed(trainer, CLASSES.random_batch(2))["feature_distance"]) == pytest.approx(0, abs=1e-5)


def test_features_are_compared_in_float32(tiny_dataset):
    trainer = started(nnUNetTrainerM3HL, tiny_dataset)
    with torch.autocast("cpu", torch.bfloat16):
        distance = float(observed(trainer, CLASSES.random_batch(2))["feature_distance"])
    assert (512 * distance) % 1 != 0  # cosines in bfloat16 are multiples of 1/256 near 1


# ---- Dice of every network ----


@every
def test_every_network_has_its_dice_on_validation_batches(trainer_class, tiny_dataset):
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset, num_val_iterations_per_epoch=3)
    trainer.run_training()
    names, rows = [*trainer.segmenting_networks()], read(trainer)
    if len(names) == 1:  # nothing to compare: the Dice is in nnU-Net's log
        names = []
    assert [name for name in rows[0] if name.startswith("dice_")] == [f"dice_{name}" for name in names]
    assert trainer.inference_network() is trainer.network
    for row, dice in zip(rows if names else [], trainer.logger.get_value("mean_fg_dice", step=None), strict=False):
        assert float(row["dice_student"]) == pytest.approx(dice)
    assert len({rows[-1][f"dice_{name}"] for name in names}) == len(names)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("deployed", ["student", "teacher"])
def test_the_dice_of_every_network_is_that_of_its_predictions(labels, labels_dataset, deployed, monkeypatch):
    trainer = started(nnUNetTrainerMeanTeacher, labels_dataset)
    networks = {"student": trainer.network, "teacher": trainer.companions.teacher}
    monkeypatch.setattr(trainer, "inference_network", lambda: networks[deployed])
    trainer.history.append = lambda epoch, losses, observations: rows.append(observations)
    trainer.history.draw = lambda last: None
    rows, batches = [], [labels.random_batch(2) for _ in range(12)]
    modes = [module.training for module in networks["teacher"].modules()]
    trainer.on_validation_epoch_start()
    outputs = []
    with torch.no_grad():
        for batch in batches:
            outputs.append(trainer.validation_step({"data": batch.image, "target": batch.target.clone()}))
        trainer.on_validation_epoch_end(outputs)
    first = 0 if labels.regions else 1
    for name, network in networks.items():
        twice = total = 0
        for batch in batches[:10]:  # nnU-Net's own Dice is of all
            found = labels.truth(labels.hard(network(batch.image)))[:, first:]
            truth, counts = labels.truth(batch.target)[:, first:], labels.annotated(batch.target)
            twice = twice + (2 * found * truth * counts).sum((0, 2, 3, 4))
            total = total + ((found + truth) * counts).sum((0, 2, 3, 4))
        assert rows[0][f"dice_{name}"] == pytest.approx((twice / total).mean().item(), rel=1e-5)
    assert rows[0]["dice_student"] != rows[0]["dice_teacher"]
    if deployed == "student":
        assert [module.training for module in networks["teacher"].modules()] == modes


def test_classes_that_are_nowhere_have_no_dice():
    def counts(*values):
        return {key: np.array(value) for key, value in zip(("tp_hard", "fp_hard", "fn_hard"), values, strict=True)}

    nowhere = counts([0, 0], [0, 0], [0, 0])
    assert math.isnan(mean_dice([nowhere]))
    assert mean_dice([nowhere, counts([2, 0], [1, 0], [1, 0]), counts([1, 0], [0, 0], [0, 0])]) == pytest.approx(6 / 8)


@pytest.mark.parametrize(("teacher", "warned"), [(0.74, True), (0.76, False)])
def test_a_teacher_below_every_student_is_told(teacher, warned):
    said = []
    Health(said.append).compare_dice({"student": 0.9, "student_2": 0.8, "teacher": teacher})
    text = f"WARNING: on validation patches the teacher has a Dice of {teacher:.3f}, every student 0.800 or more"
    assert [line.startswith(text) for line in said] == [True] * warned


@pytest.mark.parametrize(
    ("labeled", "pseudo", "warned"),
    [
        (0.04, 0.51, True),
        (0.04, 0.49, False),
        (0.3, 0.55, False),
        (0.3, 0.65, True),
        (None, 0.9, False),
        (0.1, None, False),
    ],
)
def test_pseudo_labels_with_much_more_foreground_than_labels_are_told(labeled, pseudo, warned):
    said = []
    observations = {"labeled_foreground": labeled, "pseudo_foreground": pseudo}
    Health(said.append).compare_foreground({k: torch.tensor(v) for k, v in observations.items() if v is not None})
    text = f"WARNING: pseudo labels call {pseudo or 0:.0%} of the voxels foreground, the labels {labeled or 0:.0%}:"
    assert [line.startswith(text) for line in said] == [True] * warned


def test_the_foreground_of_every_epoch_is_compared(tiny_dataset):
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset)
    trainer.on_train_start()
    trainer._observations = {"labeled_foreground": 0.1, "pseudo_foreground": 0.9}
    trainer.on_validation_epoch_start()
    trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    assert "WARNING: pseudo labels call 90%" in Path(trainer.log_file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("supervised", "epoch", "compared"),
    [(0, 0, False), (0, 1, False), (0, 2, True), (10, 10, False), (10, 11, True)],
)
def test_teachers_may_lag_behind_in_the_first_tenth_of_the_method(
    supervised, epoch, compared, tiny_dataset, monkeypatch
):
    """Their moving average warms up, and so does the weight of their labels."""
    seed()
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset, num_epochs=20)
    trainer.on_train_start()
    trainer.current_epoch, trainer.supervised_epochs = epoch, supervised
    compare_dice, seen = trainer.health.compare_dice, []
    monkeypatch.setattr(trainer.health, "compare_dice", lambda dice: seen.append(dice.keys()) or compare_dice(dice))
    trainer.on_validation_epoch_start()
    trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    assert seen == [{"student", "teacher"}] * compared


@every
def test_pseudo_labels_are_the_teachers_where_there_is_one(trainer_class, tiny_dataset):
    trainer = started(trainer_class, tiny_dataset)
    name = pseudo_labeler(trainer.segmenting_networks())
    if any(companion.startswith("teacher") for companion in vars(trainer.companions)):
        assert name.startswith("teacher")
    else:
        assert name == ("student_2" if trainer_class is nnUNetTrainerCPS else "student")
