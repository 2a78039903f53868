"""Signed distances to the boundary of a class."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def signed_distances(classes: Tensor, annotated: Tensor) -> Tensor:
    """Distance of every voxel to the boundary of every class, in the released form of SASSNet and DTC.

    Negative inside, positive outside, and 0 on the voxels of the class that touch others. Each side is divided by its
    largest value in the patch. Distances are in voxels, whatever their size in mm.

    Args:
        classes: (B, K, *spatial) bool on the CPU, the voxels of every class or region.
        annotated: (B, 1, *spatial) bool. What is not annotated is neither inside nor outside: it makes no boundary, and
            its own value is 0.

    Returns:
        (B, K, *spatial) float32 in [-1, 1]. A class that is absent, or everywhere in the patch, has zeros.
    """
    inside, outside = (x.numpy() for x in (classes & annotated, ~classes & annotated))
    found = np.zeros(inside.shape, np.float32)
    for index in np.ndindex(inside.shape[:2]):
        if inside[index].any() and outside[index].any():
            found[index] = _signed_distance(inside[index], outside[index])
    return torch.from_numpy(found)


def _signed_distance(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    depth, height = _distance(~outside) * inside, _distance(~inside) * outside
    at_boundary = depth == 1
    return height / height.max() - np.where(at_boundary, 0, depth / depth.max())


def _distance(mask: np.ndarray) -> np.ndarray:
    """Distance of the voxels of a mask to the nearest other one, float32; 0 outside of it.

    Only the mask's box with one more voxel around it is searched: nothing nearer is beyond.
    """
    distance = np.zeros(mask.shape, np.float32)
    (box,) = ndimage.find_objects(mask.view(np.int8))
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
    distance[box] = ndimage.distance_transform_edt(mask[box])
    return distance


def distance_mse(distances: Tensor, target: Tensor, annotated: Tensor) -> Tensor:
    """Mean squared difference over the annotated voxels of the classes that have a boundary in the patch.

    A class without one has zeros for a target, which would say that every voxel is on it.

    Args:
        distances: predicted, (B, K, *spatial), float32.
        target: of `signed_distances`, same shape; no gradient.
        annotated: (B, 1, *spatial), 1 or True where the voxel counts.

    Returns:
        Scalar in [0, 4]; 0 where nothing counts.
    """
    known = target.flatten(2).abs().amax(2) > 0
    counts = (annotated.bool() & known.view(*known.shape, *[1] * (target.ndim - 2))).float()
    return ((distances - target).square() * counts).sum() / counts.sum().clamp_min(1)
