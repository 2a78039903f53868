"""Curves of a training and the warnings in its log."""

import re

import numpy as np
from matplotlib.figure import Figure

from nnunet_ssl.commands.report.page import Picture, Table, as_png, in_both_looks
from nnunet_ssl.commands.report.training import Training
from nnunet_ssl.training.history import History, Panel, draw_panel, name_epochs, panels
from nnunet_ssl.training.observations import pseudo_labeler

# what to look for in a panel, by its title
ADVICE = {
    "training and validation loss": "Both should fall and level off. A validation loss that rises again while "
    "the other one falls means that the labeled scans are learned by heart.",
    "Dice on validation patches": "Of the deployed network. It should rise and level off; a dip where the second "
    "phase begins is usual.",
    "loss terms, weighted": "No term should grow without end, or have gaps: these are values that are not finite. A "
    "jump where the method begins is a change of what is summed.",
    "networks on a few validation patches": "A teacher should be as good as the students, or better. One that stays "
    "below holds them back.",
    "pseudo labels on unlabeled patches": "Agreement should rise. A confidence near 1 while the Dice falls means that "
    "the networks confirm their own mistakes.",
    "foreground": "Both lines should be about as high. Pseudo labels that fall to 0 are the usual way in which "
    "self-training fails.",
    "bottleneck features of the student": "It should not fall to 0: then all patches look the same to the network.",
}
BRIGHTER = {"#0072B2": "#4AA8E0", "#009E73": "#2CC79A", "#D55E00": "#FF8A3C", "0.4": "0.7"}  # on dark paper


def curves(training: Training) -> list[Picture]:
    """A picture for every panel: nnU-Net's loss and Dice, and what semi-supervised trainings note beside them."""
    logged = {name: training.logging.get(name, []) for name in ("train_losses", "val_losses", "mean_fg_dice")}
    epochs = np.arange(min(map(len, logged.values())))
    of_nnunet = [
        Panel(
            "training and validation loss",
            "loss",
            {"training": logged["train_losses"], "validation": logged["val_losses"]},
        ),
        Panel("Dice on validation patches", "mean Dice", {"an epoch": logged["mean_fg_dice"]}),
    ]
    smooth = training.logging.get("ema_fg_dice", [])
    of_nnunet[1].lines.update({"moving average": smooth} if len(smooth) >= len(epochs) else {})
    # a training that was killed has logged a part of its last epoch
    cut = [Panel(*p[:2], {name: values[: len(epochs)] for name, values in p.lines.items()}) for p in of_nnunet]
    found = [draw_curves(panel, epochs, training.supervised_epochs) for panel in cut] if len(epochs) else []
    columns = History(training.folder).columns()
    if not columns:
        return found
    labeler = pseudo_labeler(dict.fromkeys(training.networks)) if training.networks else "teacher"
    own, epochs = panels(columns, labeler.replace("_", " ")), np.array(columns["epoch"])
    # a supervised phase alone has one term, which nnU-Net's log has too
    own = [panel for panel in own if not (found and list(panel.lines) == ["loss"])]
    return found + [draw_curves(panel, epochs, training.supervised_epochs) for panel in own]


def draw_curves(panel: Panel, epochs: np.ndarray, boundary: int) -> Picture:
    """A panel as a picture of its own, narrow enough for a phone."""
    boundary = boundary if boundary <= epochs.max() else 0

    def draw(look: str) -> str:
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axis = figure.subplots()
        draw_panel(axis, epochs, panel, boundary, named=False)
        name_epochs(axis, epochs)
        axis.set_title("", loc="left")  # it is text of the page
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.5", alpha=0.3, linewidth=0.7)
        for line in axis.lines:
            line.set_color(BRIGHTER.get(line.get_color(), line.get_color()) if look == "dark" else line.get_color())
        long = max(map(len, panel.lines)) > 14
        figure.legend(loc="outside lower center", ncols=1 if long else 3, frameon=False, fontsize=9)
        return as_png(figure, dpi=180)

    light, dark = in_both_looks(draw)
    ends = [f"{name} {last(values)}" for name, values in panel.lines.items()]
    alt = f"Curves over {len(epochs)} epochs, {panel.title}. At the end: {', '.join(ends)}."
    return Picture(light, alt, ADVICE[panel.title], panel.title[0].upper() + panel.title[1:], dark)


def last(values) -> str:
    """The last finite one of some values, as text."""
    finite = np.array(values, dtype=float)[np.isfinite(np.array(values, dtype=float))]
    return f"{finite[-1]:.3g}" if len(finite) else "undefined"


def warnings_of(training: Training) -> Table:
    """The warnings in the logs: those that differ in numbers only are one."""
    found: dict[str, tuple[str, list[str]]] = {}
    for file in sorted(training.folder.glob("training_log_*.txt")):
        epoch = "before the first epoch"
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if begins := re.search(r": Epoch (\d+) *$", line):
                    epoch = begins[1]
                if "WARNING: " in line:
                    text = line.partition("WARNING: ")[2].strip()
                    found.setdefault(re.sub(r"\d+(\.\d+)?", "0", text), (text, []))[1].append(epoch)
    for note in training.notes:
        found[note] = (note.removeprefix("WARNING: "), ["for this page"])
    rows = [(text, when(epochs), str(len(epochs))) for text, epochs in found.values()]
    return Table(("warning (the first of its kind)", "epochs", "times"), rows)


def when(epochs: list[str]) -> str:
    """First and last of the epochs."""
    first, end = epochs[0], epochs[-1]
    return first if first == end else f"{first} to {end}"
