"""Pictures of one scan with the outlines of several segmentations, small enough for hundreds on a page."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_ssl.commands.pictures import PREDICTION, REFERENCE, outline
from nnunet_ssl.commands.report.page import Key, as_uri
from nnunet_ssl.data.scans import unpacked

PLANES = ("axial", "coronal", "sagittal")
WIDTH, LEAST, MOST = 6.4, 2.4, 8.0  # inches of a picture, and of its height
DPI = 100
QUALITY = 80  # of JPEG, in percent
MARGIN = 0.25  # of the foreground's longest side, around it
LEAST_MARGIN = 0.08  # of the scan's longest side
NEARLY = 0.9  # of the largest area: slices that are as good, of which the middle one is shown
# colours that are seen on dark and on bright tissue, with lines that differ without colour
COLOURS = (REFERENCE, PREDICTION, "#F0E442", "#CC79A7", "#00C08B")
STYLES = ("solid", "dashed", "dotted", "dashdot")


class Volume(NamedTuple):
    """Voxels (slices, rows, columns) of the scan's first channel or of a label map.

    Attributes:
        voxels: in the order of a radiologist where it is known: from the feet, from the front, from the patient's
            right.
        spacing: of the axes.
        oriented: whether that order is known.
    """

    voxels: np.ndarray
    spacing: tuple[float, ...]
    oriented: bool


class View(NamedTuple):
    """One slice: what it is called, its axis and index, whether outlines are drawn."""

    name: str
    axis: int
    index: int
    outlines: bool = True


def keys_of(names: Sequence[str]) -> list[Key]:
    """A line for each of some segmentations, no two the same."""
    looks = [(COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]) for i in range(len(names))]
    return [Key(name, *look) for name, look in zip(names, looks, strict=True)]


def read_volume(file: Path, reader: type[BaseReaderWriter], ending: str, labels: bool = False) -> Volume:
    """The first channel of an image file, or of a folder of DICOM files, or a label file."""
    with unpacked(file, ending) as path:
        array, properties = reader().read_seg(str(path)) if labels else reader().read_images([str(path)])
    voxels, spacing = array[0], tuple(map(float, properties["spacing"]))
    if labels:
        voxels = voxels.astype(np.int16)
    known = properties.get("sitk_stuff", {})
    if voxels.shape[0] == 1 or len(known.get("direction", ())) != 9:
        return Volume(voxels, spacing, False)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(known["spacing"])
    image.SetDirection(known["direction"])
    image = sitk.DICOMOrient(image, "LPS")
    return Volume(sitk.GetArrayFromImage(image), tuple(reversed(image.GetSpacing())), True)


def draw_scan(image: Volume, maps: Sequence[np.ndarray], keys: Sequence[Key], window: tuple[float, float]) -> str:
    """Slices of a scan with the outlines of every label, as a data URI: JPEG of about 50 kB.

    Three planes through the largest foreground, and the slice on which the maps differ most; of a flat image itself and
    its outlines. Cut to the surroundings of all foreground.

    Args:
        image: the scan.
        maps: label maps of the same shape.
        keys: a line for each of them.
        window: values that are black and white.
    """
    box = surroundings(maps, image.spacing)
    values, cut = image.voxels[box], [labels[box] for labels in maps]
    views, begins = views_of(cut, image.oriented), [part.start for part in box]
    sides = [size * step for size, step in zip(values.shape, image.spacing, strict=True)]
    columns = [sides[2], sides[2]] if len(views) == 2 else [sides[2], max(sides[1], sides[2])]
    rows = [sides[1]] if len(views) == 2 else [sides[1], sides[0]]
    height = float(np.clip(WIDTH * sum(rows) / sum(columns), LEAST, MOST))
    figure = Figure(figsize=(WIDTH, height), facecolor="black")
    grid = {"width_ratios": columns, "height_ratios": rows, "wspace": 0.02, "hspace": 0.02 * WIDTH / height}
    grid |= {"left": 0, "right": 1, "bottom": 0, "top": 1}
    axes = figure.subplots(len(rows), 2, squeeze=False, gridspec_kw=grid).flat
    for axis, view in zip(axes, views, strict=True):
        flip = slice(None, None, -1 if image.oriented and view.axis > 0 else 1)  # the head is above
        step = [s for i, s in enumerate(image.spacing) if i != view.axis]
        shown = np.take(values, view.index, view.axis)[flip]
        axis.imshow(shown, cmap="gray", vmin=window[0], vmax=window[1], interpolation="bilinear")
        for labels, key in zip(cut, keys, strict=True) if view.outlines else ():
            plane = np.take(labels, view.index, view.axis)[flip]
            for value in np.unique(plane[plane > 0]):
                outline(axis, plane == value, key.colour, key.style)
        axis.set_aspect(step[0] / step[1])
        axis.set_axis_off()
        number = f" {begins[view.axis] + view.index + 1} of {image.voxels.shape[view.axis]}" if len(views) > 2 else ""
        _write(axis, 0.02, 0.97, f"{view.name}{number}", "left", "top")
        if image.oriented and view.axis != 2:
            _write(axis, 0.02, 0.5, "R", "left", "center")
    stream = BytesIO()
    options = {"quality": QUALITY, "optimize": True, "subsampling": 0}  # thin lines keep their colours
    figure.savefig(stream, format="jpeg", dpi=DPI, pil_kwargs=options)
    return as_uri(stream.getvalue(), "jpeg")


def _write(axis, x: float, y: float, text: str, horizontal: str, vertical: str) -> None:
    around = [withStroke(linewidth=2.5, foreground="black")]
    where = {"transform": axis.transAxes, "ha": horizontal, "va": vertical}
    axis.text(x, y, text, color="white", fontsize=15, path_effects=around, **where)


def views_of(maps: Sequence[np.ndarray], oriented: bool) -> list[View]:
    """The slices that `draw_scan` shows of label maps; the middle ones where there is no foreground."""
    foreground = np.any([labels > 0 for labels in maps], 0)
    widest = middle_of_largest(foreground.sum((1, 2)))
    # through the same place, so that the planes show one structure
    largest = [widest, *(middle_of_largest(foreground[widest].sum(1 - axis)) for axis in range(2))]
    if foreground.shape[0] == 1:
        return [View("image", 0, 0, False), View("outlines", 0, 0)]
    names = PLANES if oriented else [f"axis {axis + 1}, slice" for axis in range(3)]
    planes = [View(name, axis, index) for axis, (name, index) in enumerate(zip(names, largest, strict=True))]
    differing = np.any([labels != maps[0] for labels in maps[1:]], 0) if len(maps) > 1 else np.zeros(1, bool)
    if differing.any():
        second = View("most different", 0, int(differing.sum((1, 2)).argmax()))
    else:
        second = View("without lines", 0, largest[0], False)
    return [planes[0], second, *planes[1:]]


def middle_of_largest(areas: np.ndarray) -> int:
    """Index in the middle of the areas that are nearly the largest; of all, where there is no foreground."""
    found = np.flatnonzero(areas >= NEARLY * areas.max())
    return int(found[len(found) // 2])


def surroundings(maps: Sequence[np.ndarray], spacing: Sequence[float]) -> tuple[slice, ...]:
    """The box around all foreground of label maps with a margin; everything where there is none."""
    foreground = np.any([labels > 0 for labels in maps], 0)
    shape = foreground.shape
    if not foreground.any():
        return tuple(slice(0, size) for size in shape)
    found = [np.flatnonzero(foreground.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    flat = shape[0] == 1  # the thickness of its slice says nothing
    sides = [(f[-1] - f[0] + 1) * s for f, s in zip(found, spacing, strict=True)][int(flat) :]
    whole = [size * s for size, s in zip(shape, spacing, strict=True)][int(flat) :]
    margin = max(MARGIN * max(sides), LEAST_MARGIN * max(whole))
    around = [max(1, round(margin / s)) for s in spacing]
    return tuple(
        slice(max(0, int(f[0]) - a), min(size, int(f[-1]) + 1 + a))
        for f, a, size in zip(found, around, shape, strict=True)
    )


def window_of(voxels: np.ndarray, foreground: dict | None = None) -> tuple[float, float]:
    """The values that are shown black and white: 0.5th and 99.5th percentile of a scan's.

    Args:
        voxels: of the scan.
        foreground: nnU-Net's statistics of the labeled scans' foreground, where numbers have a meaning as in CT: its
            range, and half of it on both sides.
    """
    if foreground is not None:
        low, high = foreground["percentile_00_5"], foreground["percentile_99_5"]
        return low - (high - low) / 2, high + (high - low) / 2
    step = max(1, round((voxels.size / 2_000_000) ** (1 / 3)))
    low, high = np.percentile(voxels[:: step if voxels.shape[0] > 1 else 1, ::step, ::step], (0.5, 99.5))
    return float(low), float(max(high, low + 1e-8))
