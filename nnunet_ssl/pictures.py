"""Pictures of segmentations."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure

from nnunet_ssl.files import replacing

# colours that people with any colour vision tell apart (Okabe and Ito), and lines that differ without colour
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
                axis.set_xlabel(f"Dice {overlap:.0f} %")
            axis.set(xticks=[], yticks=[], title=name if row == 0 else "")
        axes[row][0].set_ylabel(image_file.name.partition(".")[0].removesuffix("_0000"))
    handles = [
        matplotlib.lines.Line2D([], [], color=REFERENCE, label="reference"),
        matplotlib.lines.Line2D([], [], color=PREDICTION, linestyle="dashed", label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def outline(axis, mask: np.ndarray, colour: str, style: str) -> None:
    """Draws the border of a mask (rows, columns) on its voxels; nothing for an empty one."""
    if mask.any():
        axis.contour(mask.astype(float), levels=[0.5], colors=[colour], linestyles=[style], linewidths=1.6)


def read(file: Path) -> np.ndarray:
    """Voxels (slices, rows, columns) of a file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
