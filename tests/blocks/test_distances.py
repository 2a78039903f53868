"""Signed distances against their definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from equations import distances_by_definition

from nnunet_ssl.blocks.distances import distance_mse, signed_distances


def everywhere(classes):
    return torch.ones_like(classes[:, :1])


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 2, 6, 5, 7), (1, 2, 1, 6, 7)])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_distances_are_those_of_the_definition(shape, ignored):
    generator = torch.Generator().manual_seed(0)
    blobs = F.avg_pool2d(torch.rand(shape, generator=generator).flatten(1, -3), 3, 1, 1).view(shape) > 0.5
    annotated = torch.rand((shape[0], 1, *shape[2:]), generator=generator) >= ignored
    found = signed_distances(blobs, annotated)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distances_by_definition(blobs, annotated))
    assert (found[~annotated.expand(shape)] == 0).all()
    assert (found[blobs] <= 0).all()
    assert (found[~blobs & annotated] > 0).all()
    assert (found.amin() == -1) & (found.amax() == 1)


def test_distances_of_a_square_are_those_worked_out_by_hand():
    square = torch.zeros(1, 1, 5, 6, dtype=torch.bool)
    square[..., 1:4, 1:4] = True
    far, near = math.sqrt(5) / math.sqrt(5), 1 / math.sqrt(5)
    corner, aside, wide = math.sqrt(2 / 5), 2 / math.sqrt(5), far
    expected = [
        [corner, near, near, near, corner, wide],
        [near, 0, 0, 0, near, aside],
        [near, 0, -1, 0, near, aside],
        [near, 0, 0, 0, near, aside],
        [corner, near, near, near, corner, wide],
    ]
    torch.testing.assert_close(signed_distances(square, everywhere(square)), torch.tensor(expected)[None, None])


def test_a_border_to_ignored_voxels_is_no_boundary():
    # a row of background, foreground, ignored: foreground gets deeper up to what is ignored
    row = torch.tensor([0, 0, 1, 1, 1, 0, 0]).bool().view(1, 1, 1, 7)
    annotated = torch.tensor([1, 1, 1, 1, 1, 0, 0]).bool().view(1, 1, 1, 7)
    expected = torch.tensor([1, 0.5, 0, -2 / 3, -1, 0, 0]).view(1, 1, 1, 7)
    torch.testing.assert_close(signed_distances(row, annotated), expected)


def test_without_a_boundary_distances_are_zero():
    classes = torch.zeros(1, 4, 4, 4, 4, dtype=torch.bool)
    classes[:, 1] = True  # the patch is full of it
    classes[:, 2, 0] = True  # nothing of it is annotated
    classes[:, 3, 1:] = True  # nothing but it is annotated
    annotated = everywhere(classes)
    annotated[:, :, 0] = False
    assert (signed_distances(classes, annotated) == 0).all()
    assert (signed_distances(classes, torch.zeros_like(annotated)) == 0).all()


def test_the_error_counts_annotated_voxels_of_classes_with_a_boundary():
    target = torch.zeros(2, 2, 1, 4)
    target[0, 0, 0], target[1, 1, 0] = torch.tensor([-1.0, 0, 0.5, 1]), torch.tensor([1.0, 0.5, 0, -1])
    annotated = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    annotated[1, 0, 0, 3] = False
    said = (target + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)).requires_grad_()
    loss = distance_mse(said, target, annotated)
    assert loss.item() == pytest.approx((4 * 0.01 + 3 * 0.04) / 7)
    loss.backward()
    assert ((said.grad != 0) == (annotated & (target != 0).any(3, keepdim=True))).all()
    assert distance_mse(said, target, torch.zeros_like(annotated)) == 0
    assert distance_mse(said, torch.zeros_like(target), annotated) == 0
