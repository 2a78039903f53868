"""Pictures of segmentations."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure

from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.wording import counted

# two of the colours, and lines that differ without colour
REFERENCE, PREDICTION = "#E69F00", "#56B4E9"


def compare_segmentations(
    images: Sequence[Path], references: Sequence[Path], predictions: dict[str, Sequence[Path]], output: Path
) -> None:
    """Writes a picture: a row per scan, a column for the image and one per model, reference and prediction as outlines.

    Every row shows the slice with the largest part of the reference, and the Dice of the whole scan.

    Args:
        images: files of the scans, one channel each.
        references: label files of the same scans, everything above 0 counts.
        predictions: name of a model to its label files.
        output: PNG file; replaced in one step.
    """
    rows, columns = len(images), 1 + len(predictions)
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (image_file, reference_file) in enumerate(zip(images, references, strict=True)):
        image, reference = read(image_file), read(reference_file) > 0
        chosen = int(reference.sum((1, 2)).argmax())
        columns_of_row = {"scan and reference": reference} | {n: read(f[row]) > 0 for n, f in predictions.items()}
        for axis, (name, mask) in zip(axes[row], columns_of_row.items(), strict=True):
            axis.imshow(image[chosen], cmap="gray", interpolation="nearest")
            outline(axis, reference[chosen], REFERENCE, "solid")
            if mask is not reference:
                outline(axis, mask[chosen], PREDICTION, "dashed")
                overlap = 200 * (mask & reference).sum() / max(1, mask.sum() + reference.sum())
                axis.set_xlabel(f"Dice of the scan {overlap:.0f} %")
            axis.set(xticks=[], yticks=[], title=name if row == 0 else "")
        axes[row][0].set_ylabel(image_file.name.partition(".")[0].removesuffix("_0000"))
    handles = [
        matplotlib.lines.Line2D([], [], color=REFERENCE, label="reference"),
        matplotlib.lines.Line2D([], [], color=PREDICTION, linestyle="dashed", label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def compare_cases(dice: dict[str, dict[str, float]], output: Path, models: int) -> None:
    """Writes a figure of the Dice of every case: a column per trainer, lines between the same case, boxes of quartiles.

    Args:
        dice: per trainer the Dice in [0, 1] of its cases, NaN where a case has none.
        output: PNG file; replaced in one step.
        models: of a trainer, as of several folds; the Dice of a case is the mean over them.
    """
    cases = sorted(set().union(*dice.values()))
    values = 100 * np.array([[of_trainer.get(case, np.nan) for case in cases] for of_trainer in dice.values()])
    figure = Figure(figsize=(max(5, min(1.8 + 1.7 * len(dice), 8)), 4.8), layout="constrained")
    axis = figure.subplots()
    places, ink = np.arange(len(dice)), matplotlib.rcParams["text.color"]  # black, or white on dark paper
    axis.plot(places, values, color="0.6", linewidth=0.7, alpha=0.7, zorder=1)
    boxes = axis.boxplot(
        [column[~np.isnan(column)] for column in values],
        positions=places,
        widths=0.42,
        whis=0,  # the dots show the others
        showcaps=False,
        showfliers=False,
        patch_artist=True,
        medianprops={"color": ink, "linewidth": 1.6},
        zorder=2,
    )
    for place, column in enumerate(values):
        colour = COLOURS[place % len(COLOURS)]
        boxes["boxes"][place].set(facecolor=colour, alpha=0.35)
        axis.scatter([place] * len(column), column, s=26, color=colour, edgecolor=ink, linewidth=0.5, zorder=3)
    many = len(dice) > 5
    # what all names begin with is said once, or where there is room for it on a line of its own
    names = [name.replace("nnUNetTrainer", "" if many else "nnUNetTrainer\n", 1).strip() or name for name in dice]
    axis.set_xticks(places, names, rotation=30 if many else 0, ha="right" if many else "center")
    xlabel = "trainer, without nnUNetTrainer at the beginning" if many else "trainer"
    ylabel = "Dice of a test case" + (f", mean of {models} models" if models > 1 else "") + " (%)"
    axis.set(xlim=(-0.5, len(dice) - 0.5), ylabel=ylabel, xlabel=xlabel)
    axis.grid(axis="y", color=ink, alpha=0.1)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    point = "a point is one of them" if len(dice) == 1 else "a line joins the points of one of them"
    number = counted(len(cases), "test case")
    axis.set_title(f"{number}; {point}\na box is the middle half, its bar the median", fontsize=10)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def outline(axis, mask: np.ndarray, colour: str, style: str, width: float = 1.6) -> None:
    """Draws the border of a mask (rows, columns) on its voxels, `width` points thick; nothing for an empty one."""
    if mask.any():
        axis.contour(mask.astype(float), levels=[0.5], colors=[colour], linestyles=[style], linewidths=width)


def read(file: Path) -> np.ndarray:
    """Voxels (slices, rows, columns) of a file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
