import math

import pytest
import torch

from nnunet_ssl.pseudo_labels import entropy, hard_labels, keep_largest_component, one_hot

SHAPES = [(9, 10), (9, 10, 11)]


def labels_with(shape, boxes, dtype=torch.int16):
    """One sample (1, 1, *shape): every (value, start, stop) fills the same range along each axis."""
    labels = torch.zeros(1, 1, *shape, dtype=dtype)
    for value, start, stop in boxes:
        labels[(..., *[slice(start, stop)] * len(shape))] = value
    return labels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hard_labels_are_the_most_probable_classes_without_gradient(shape, dtype):
    expected = torch.randint(0, 4, (2, 1, *shape), generator=torch.Generator().manual_seed(0))
    logits = torch.full((2, 4, *shape), -1.0).scatter(1, expected, 1.0).to(dtype).requires_grad_()
    labels = hard_labels(logits)
    assert labels.dtype == torch.int16
    assert labels.shape == (2, 1, *shape)
    assert not labels.requires_grad
    assert torch.equal(labels, expected.to(torch.int16))


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_largest_component_is_kept(shape):
    labels = labels_with(shape, [(1, 0, 2), (1, 4, 8)])
    assert torch.equal(keep_largest_component(labels), labels_with(shape, [(1, 4, 8)]))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_class_keeps_its_own_largest_component(shape):
    # classes that touch do not merge, and the smaller of class 2 is larger than all of class 1
    labels = labels_with(shape, [(1, 0, 1), (2, 1, 3), (2, 4, 8), (1, 8, 9), (1, 5, 7), (5, 3, 4)])
    expected = labels_with(shape, [(2, 4, 8), (1, 5, 7), (5, 3, 4)])
    assert torch.equal(keep_largest_component(labels), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_voxels_that_touch_at_a_corner_are_connected(shape):
    labels = labels_with(shape, [(1, 0, 1), (1, 1, 2), (1, 2, 3), (1, 5, 6), (1, 6, 7)])
    assert torch.equal(keep_largest_component(labels), labels_with(shape, [(1, 0, 1), (1, 1, 2), (1, 2, 3)]))


@pytest.mark.parametrize("shape", SHAPES)
def test_background_and_single_components_stay_as_they_are(shape):
    empty = torch.zeros(2, 1, *shape, dtype=torch.int16)
    assert torch.equal(keep_largest_component(empty), empty)
    alone = labels_with(shape, [(1, 0, 3), (3, 4, 7)])
    assert torch.equal(keep_largest_component(alone), alone)
    everywhere = torch.ones(1, 1, *shape, dtype=torch.int16)
    assert torch.equal(keep_largest_component(everywhere), everywhere)


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_cleaned_one_by_one(shape):
    small, large = labels_with(shape, [(1, 0, 2)]), labels_with(shape, [(1, 4, 8), (2, 0, 1)])
    batch = torch.cat([small, large, torch.zeros_like(small), small + labels_with(shape, [(1, 5, 6)])])
    expected = torch.cat([small, large, torch.zeros_like(small), small])
    assert torch.equal(keep_largest_component(batch), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_dtype_is_kept_and_the_input_is_not_changed(dtype):
    labels = labels_with((9, 10, 11), [(1, 0, 2), (1, 4, 8)], dtype)
    before = labels.clone()
    cleaned = keep_largest_component(labels)
    assert cleaned.dtype == dtype
    assert torch.equal(labels, before)
    assert cleaned.data_ptr() != labels.data_ptr()


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)])
def test_one_hot_puts_the_label_on_the_class_axis(shape):
    labels = torch.randint(0, 4, (2, 1, *shape), dtype=torch.int16)
    encoded = one_hot(labels, 4)
    assert encoded.dtype == torch.float32
    assert encoded.shape == (2, 4, *shape)
    assert torch.equal(encoded.argmax(1, keepdim=True), labels.long())
    assert (encoded.sum(1) == 1).all()


def test_entropy_is_0_where_sure_and_ln_c_where_uniform():
    sure, uniform = torch.tensor([1.0, 0, 0]), torch.full((3,), 1 / 3)
    half = torch.tensor([0.5, 0.5, 0])
    probabilities = torch.stack([sure, uniform, half], 1).view(1, 3, 3, 1)
    expected = torch.tensor([0, math.log(3), math.log(2)]).view(1, 1, 3, 1)
    torch.testing.assert_close(entropy(probabilities), expected)
