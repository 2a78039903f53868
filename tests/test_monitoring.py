"""The table and the picture of a training."""

import csv
import itertools
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from equations import CLASSES, EVERY_KIND, started
from matplotlib.text import Text
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from training import every_trainer, make_trainer, seed

from nnunet_ssl import monitoring
from nnunet_ssl.monitoring import NAMES, History, draw, labeler, mean_dice, observe
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher

every = pytest.mark.parametrize("trainer_class", every_trainer())


def read(trainer):
    with open(Path(trainer.output_folder) / "losses.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("trainer_class", [nnUNetTrainerMeanTeacher, nnUNetTrainerCPS])
def test_the_observations_are_what_they_are_called(trainer_class, labels, labels_dataset, size):
    trainer = started(trainer_class, labels_dataset)
    trainer.step = 1
    batch = labels.random_batch(size)
    if not trainer.weak_view:
        batch.unlabeled_weak = None
    values = {name: float(value) for name, value in observe(trainer, batch).items()}

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
            "ramp": math.exp(-5 * (1 - 1 / (0.4 * trainer.max_steps)) ** 2),
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


def test_a_method_of_one_network_and_a_network_without_stages(tiny_dataset):
    class Alone(SemiSupervisedTrainer):
        def losses(self, batch):
            yield {"supervised": self.loss(self.network(batch.image), batch.target)}

    trainer = started(Alone, tiny_dataset)
    expected = {"labeled_foreground", "pseudo_foreground", "pseudo_confidence", "feature_distance"}
    assert observe(trainer, CLASSES.random_batch(1)).keys() == expected
    trainer.network = torch.nn.Conv3d(1, 2, 1)
    assert observe(trainer, CLASSES.random_batch(1)).keys() == expected - {"feature_distance"}


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
    trainer = started(trainer_class, tiny_dataset)
    batch = trainer._to_device(next(trainer.dataloader_train))
    networks = [trainer.network, *vars(trainer.companions).values()]
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
        observe(trainer, batch)
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
    assert labeler(trainer) == ("student", trainer.network)
    assert "agreement" not in observe(trainer, CLASSES.random_batch(2))


@every
def test_every_epoch_has_its_row_and_the_training_its_picture(trainer_class, tiny_dataset):
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset, num_epochs=3)
    trainer.run_training()
    rows = read(trainer)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {"pseudo_foreground", "labeled_foreground", "agreement", "feature_distance"} <= rows[0].keys()
    assert ("ramp" in rows[0]) == (trainer_class.rampup > 0)
    for row in rows:
        assert 0 < float(row["labeled_foreground"]) < 1
        assert 0 <= float(row["pseudo_foreground"]) <= 1
        assert float(row["feature_distance"]) > 0
    # as the networks change, so do the observations
    assert len({row["feature_distance"] for row in rows}) == 3
    with Image.open(Path(trainer.output_folder) / "semi_supervised.png") as picture:
        assert picture.size == (1600, 750)


def test_the_step_has_no_observations_but_the_last_of_an_epoch(tiny_dataset, monkeypatch):
    seen = []
    monkeypatch.setattr("nnunet_ssl.trainer.observe", lambda trainer, batch: seen.append(trainer.step) or {})
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
    assert float(observe(trainer, CLASSES.random_batch(2))["feature_distance"]) == pytest.approx(0, abs=1e-5)


# ---- Dice of every network ----


@every
def test_every_network_has_its_dice_on_validation_batches(trainer_class, tiny_dataset):
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset, num_val_iterations_per_epoch=3)
    trainer.run_training()
    names = ["student", *vars(trainer.companions)]
    rows = read(trainer)
    assert [name for name in rows[0] if name.startswith("dice_")] == [f"dice_{name}" for name in names]
    deployed = [float(row["dice_student"]) for row in rows]
    assert trainer.inference_network() is trainer.network
    assert deployed == pytest.approx(trainer.logger.get_value("mean_fg_dice", step=None))
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


@pytest.mark.parametrize(("epoch", "teacher", "warned"), [(5, 0.74, True), (5, 0.76, False), (0, 0.1, False)])
def test_a_teacher_below_every_student_is_told(epoch, teacher, warned, tiny_dataset, capsys):
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset, num_epochs=10, current_epoch=epoch)
    trainer._warn_of_lagging_teachers({"student": 0.9, "student_2": 0.8, "teacher": teacher})
    said = f"WARNING: on validation patches the teacher has a Dice of {teacher:.3f}, every student 0.800 or more"
    assert (said in capsys.readouterr().out) == warned


# ---- the table and the picture ----


@pytest.mark.parametrize(
    ("text", "kept"),
    [("epoch,loss\n0,1.5\n1,1.25\n2,", ["epoch,loss", "0,1.5"]), ("", None), ("epoch,loss\n5,1\n", None)],
)
def test_rows_that_are_trained_again_or_were_cut_off_are_dropped(text, kept, tmp_path):
    history = History(tmp_path)
    history.table.write_text(text)
    history.trim(1)
    assert (history.table.read_text(encoding="utf-8").split() if history.table.exists() else None) == kept


def test_other_columns_than_before_are_added_by_name(tmp_path):
    history = History(tmp_path)
    history.table.write_text("epoch,loss,b,a\n0,3.0,1.0,2.0\n")
    history.trim(1)
    history.append(1, {"loss": 7.0, "a": 3.0, "b": 4.0}, {"ramp": 0.5})
    history.append(2, {"loss": 7.0, "a": 5.0, "b": 2.0}, {"ramp": 1.0})
    lines = ["epoch,loss,b,a,ramp", "0,3.0,1.0,2.0,", "1,7.0,4.0,3.0,0.5", "2,7.0,2.0,5.0,1.0"]
    assert history.table.read_text(encoding="utf-8").split() == lines
    history.draw()
    assert history.picture.is_file()


def test_drawing_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def slow(columns, other):
        drawn.append(now[0])
        now[0] += 0.5
        return draw(columns, other)

    monkeypatch.setattr(monitoring, "draw", slow)
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: now[0])
    history = History(tmp_path)
    for epoch in range(20):
        now[0] += 30
        history.append(epoch, {"loss": 1.0}, {})
        history.draw(last=epoch == 19)
    assert drawn[0] == 30
    assert drawn[-1] > 600  # the last one always
    assert all(b - a >= 100 for a, b in itertools.pairwise(drawn[:-1]))  # 0.5 s are 0.5 % of 100 s
    assert len(drawn) > 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["losses.csv", "semi_supervised.png"]


def test_the_picture_has_its_own_fonts(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(monitoring, "draw", lambda *args: figures.append(draw(*args)) or figures[0])
    with matplotlib.rc_context({"font.size": 30, "axes.titlesize": 30, "legend.fontsize": 30}):  # as nnU-Net leaves it
        history = History(tmp_path)
        history.append(0, {"loss": 1.0}, {"agreement": 0.5})
        history.draw()
    sizes = {text.get_fontsize() for text in figures[0].findobj(Text)}
    assert max(sizes) < 15


def test_every_column_is_in_the_picture_with_names_and_units():
    columns = {"epoch": (0.0, 1.0), "loss": (1.0, 0.5), "low": (0.1, 0.2)} | dict.fromkeys(NAMES, (0.5, math.nan))
    columns |= dict.fromkeys(("dice_student", "dice_student_2"), (0.5, 0.6))
    figure = draw(columns, "student 2")
    shown = {line.get_label() for axis in figure.axes for line in axis.lines}
    assert shown == {
        "loss",
        "low",
        "student",
        "student 2",
        *(text.format(other="student 2") for text in NAMES.values()),
    }
    assert "Dice of student 2 and student" in shown
    looks = [{(line.get_color(), line.get_linestyle()) for line in axis.lines} for axis in figure.axes]
    assert [len(look) for look in looks] == [len(axis.lines) for axis in figure.axes] == [2, 2, 3, 2, 1]
    for axis in figure.axes:
        assert axis.get_title()
        assert axis.get_xlabel() == "epoch"
        assert axis.get_ylabel()
        assert axis.get_legend() is not None
    assert figure.axes[3].lines[0].get_ydata()[0] == 50  # percent


def test_a_term_of_a_single_epoch_is_a_point():
    columns = {"epoch": (0.0, 1.0, 2.0), "always": (1.0, 2.0, 3.0), "once": (1.0, math.nan, math.nan)}
    markers = {line.get_label(): line.get_marker() for line in draw(columns, "teacher").axes[0].lines}
    assert markers == {"always": "None", "once": "o"}


def test_a_method_with_many_terms_has_as_many_looks():
    columns = {"epoch": (0.0,), **{f"term_{i}": (float(i),) for i in range(12)}}
    lines = draw(columns, "teacher").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


@every
def test_pseudo_labels_are_the_teachers_where_there_is_one(trainer_class, tiny_dataset):
    trainer = started(trainer_class, tiny_dataset)
    name, network = labeler(trainer)
    assert name == ("student_2" if trainer_class is nnUNetTrainerCPS else "teacher")
    assert network is getattr(trainer.companions, name)
