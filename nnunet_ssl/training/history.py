"""The table and the picture of a training: loss terms and observations, epoch by epoch."""

import csv
import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.files import replacing

STYLES = ("solid", "dashed", "dotted", "dashdot", (0, (6, 1, 1, 1, 1, 1)))
# colour and dashes of a line, no pair twice; neighbours differ in both, so that one line on top of another is seen
LOOKS = tuple((COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]) for i in range(len(COLOURS) * len(STYLES)))
NAMES = {  # column of the table to its name in the picture
    "ramp": "weight of the ramp-up",
    "agreement": "Dice of {other} and student",
    "pseudo_confidence": "confidence of {other}'s foreground",
    "labeled_foreground": "labels",
    "pseudo_foreground": "labels by {other}",
    "feature_distance": "between different patches",
}
DRAWING_SHARE = 0.005  # of the training time, at most


def number(cell: str) -> float:
    """Of a cell of the table; NaN where it is empty."""
    return float(cell or "nan")


class Panel(NamedTuple):
    """Lines over the epochs, by their names, with what they are together and the name of their axis."""

    title: str
    label: str
    lines: dict[str, Sequence[float]]


def time_left(epochs: int, seconds: float, supervised_phase: bool = False) -> str:
    """How many epochs (of the supervised phase) are left and when they are done, where one takes so many seconds."""
    finish = datetime.now() + epochs * timedelta(seconds=seconds)
    return f"{epochs} {'supervised ' * supervised_phase}epochs left, until about {finish:%Y-%m-%d %H:%M}"


class History:
    """losses.csv and semi_supervised.png in the folder of a fold.

    Args:
        folder: of the fold.
        other: name of the network that makes the pseudo labels.
        boundary: first epoch of the semi-supervised phase; 0 where there is no other one.
    """

    def __init__(self, folder: Path, other: str = "teacher", boundary: int = 0):
        self.table, self.picture, self.other = folder / "losses.csv", folder / "semi_supervised.png", other
        self.boundary = boundary
        self._drawn_at, self._drawing_seconds = float("-inf"), 0.0

    def begin(self, epoch: int, log: Callable[[str], object] = print) -> None:
        """Removes what a training that was killed has left half-written, and later rows than this epoch's.

        A table that cannot be read is put aside, and that is told.
        """
        for leftover in self.table.parent.glob(".*.tmp"):  # of a checkpoint or a picture
            leftover.unlink()
        try:
            self.trim(epoch)
        except ValueError as error:
            aside = self.table.with_suffix(".damaged.csv")
            os.replace(self.table, aside)
            log(f"WARNING: {error} It is {aside.name} now, and another one is begun.")

    def trim(self, epoch: int) -> None:
        """Drops rows of epochs that a resumed (or a new) training is going to write again: `epoch` and later ones."""
        header, rows = self.read()
        if kept := [row for row in rows if int(row[0]) < epoch]:
            self.write(header, kept)
        else:
            self.table.unlink(missing_ok=True)

    def record(self, epoch: int, losses: dict, observations: dict, loggers: Iterable, last: bool) -> None:
        """Adds an epoch to the table, the picture and nnU-Net's loggers, as Weights & Biases.

        Args:
            epoch, losses, observations: see `append`.
            loggers: nnU-Net's, beside its own.
            last: this is the last epoch: the picture is drawn in any case.
        """
        observations = {name: float(value) for name, value in observations.items()}
        for logger in loggers:
            for group, values in (("losses", losses), ("semi_supervised", observations)):
                for name, value in values.items():
                    logger.log(f"{group}/{name}", value, epoch)
        self.append(epoch, losses, observations)
        self.draw(last)

    def append(self, epoch: int, losses: dict[str, float], observations: dict[str, float]) -> None:
        """Adds a row: epoch, "loss", its terms, then the observations; columns that were not there become empty."""
        row = {"epoch": epoch, **losses, **observations}
        header, rows = self.read()
        columns = list(dict.fromkeys([*header, *row]))
        missing = [""] * (len(columns) - len(header))
        self.write(columns, [*([*values, *missing] for values in rows), [row.get(name, "") for name in columns]])

    def write(self, header: list[str], rows: list[list]) -> None:
        """Replaces the table."""
        with replacing(self.table) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([header, *rows])

    def read(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, without a line that was cut off; both empty where there is no table.

        Raises: ValueError that names the table where it is damaged.
        """
        if not self.table.is_file():
            return [], []
        try:
            with self.table.open(encoding="utf-8", newline="", errors="replace") as f:
                header, *rows = list(csv.reader(f)) or [[]]
            if header[:1] not in ([], ["epoch"]):
                raise ValueError(f"no column epoch, but {header[0][:40]}")
            rows = [row for row in rows if len(row) == len(header)]
            for epoch, *cells in rows:
                int(epoch), [*map(number, cells)]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{self.table} is damaged ({error}). Remove it; the training is not affected.") from error
        return header, rows

    def columns(self) -> dict[str, tuple[float, ...]]:
        """The columns of the table by name, NaN where a cell is empty; none where there is no table, or no row.

        Raises: ValueError that names the table where it is damaged.
        """
        header, rows = self.read()
        return {name: tuple(map(number, cells)) for name, cells in zip(header, zip(*rows, strict=True), strict=False)}

    def draw(self, last: bool = False) -> None:
        """Draws the picture, unless drawing would take more than DRAWING_SHARE of the time since the last one."""
        begin = time.perf_counter()
        if not last and begin - self._drawn_at < self._drawing_seconds / DRAWING_SHARE:
            return
        columns = self.columns()
        if not any(np.isfinite(values).any() for name, values in columns.items() if name != "epoch"):
            return
        # nnU-Net's progress.png leaves huge fonts behind
        with style.context("default"), replacing(self.picture) as temporary:
            draw(columns, self.other, self.boundary).savefig(temporary, format="png", dpi=100)
        self._drawn_at = time.perf_counter()
        self._drawing_seconds = self._drawn_at - begin


def draw(columns: dict[str, tuple[float, ...]], other: str, boundary: int = 0) -> Figure:
    """Panels over the epochs: loss terms; Dice; agreement, confidence and ramp-up; foreground; distance of features.

    Args:
        columns: those of losses.csv, by name; one without any finite number is left out, and so is a panel without any.
        other: name of the network that makes the pseudo labels.
        boundary: first epoch of the semi-supervised phase, marked by a line; 0: none.
    """
    found, epochs = panels(columns, other), np.array(columns["epoch"])
    figure = Figure(figsize=(11, 2.4 * len(found) + 0.6), layout="constrained")
    axes = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, found, strict=True):
        draw_panel(axis, epochs, panel, boundary, named=axis is axes[0])
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes
    name_epochs(axes[-1], epochs)
    return figure


def panels(columns: dict[str, tuple[float, ...]], other: str) -> list[Panel]:
    """What `draw` shows, see there."""
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    dice = {name: values for name, values in columns.items() if name.startswith("dice_")}
    terms = {name: values for name, values in columns.items() if name not in ("epoch", *NAMES, *dice)}
    named = {name: (text.format(other=other), columns.get(name)) for name, text in NAMES.items()}
    found = [
        Panel("loss terms, weighted", "loss", terms),
        Panel(
            "networks on a few validation patches",
            "mean Dice",
            {name.removeprefix("dice_").replace("_", " "): values for name, values in dice.items()},
        ),
        Panel("pseudo labels on unlabeled patches", "0 to 1", _there(named, "agreement", "pseudo_confidence", "ramp")),
        Panel(
            "foreground",
            "part of the voxels (%)",
            _there(named, "labeled_foreground", "pseudo_foreground", factor=100),
        ),
        Panel("bottleneck features of the student", "1 - cosine", _there(named, "feature_distance")),
    ]
    return [panel for panel in found if panel.lines]


def draw_panel(axis: Axes, epochs: np.ndarray, panel: Panel, boundary: int, named: bool) -> None:
    """Draws the lines of a panel, its title and the boundary of the phases, which has a name in the legend if wanted.

    Args:
        epochs: of the lines' values.
        boundary: first epoch of the semi-supervised phase; 0: none.
    """
    _lines(axis, epochs, panel.lines)
    axis.set_title(panel.title, loc="left")
    axis.set_ylabel(panel.label)
    if panel.label in ("mean Dice", "0 to 1"):
        axis.set_ylim(-0.03, 1.03)
    elif panel.label != "loss":
        axis.update_datalim([(epochs[0], 0.0)])  # with 0, and nothing on the border
        axis.autoscale_view()
    if boundary:
        text = f"semi-supervised phase\nfrom epoch {boundary}" if named else None
        axis.axvline(boundary - 0.5, color="0.4", linestyle="dotted", zorder=0, label=text)


def name_epochs(axis: Axes, epochs: np.ndarray) -> None:
    """The axis of the epochs, in whole numbers."""
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    margin = max(0.5, 0.02 * np.ptp(epochs))  # one epoch is a point in the middle
    axis.set_xlim(epochs.min() - margin, epochs.max() + margin)


def _there(named: dict, *names: str, factor: float = 1.0) -> dict[str, list[float]]:
    return {named[n][0]: [factor * value for value in named[n][1]] for n in names if named[n][1] is not None}


def _lines(axis: Axes, epochs: np.ndarray, lines: dict) -> None:
    for (name, values), (colour, dashes) in zip(lines.items(), cycle(LOOKS), strict=False):
        there = np.pad(np.isfinite(values), 1)
        alone = there[1:-1] & ~there[:-2] & ~there[2:]  # a single epoch is no line
        marker = "o" if alone.any() else None
        look = {"color": colour, "linestyle": dashes, "linewidth": 1.3}
        axis.plot(epochs, values, marker=marker, markevery=np.flatnonzero(alone), markersize=4, label=name, **look)
