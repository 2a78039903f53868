"""Whether a scan that can be read is plausible: its values, and its size in the planned spacing. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.data.dataset_json import channel_names

IMPLAUSIBLE = 7  # times the median size or a part of it: of a scan of usual size, a spacing that is ten times wrong
NARROW = 1e-6  # nnU-Net divides by the standard deviation, but by no less than 1e-8: less contrast than this is lost
HALF = float(np.finfo(np.float16).max)  # what mixed precision computes with
SINGLE = float(np.finfo(np.float32).max)  # what normalization computes with


@dataclass(frozen=True)
class Grid:
    """A configuration's spacing in mm, and its median image and patch in voxels, along the same 2 or 3 axes."""

    configuration: str
    spacing: tuple[float, ...]
    median_size: tuple[float, ...]
    patch_size: tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """What the scans of a dataset have to be like."""

    channels: tuple[str, ...]
    ending: str
    reader: type[BaseReaderWriter]
    normalization: tuple[str, ...] = ()  # nnU-Net's schemes by channel
    maxima: tuple[float, ...] = ()  # by channel, in the foreground of the labeled scans
    labels: frozenset[int] = frozenset()  # values of label maps
    transpose: tuple[int, ...] = (0, 1, 2)  # order of a scan's axes in the grids
    grids: tuple[Grid, ...] = ()


def expected_scans(
    plans: PlansManager, configurations: Mapping[str, ConfigurationManager], dataset_json: dict
) -> Expected:
    """What a dataset's plans and its dataset.json say about scans.

    Args:
        plans: of the dataset.
        configurations: by their names; what the scans are wanted for.
        dataset_json: of the dataset; without "labels" none are known.
    """
    channels = channel_names(dataset_json)
    statistics = plans.foreground_intensity_properties_per_channel
    values = [np.ravel(value) for value in dataset_json.get("labels", {}).values()]  # a region has several
    grids = [
        Grid(name, tuple(c.spacing), tuple(c.configuration.get("median_image_size_in_voxels", ())), tuple(c.patch_size))
        for name, c in configurations.items()
    ]
    return Expected(
        tuple(channels),
        dataset_json["file_ending"],
        plans.image_reader_writer_class,
        tuple(next(iter(configurations.values())).normalization_schemes),
        tuple(statistics.get(str(index), {}).get("max", np.inf) for index in range(len(channels))),
        frozenset(int(v) for value in values for v in value),
        tuple(plans.transpose_forward),
        tuple(grids),
    )


def value_doubt(channel: np.ndarray, index: int, expected: Expected) -> str | None:
    """What is implausible about the voxels of a channel; None where nothing is.

    Args:
        channel: finite voxels, at least one, in any shape.
        index: of the channel.
    """
    low, high = float(channel.min()), float(channel.max())
    largest = max(-low, high)
    if low == high:
        return f"constant, every voxel is {low:g}"
    if is_label_map(channel, low, high, expected.labels, expected.maxima[index : index + 1]):
        values = ", ".join(f"{value:g}" for value in np.unique(channel)[:5])
        return f"looks like a label map, every voxel is a label of dataset.json ({values})"
    if "NoNormalization" in expected.normalization[index : index + 1] and largest > HALF:
        return f"values up to {largest:g} are not normalized, and mixed precision (float16) ends at {HALF:g}"
    if largest > np.sqrt(SINGLE / channel.size):
        return f"values up to {largest:g} are too large to be normalized: the sum of their squares is infinite"
    if high - low < NARROW:
        return f"voxels differ by {high - low:g} at most, which normalization takes for a constant; use another unit"
    return None


def is_label_map(
    channel: np.ndarray, low: float, high: float, labels: frozenset[int], maximum: Sequence[float]
) -> bool:
    """Whether every voxel is one of the labels, though the labeled scans are brighter than that.

    A channel that is a mask by design has a maximum among the labels in the labeled scans too.

    Args:
        channel: voxels in any shape.
        low: their minimum; with the maximum `high` it settles nearly every case without a look at the voxels.
        labels: may be empty; then nothing is a label map.
        maximum: of the labeled scans, one number or none.
    """
    if not labels or low < 0 or high > max(labels) or any(value <= max(labels) for value in maximum):
        return False
    return bool(np.isin(channel, [float(label) for label in labels]).all())


def resampled_size(shape: Sequence[int], spacing: Sequence[float], transpose: Sequence[int], grid: Grid) -> np.ndarray:
    """Voxels of a scan in a grid, along the grid's axes, before nnU-Net crops it.

    Args:
        shape: of the scan, 3 axes, one of size 1 where it is an image of 2 dimensions.
        spacing: mm along these axes.
        transpose: their order in the grid; a grid of 2 axes leaves the first one as it is.
    """
    axes = list(transpose)[len(transpose) - len(grid.spacing) :]
    return compute_new_shape([shape[axis] for axis in axes], [spacing[axis] for axis in axes], grid.spacing)


def size_doubt(shape: Sequence[int], spacing: Sequence[float], expected: Expected) -> str | None:
    """Why the size of a scan in the planned spacing is implausible; None where it is not.

    Args: `shape` and `spacing` as for `resampled_size`; `expected` of the labeled scans.
    """
    for grid in expected.grids:
        size, median = resampled_size(shape, spacing, expected.transpose, grid), np.asarray(grid.median_size)
        if len(size) != len(median):
            continue  # plans without it
        factors = size / median
        more, fewer = factors.max(), 1 / max(factors.min(), 1e-9)
        if max(more, fewer) < IMPLAUSIBLE:
            continue
        factor = f"{more:.3g} times as many" if more > fewer else f"{fewer:.3g} times fewer"
        return (
            f"{size.tolist()} voxels in the spacing of {grid.configuration}, where the median of the labeled scans is "
            f"{[round(float(number)) for number in median]}: {factor} along an axis; correct its spacing, now "
            f"{np.round(spacing, 6).tolist()} mm"
        )
    return None


def smaller_than_patch(shape: Sequence[int], spacing: Sequence[float], expected: Expected) -> list[str]:
    """The configurations whose patch is larger than the scan along every axis; arguments as for `size_doubt`."""
    sizes = {grid: resampled_size(shape, spacing, expected.transpose, grid) for grid in expected.grids}
    return [grid.configuration for grid, size in sizes.items() if np.all(size < np.asarray(grid.patch_size))]
