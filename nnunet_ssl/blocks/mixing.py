"""Masks that choose voxels, and the one function that mixes by them.

Convention, said once: mask 1 keeps the first image, mask 0 takes the second one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Mix(NamedTuple):
    """A call of `mix` and its result."""

    first: Tensor
    second: Tensor
    mask: Tensor
    result: Tensor


_recorders: list[list[Mix]] = []
MIN_CELL = 8  # voxels; thinner axes get fewer cells, so that a cell still shows the network some anatomy


def grid_shape(patch: Sequence[int], cells: int) -> tuple[int, ...]:
    """Cells per axis of a block grid: `cells` where every cell keeps at least MIN_CELL voxels, else fewer (>= 1)."""
    return tuple(max(1, min(cells, size // MIN_CELL)) for size in patch)


def block_mask(
    batch_size: int,
    patch: Sequence[int],
    *,
    cells: int = 4,
    ratio: float = 0.5,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random block masks, one per sample, in which a fixed number of the grid's cells is 0.

    Source: M3HL, section 2.2 (4 x 4 x 4 blocks of 28 x 28 x 20 voxels on a patch of 112 x 112 x 80, half of them 0).
    The grid is defined by count, so that every patch size works: cell edges are rounded, thin axes have fewer cells.

    Args:
        batch_size: number of masks; 0 gives an empty tensor.
        patch: spatial shape in voxels, two or three axes.
        cells: cells per axis.
        ratio: part of the cells that is 0, in [0, 1]; rounded to whole cells, at least one cell of each value
            remains where the grid has two or more.
        device: where the masks are made (no copy from the host).
        generator: source of randomness on `device`; default is torch's global one.

    Returns:
        Bool tensor of shape (batch_size, 1, *patch).

    Raises:
        ValueError: ratio outside [0, 1], or cells < 1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"The mask ratio must lie in [0, 1], it is {ratio}.")
    if cells < 1:
        raise ValueError(f"A block mask needs at least one cell per axis, not {cells}.")
    grid = grid_shape(patch, cells)
    total = prod(grid)
    zeros = round(ratio * total)
    if total > 1 and 0 < ratio < 1:
        zeros = min(max(zeros, 1), total - 1)
    # the rank of independent uniform numbers is a uniformly random permutation, for all samples at once
    noise = torch.rand((batch_size, total), device=device, generator=generator)
    mask = (noise.argsort(1).argsort(1) >= zeros).view(batch_size, 1, *grid)
    for axis, (size, count) in enumerate(zip(patch, grid, strict=True), start=2):
        mask = mask.index_select(axis, _cell_of_voxel(size, count, mask.device))
    return mask


@cache  # a tensor made from a list is a copy from the host, which the training step should not wait for
def _cell_of_voxel(size: int, count: int, device: torch.device) -> Tensor:
    """Index of the cell that each of `size` voxels lies in, edges at round(i * size / count)."""
    edges = torch.tensor([round(i * size / count) for i in range(1, count)], device=device, dtype=torch.long)
    return torch.bucketize(torch.arange(size, device=device), edges, right=True)


def box_mask(
    batch_size: int,
    patch: Sequence[int],
    *,
    side: float = 0.5,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks that are 0 in a box at a random place, one per sample, and 1 around it.

    Every place at which the box lies inside the patch is as probable as the others. Source: CutMix in BCP (side 2/3)
    and co-learning (side 0.5), where the released code of BCP shares one mask in a batch.

    Args:
        batch_size: number of masks; 0 gives an empty tensor.
        patch: spatial shape in voxels, two or three axes.
        side: edge of the box as a part of the patch's, in (0, 1]; rounded to whole voxels, at least one. Half of every
            edge is an eighth of the volume in 3D.
        device: where the masks are made (no copy from the host).
        generator: source of randomness on `device`; default is torch's global one.

    Returns:
        Bool tensor of shape (batch_size, 1, *patch).

    Raises:
        ValueError: side outside (0, 1].
    """
    if not 0 < side <= 1:
        raise ValueError(f"The side of the box must lie in (0, 1], it is {side}.")
    inside = torch.ones((batch_size, 1, *[1] * len(patch)), dtype=torch.bool, device=device)
    for axis, size in enumerate(patch, start=2):
        edge = max(1, round(side * size))
        # rand, not randint, which would take one range for all axes; rounding may give 1.0 in low precision
        start = torch.rand(batch_size, device=device, generator=generator, dtype=torch.float32)
        start = (start * (size - edge + 1)).long().clamp_max(size - edge).view(-1, 1)
        place = torch.arange(size, device=device)
        along = (place >= start) & (place < start + edge)
        inside = inside & along.view(batch_size, *[size if i == axis else 1 for i in range(1, len(patch) + 2)])
    return ~inside


def random_order(
    batch_size: int, patch: Sequence[int], *, cells: int = 4, device: torch.device | str = "cpu"
) -> Tensor:
    """Random orders of the cells of two images, one per sample: (batch_size, twice the number of cells), int64."""
    total = 2 * prod(grid_shape(patch, cells))
    return torch.rand((batch_size, total), device=device).argsort(1)


def shuffle_cells(first: Tensor, second: Tensor, order: Tensor, *, cells: int = 4) -> tuple[Tensor, Tensor]:
    """Distributes the cells of two images over both, at other places: cell i of the result is cell order[i] of both.

    `order.argsort(1)` undoes it. The cells are equal; what remains of an axis at its end stays where it is. The same
    order shuffles images and targets, so that they agree (PSC).

    Args:
        first: (B, C, *spatial).
        second: the same shape; its cells are counted on from those of the first one.
        order: from `random_order`.
        cells: cells per axis, as for `block_mask`.

    Returns:
        Two new tensors of that shape.

    Raises: RuntimeError where the shapes differ.
    """
    images = torch.stack([first, second], 1)  # (B, 2, C, *spatial)
    covered = images[_covered(first.shape[2:], cells)]
    axes = first.ndim - 2
    divided = _in_cells(covered, axes, cells)  # every axis as cells and voxels of a cell; then all cells in front
    forward = [0, 1, *range(3, 3 + 2 * axes, 2), 2, *range(4, 4 + 2 * axes, 2)]
    divided = divided.permute(forward)
    samples = torch.arange(len(order), device=order.device)[:, None]
    shuffled = divided.flatten(1, 1 + axes)[samples, order].view(divided.shape)
    result = images.clone()
    result[_covered(first.shape[2:], cells)] = shuffled.permute(*_inverse(forward)).reshape(covered.shape)
    return result[:, 0], result[:, 1]


def cell_means(x: Tensor, *, cells: int = 4) -> Tensor:
    """Mean of every cell that `shuffle_cells` moves, in its order: (B, C, *spatial) to (B, C, number of cells)."""
    axes = x.ndim - 2
    divided = _in_cells(x[_covered(x.shape[2:], cells)], axes, cells)
    return divided.mean([*range(3, 3 + 2 * axes, 2)]).flatten(2)


def _covered(patch: Sequence[int], cells: int) -> tuple:
    """Index of what equal cells cover of an image (..., *patch): all but what remains of an axis at its end."""
    return (..., *(slice(size // count * count) for size, count in zip(patch, grid_shape(patch, cells), strict=True)))


def _in_cells(covered: Tensor, axes: int, cells: int) -> Tensor:
    """The last `axes` axes of an image that cells cover, each as two: the cells, and the voxels of a cell."""
    grid, first = grid_shape(covered.shape[-axes:], cells), covered.ndim - axes
    for axis in reversed(range(axes)):
        covered = covered.unflatten(first + axis, (grid[axis], -1))
    return covered


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)


def mix(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Takes each voxel from `first` where the mask is 1 and from `second` where it is 0.

    The same call mixes images (B, C, *spatial), targets (B, 1, *spatial) and weight maps, so that they agree.

    Raises:
        ValueError: the shapes of first and second differ (broadcasting would hide a mistake).
    """
    if first.shape != second.shape:
        raise ValueError(f"Only tensors of the same shape can be mixed, got {first.shape} and {second.shape}.")
    result = torch.where(mask.bool(), first, second)
    for recorder in _recorders:
        recorder.append(Mix(first, second, mask, result))
    return result


@contextmanager
def recorded() -> Iterator[list[Mix]]:
    """Collects every call of `mix` inside the block: shows what a method really mixes, whatever it is."""
    recorder: list[Mix] = []
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def halves(x: Tensor) -> Tensor:
    """The first and the second half of a batch, one after the other: (B, ...) to (B or B + 1, ...).

    Both halves have ceil(B / 2) samples, so with an odd B the middle sample is in both of them.
    """
    odd = len(x) % 2
    return torch.cat([x[: len(x) // 2 + 1], x[len(x) // 2 :]]) if odd else x


def mix_halves(
    labeled: Tensor, labels: Tensor, unlabeled: Tensor, pseudo: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Mixes every labeled image of a batch with the unlabeled one at its place, by a mask of its own.

    Args:
        labeled: images (B, C, *spatial).
        labels: as nnU-Net gives them, (B, 1, *spatial), or the channels of regions.
        unlabeled: images (B, C, *spatial).
        pseudo: their pseudo labels, in the same form.
        mask: bool, 1 keeps the labeled image: (B, 1, *spatial), B + 1 masks where B is odd (see `halves`).

    Returns:
        Mixed images and mixed labels, as many as masks.
    """
    image = mix(halves(labeled), halves(unlabeled), mask)
    target = mix(halves(labels), halves(pseudo).to(labels.dtype), mask)
    return image, target
