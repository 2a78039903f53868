"""Distances between the surfaces of two segmentations."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage


class SurfaceDistances(NamedTuple):
    """Of a prediction and a reference, in the unit of the spacing; NaN where one of them is empty.

    Attributes:
        hd95: 95th percentile of the distances of both directions together (95 % Hausdorff distance).
        asd: mean distance from the prediction's surface to the reference's, in this direction only.
        assd: mean of the distances of both directions together.
    """

    hd95: float
    asd: float
    assd: float


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """95 % Hausdorff and average surface distances of two masks.

    The surface is every voxel of the mask with a face neighbour outside of it; outside of the image counts as outside.
    These definitions are those of the tool that the literature on this topic uses.

    Args:
        prediction: bool, two or three axes.
        reference: bool, the same shape.
        spacing: size of a voxel along every axis of the arrays, in mm; ones give distances in voxels.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"Prediction and reference differ in shape: {prediction.shape} and {reference.shape}.")
    if not (prediction.any() and reference.any()):
        return SurfaceDistances(np.nan, np.nan, np.nan)
    # all surfaces and the way between them lie in the box around both masks
    box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
    surfaces = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (prediction, reference)]
    there, back = (
        ndimage.distance_transform_edt(~target, sampling=spacing)[source]
        for source, target in (surfaces, surfaces[::-1])
    )
    both = np.concatenate([there, back])
    return SurfaceDistances(float(np.percentile(both, 95)), float(there.mean()), float(both.mean()))
