"""What a training does, epoch by epoch, as a table and a picture: a falling loss alone proves nothing."""

import csv
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, autocast, nn

from nnunet_ssl.data import Batch
from nnunet_ssl.files import replacing
from nnunet_ssl.networks import forward_with_features, has_stages, logits, unwrap
from nnunet_ssl.pictures import COLOURS
from nnunet_ssl.pseudo_labels import hard_labels

if TYPE_CHECKING:
    from nnunet_ssl.trainer import SemiSupervisedTrainer

STYLES = ("solid", "dashed", "dotted", "dashdot")
NAMES = {  # column of the table to its name in the picture
    "ramp": "weight of the ramp-up",
    "agreement": "Dice of {other} and student",
    "pseudo_confidence": "confidence of {other}'s foreground",
    "labeled_foreground": "labels",
    "pseudo_foreground": "labels by {other}",
    "feature_distance": "of different patches",
}
DRAWING_SHARE = 0.005  # of the training time, at most


@torch.no_grad()
def observe(trainer: "SemiSupervisedTrainer", batch: Batch) -> dict[str, Tensor | float]:
    """What student and pseudo labels are like on one batch. Costs about a training step; nothing waits for a GPU.

    Pseudo labels are those of the teacher, of the second student where there is no teacher, else of the student.

    Returns:
        ramp: weight of the ramp-up, where there is one.
        labeled_foreground, pseudo_foreground: foreground voxels of labels and of pseudo labels, part of all voxels. A
            pseudo_foreground that falls to 0 is the usual way in which self-training fails.
        pseudo_confidence: mean probability of the pseudo labels in their foreground; NaN where there is none.
        agreement: Dice of both networks' foreground on unlabeled patches; not where there is one network.
        feature_distance: mean of 1 - cosine of the student's bottleneck features of different patches, in [0, 2]; 0
            means that the features have collapsed. Not for networks without encoder stages.
    """
    student, (_, other) = unwrap(trainer.network), labeler(trainer)
    view = batch.unlabeled if batch.unlabeled_weak is None else batch.unlabeled_weak
    patches = torch.cat([batch.image[:1], view])  # there are always two for the distance
    regions = trainer.label_manager.has_regions
    values: dict[str, Tensor | float] = {"ramp": trainer.ramp} if trainer.rampup > 0 else {}
    features = None
    with ExitStack() as stack:
        stack.enter_context(autocast("cuda") if trainer.device.type == "cuda" else nullcontext())
        for network in {student, other}:
            stack.enter_context(evaluating(network))
        if has_stages(student):
            output, skips = forward_with_features(student, patches)
            own, features = (output[0] if isinstance(output, list) else output), skips[-1]
            del output, skips
        else:
            own = logits(student, patches)
        own = own[1:]
        pseudo = own if other is student else logits(other, view)
    if features is not None:
        # in float32: near 0 is where a collapse shows
        features = F.normalize(features.float().flatten(1))
        pairs = len(patches) * (len(patches) - 1)
        values["feature_distance"] = (1 - features @ features.T).sum() / pairs  # 0 on the diagonal
    labels, channels = batch.labels, pseudo.shape[1]
    if regions:
        known, ignored = labels[:, :channels].bool().any(1), labels[:, channels:].bool().any(1)
    else:
        known = labels[:, 0] > 0
        ignore_label = trainer.label_manager.ignore_label
        ignored = torch.zeros_like(known) if ignore_label is None else labels[:, 0] == ignore_label
    found = foreground(pseudo, regions)
    confidence = trainer.probabilities(pseudo).amax(1)
    values["labeled_foreground"] = (known & ~ignored).sum() / (~ignored).sum()
    values["pseudo_foreground"] = found.float().mean()
    values["pseudo_confidence"] = (confidence * found).sum() / found.sum()
    if other is not student:
        mine = foreground(own, regions)
        values["agreement"] = 2 * (mine & found).sum() / (mine.sum() + found.sum())
    return values


def labeler(trainer: "SemiSupervisedTrainer") -> tuple[str, nn.Module]:
    """Name and network whose labels the student learns from: a teacher, else the second student, else itself."""
    networks = trainer.segmenting_networks()
    companions = sorted((n for n in networks if n != "student"), key=lambda name: not name.startswith("teacher"))
    name = next(iter(companions), "student")
    return name, unwrap(networks[name])


def foreground(logits: Tensor, regions: bool) -> Tensor:
    """Voxels (B, *spatial) of any class but the background, or of any region: bool."""
    return (hard_labels(logits, regions=regions) > 0).any(1)


def mean_dice(counts: list[dict[str, np.ndarray]]) -> float:
    """Dice of the summed counts that nnU-Net's validation steps return, mean over classes or regions.

    NaN where no class is in any batch, neither in labels nor in predictions.
    """
    tp, fp, fn = (np.sum([step[key] for step in counts], 0) for key in ("tp_hard", "fp_hard", "fn_hard"))
    total = 2 * tp + fp + fn
    dice = 2 * tp[total > 0] / total[total > 0]
    return float(dice.mean()) if len(dice) else math.nan


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every part in the mode in which it was."""
    modes = [(module, module.training) for module in network.modules()]  # a part may be in another mode on purpose
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class History:
    """losses.csv and semi_supervised.png in the folder of a fold."""

    def __init__(self, folder: Path, other: str = "teacher"):
        self.table, self.picture, self.other = folder / "losses.csv", folder / "semi_supervised.png", other
        self._drawn_at, self._drawing_seconds = float("-inf"), 0.0

    def trim(self, epoch: int) -> None:
        """Drops rows of epochs that a resumed (or a new) training is going to write again: `epoch` and later ones."""
        header, *rows = self.read() or [[]]
        # a line that was cut off belongs to an epoch that is going to be trained again
        kept = [row for row in rows if len(row) == len(header) and int(row[0]) < epoch]
        if kept:
            with replacing(self.table) as temporary, open(temporary, "w", newline="") as f:
                csv.writer(f).writerows([header, *kept])
        else:
            self.table.unlink(missing_ok=True)

    def append(self, epoch: int, losses: dict[str, float], observations: dict[str, float]) -> None:
        """Adds a row: epoch, "loss", its terms, then the observations; columns that were not there become empty."""
        row = {"epoch": epoch, **losses, **observations}
        header, *rows = self.read() or [list(row)]
        if set(header) == set(row) and rows:
            with self.table.open("a", newline="") as f:
                csv.DictWriter(f, header).writerow(row)
            return
        with replacing(self.table) as temporary, open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys([*header, *row])))
            writer.writeheader()
            writer.writerows(dict(zip(header, values, strict=True)) for values in rows)
            writer.writerow(row)

    def read(self) -> list[list[str]]:
        """The lines of the table, empty where there is none."""
        if not self.table.is_file():
            return []
        with self.table.open(newline="") as f:
            return list(csv.reader(f))

    def draw(self, last: bool = False) -> None:
        """Draws the picture, unless drawing would take more than DRAWING_SHARE of the time since the last one."""
        begin = time.perf_counter()
        if not last and begin - self._drawn_at < self._drawing_seconds / DRAWING_SHARE:
            return
        header, *rows = self.read()
        numbers = ([float(value or "nan") for value in row] for row in rows)
        columns = dict(zip(header, zip(*numbers, strict=True), strict=True))
        # nnU-Net's progress.png leaves huge fonts behind
        with style.context("default"), replacing(self.picture) as temporary:
            draw(columns, self.other).savefig(temporary, format="png", dpi=100)
        self._drawn_at = time.perf_counter()
        self._drawing_seconds = self._drawn_at - begin


def draw(columns: dict[str, tuple[float, ...]], other: str) -> Figure:
    """Panels over the epochs: loss terms; Dice; agreement, confidence and ramp-up; foreground; distance of features.

    Args:
        columns: those of losses.csv, by name.
        other: name of the network that makes the pseudo labels.
    """
    epochs = columns["epoch"]
    dice = {name: values for name, values in columns.items() if name.startswith("dice_")}
    terms = {name: values for name, values in columns.items() if name not in ("epoch", *NAMES, *dice)}
    named = {name: (text.format(other=other), columns.get(name)) for name, text in NAMES.items()}
    panels = [
        ("loss terms, weighted", "loss", terms),
        (
            "networks on a few validation patches",
            "mean Dice",
            {name.removeprefix("dice_").replace("_", " "): values for name, values in dice.items()},
        ),
        ("pseudo labels on unlabeled patches", "0 to 1", _there(named, "agreement", "pseudo_confidence", "ramp")),
        ("foreground", "part of the voxels (%)", _there(named, "labeled_foreground", "pseudo_foreground", factor=100)),
        ("bottleneck features of the student", "1 - cosine", _there(named, "feature_distance")),
    ]
    figure = Figure(figsize=(16, 7.5))
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.07, top=0.95, wspace=0.18, hspace=0.3)
    *axes, spare = figure.subplots(2, 3).flat
    spare.remove()
    for axis, (title, label, lines) in zip(axes, panels, strict=True):
        _lines(axis, epochs, lines)
        axis.set(title=title, xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if label != "loss":
            axis.set_ylim(bottom=0)
    for axis in figure.axes[1:3]:
        axis.set_ylim(0, 1.02)
    return figure


def _there(named: dict, *names: str, factor: float = 1.0) -> dict[str, list[float]]:
    return {named[n][0]: [factor * value for value in named[n][1]] for n in names if named[n][1] is not None}


def _lines(axis: Axes, epochs: tuple[float, ...], lines: dict) -> None:
    looks = [(colour, dashes) for dashes in STYLES for colour in COLOURS]
    for (name, values), (colour, dashes) in zip(lines.items(), cycle(looks), strict=False):
        marker = "o" if np.isfinite(values).sum() == 1 else None  # a single epoch is no line
        axis.plot(epochs, values, color=colour, linestyle=dashes, marker=marker, markersize=3, label=name)
    if lines:
        axis.legend(frameon=False, fontsize="small")
