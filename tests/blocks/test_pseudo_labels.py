import math

import pytest
import torch

from nnunet_ssl.blocks.pseudo_labels import (
    as_probabilities,
    confidence,
    hard_labels,
    keep_largest_component,
    probabilities,
    sharpen,
    uncertainty,
)

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
def test_regions_are_labeled_where_more_probable_than_not(shape):
    logits = torch.randn(2, 3, *shape, requires_grad=True)
    labels = hard_labels(logits, regions=True)
    assert torch.equal(labels == 1, logits.sigmoid() > 0.5)
    assert not labels.requires_grad
    with_ignore = hard_labels(logits, regions=True, ignore_channel=True)
    assert torch.equal(with_ignore[:, :3], labels)
    assert with_ignore.shape[1] == 4
    assert not with_ignore[:, 3].any()  # nothing is ignored


def test_probabilities_are_the_softmax_of_classes_and_the_sigmoid_of_regions():
    logits = torch.tensor([0.0, math.log(3)], dtype=torch.bfloat16).view(1, 2, 1, 1)
    logits32 = logits.float()
    for regions, expected in ((False, [1 / 4, 3 / 4]), (True, [1 / 2, 3 / 4])):
        values = probabilities(logits, regions=regions)
        assert values.dtype == torch.float32
        assert torch.equal(values, probabilities(logits32, regions=regions))  # nothing is rounded on the way
        assert values.flatten().tolist() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)])
@pytest.mark.parametrize("ignore_label", [None, 4])
def test_labels_as_probabilities_have_a_one_at_their_class(shape, ignore_label):
    labels = torch.randint(0, 4 if ignore_label is None else 5, (2, 1, *shape), dtype=torch.int16)
    encoded, annotated = as_probabilities(labels, 4, ignore_label=ignore_label)
    assert encoded.dtype == torch.float32
    assert encoded.shape == (2, 4, *shape)
    assert (encoded.sum(1) == 1).all()
    assert torch.equal(annotated, labels < 4)
    assert torch.equal(encoded.argmax(1, keepdim=True)[annotated], labels.long()[annotated])


def test_regions_as_probabilities_leave_the_channel_of_ignored_voxels_out():
    labels = torch.rand(2, 4, 5, 6) > 0.5
    encoded, annotated = as_probabilities(labels, 3, regions=True, ignore_label=7)
    assert torch.equal(encoded, labels[:, :3].float())
    assert torch.equal(annotated, ~labels[:, 3:])
    encoded, annotated = as_probabilities(labels, 4, regions=True)
    assert torch.equal(encoded, labels.float())
    assert annotated.shape == (2, 1, 5, 6)
    assert annotated.all()


def test_uncertainty_is_0_where_sure_and_1_where_every_class_is_as_probable():
    sure, uniform = torch.tensor([1.0, 0, 0]), torch.full((3,), 1 / 3)
    half = torch.tensor([0.5, 0.5, 0])
    stacked = torch.stack([sure, uniform, half], 1).view(1, 3, 3, 1)
    expected = torch.tensor([0, 1, math.log(2) / math.log(3)]).view(1, 1, 3, 1)
    torch.testing.assert_close(uncertainty(stacked), expected)


def test_uncertainty_of_regions_is_the_mean_over_the_regions():
    stacked = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.5, 1.0]]).view(1, 2, 3, 1)
    torch.testing.assert_close(uncertainty(stacked, regions=True), torch.tensor([0, 1, 0.5]).view(1, 1, 3, 1))


def test_every_region_keeps_its_own_largest_component():
    labels = torch.zeros(1, 2, 9, 9, dtype=torch.int16)
    labels[0, 0, 1:4, 1:4] = labels[0, 0, 6, 6] = 1
    labels[0, 1, 1, 1] = labels[0, 1, 6:8, 6:8] = 1
    cleaned = keep_largest_component(labels)
    labels[0, 0, 6, 6] = labels[0, 1, 1, 1] = 0
    assert torch.equal(cleaned, labels)


def test_confidence_is_that_of_the_hard_label():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.45, 0.45]]).T[None]  # (1, 3 channels, 2 voxels)
    torch.testing.assert_close(confidence(p), torch.tensor([[[0.7, 0.45]]]))
    torch.testing.assert_close(confidence(p, regions=True), torch.tensor([[[0.7, 0.55]]]))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_sharpening_follows_its_formula(temperature):
    p = torch.linspace(0, 1, 21)
    expected = [x ** (1 / temperature) / (x ** (1 / temperature) + (1 - x) ** (1 / temperature)) for x in p.tolist()]
    torch.testing.assert_close(sharpen(p, temperature), torch.tensor(expected), rtol=1e-4, atol=2e-6)
