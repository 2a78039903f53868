import itertools

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_ssl.blocks.losses import (
    cross_entropy,
    downsample,
    feature_cosine,
    feature_l1,
    full_resolution,
    kl_divergence,
    labeled_loss,
    masked_loss,
    masked_losses,
    probability_mse,
    reweighted,
    shrink,
    soft_dice_distance,
)
from nnunet_ssl.blocks.mixing import block_mask

WEIGHTS = np.array([2 / 3, 1 / 3, 0])  # nnU-Net's for three scales
SCALES = {2: [(1, 1), (0.5, 0.5), (0.25, 0.25)], 3: [(1, 1, 1), (1, 0.5, 0.5), (0.5, 0.25, 0.25)]}
PATCH = {2: (16, 24), 3: (8, 12, 16)}
CASES = [(dim, classes, batch_dice) for dim in (2, 3) for classes in (2, 4) for batch_dice in (True, False)]
SMOOTH = 1e-5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nnunet_loss(batch_dice=False, *, deep=False, **kwargs):
    """What nnUNetTrainer._build_loss makes for labels (not regions)."""
    dice = {"batch_dice": batch_dice, "smooth": SMOOTH, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss, **kwargs)
    return DeepSupervisionWrapper(loss, WEIGHTS) if deep else loss


def shapes(dim):
    return [tuple(round(size * s) for size, s in zip(PATCH[dim], scale, strict=True)) for scale in SCALES[dim]]


def random_logits(classes, dim, batch_size=3):
    return [torch.randn(batch_size, classes, *shape, requires_grad=True) for shape in shapes(dim)]


def random_target(classes, dim, batch_size=3):
    return torch.randint(0, classes, (batch_size, 1, *PATCH[dim]), dtype=torch.int16)


def random_mask(dim, batch_size=3):
    return torch.rand(batch_size, 1, *PATCH[dim]) < 0.4


def at_all_scales(target, dim):
    """Targets as the training transforms downsample them, sample by sample."""
    transform = DownsampleSegForDSTransform(SCALES[dim])
    samples = [transform(segmentation=sample)["segmentation"] for sample in target]
    return [torch.stack(scale) for scale in zip(*samples, strict=True)]


def by_hand(logits, target, mask, batch_dice, ce=1.0, dice=1.0):
    """Cross entropy minus Dice over the masked voxels, written out in numpy with double precision."""
    x = logits.detach().double().numpy()
    batch_size, classes = x.shape[:2]
    probability = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    label, counts = target[:, 0].numpy(), mask[:, 0].numpy().astype(bool)
    entropies, overlaps = [], []
    for sample in range(batch_size):
        for c in range(classes):
            entropies += list(-np.log(probability[sample, c][counts[sample] & (label[sample] == c)]))
    for group in [range(batch_size)] if batch_dice else [[sample] for sample in range(batch_size)]:
        for c in range(1, classes):
            both = sum(probability[s, c][counts[s] & (label[s] == c)].sum() for s in group)
            predicted = sum(probability[s, c][counts[s]].sum() for s in group)
            true = sum((counts[s] & (label[s] == c)).sum() for s in group)
            overlaps.append((2 * both + SMOOTH) / (predicted + true + SMOOTH))
    return ce * np.mean(entropies) - dice * np.mean(overlaps)


def gradients(loss, logits):
    return torch.autograd.grad(loss, logits, allow_unused=True)


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_a_full_mask_gives_nnunets_own_loss_and_gradient(dim, classes, batch_dice):
    loss = nnunet_loss(batch_dice)
    logits, target = random_logits(classes, dim)[0], random_target(classes, dim)
    expected, ours = loss(logits, target), masked_loss(loss, logits, target, torch.ones_like(target))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, [logits]), gradients(expected, [logits]))


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_a_full_mask_gives_nnunets_own_loss_and_gradient_with_deep_supervision(dim, classes, batch_dice):
    loss = nnunet_loss(batch_dice, deep=True)
    logits, target = random_logits(classes, dim), random_target(classes, dim)
    expected = loss(logits, at_all_scales(target, dim))
    ours = masked_loss(loss, logits, target, torch.ones_like(target))
    torch.testing.assert_close(ours, expected)
    *grads, unused = gradients(ours, logits)
    torch.testing.assert_close(grads, list(gradients(expected, logits)[:2]))
    assert unused is None  # weight 0


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3])
def test_the_loss_on_labeled_patches_is_nnunets_and_waits_for_no_count(deep, ignore_label, monkeypatch):
    loss = nnunet_loss(deep=deep, ignore_label=ignore_label)
    logits, target = random_logits(3, 3), random_target(3 if ignore_label is None else 4, 3)
    output, targets = (logits, at_all_scales(target, 3)) if deep else (logits[0], target)
    expected = loss(output, targets)
    grads = gradients(expected, logits)
    if ignore_label is not None:  # its forward is where the host waits
        monkeypatch.setattr(DC_and_CE_loss, "forward", None)
    ours = labeled_loss(loss, output, targets)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, logits), grads)


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2, 3])}])
def test_a_loss_that_cannot_be_masked_is_left_to_nnunet(settings):
    dice = {"batch_dice": False, "smooth": SMOOTH, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, settings, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)
    logits, target = random_logits(3, 3)[0], random_target(4, 3)
    assert torch.equal(labeled_loss(loss, logits, target), loss(logits, target))


@pytest.mark.parametrize("ignore_label", [False, True])
def test_the_loss_on_labeled_patches_with_regions_is_nnunets(ignore_label):
    dice = {"batch_dice": False, "smooth": SMOOTH, "do_bg": True, "ddp": False}
    loss = DC_and_BCE_loss({}, dice, use_ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)
    logits = random_logits(2, 3)[0]
    target = (torch.rand(3, 2 + ignore_label, *PATCH[3]) < 0.4).float()
    ours, expected = labeled_loss(loss, logits, target), loss(logits, target)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, [logits]), gradients(expected, [logits]))


@pytest.mark.parametrize("deep", [False, True])
def test_weights_of_the_two_terms_are_nnunets(deep):
    loss = nnunet_loss(deep=deep, weight_ce=0.3, weight_dice=2)
    logits, target = random_logits(4, 3), random_target(4, 3)
    full = torch.ones_like(target)
    if deep:
        torch.testing.assert_close(masked_loss(loss, logits, target, full), loss(logits, at_all_scales(target, 3)))
    else:
        torch.testing.assert_close(masked_loss(loss, logits[0], target, full), loss(logits[0], target))


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_a_mask_restricts_the_loss_to_its_voxels(dim, classes, batch_dice):
    logits, target, mask = random_logits(classes, dim)[0], random_target(classes, dim), random_mask(dim)
    loss = nnunet_loss(batch_dice, weight_ce=0.7, weight_dice=1.5)
    expected = by_hand(logits, target, mask, batch_dice, ce=0.7, dice=1.5)
    assert masked_loss(loss, logits, target, mask).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("deep", [False, True])
def test_a_mask_without_dice_has_the_cross_entropy_alone(deep):
    logits, target, mask = random_logits(4, 3), random_target(4, 3), random_mask(3)
    loss, output = nnunet_loss(deep=deep, weight_ce=0.7), logits if deep else logits[0]
    both, alone = masked_losses(loss, output, target, (mask, ~mask), dice=(True, False))
    assert torch.equal(both, masked_loss(loss, output, target, mask))
    expected = masked_loss(reweighted(loss, cross_entropy=0.7, dice=0), output, target, ~mask)
    torch.testing.assert_close(alone, expected)
    assert torch.equal(alone, masked_loss(loss, output, target, ~mask, dice=False))


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_a_mask_restricts_the_loss_at_every_scale(dim, classes, batch_dice):
    logits, target, mask = random_logits(classes, dim), random_target(classes, dim), random_mask(dim)
    targets, masks = at_all_scales(target, dim), at_all_scales(mask.to(torch.int16), dim)
    expected = sum(
        weight * by_hand(x, t, m, batch_dice)
        for weight, x, t, m in zip(WEIGHTS[:2], logits, targets, masks, strict=False)
    )
    loss = masked_loss(nnunet_loss(batch_dice, deep=True), logits, target, mask)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_a_mask_of_numbers_counts_like_the_boolean_one(dtype):
    logits, target, mask = random_logits(2, 3), random_target(2, 3), random_mask(3)
    loss = nnunet_loss(deep=True)
    expected = masked_loss(loss, logits, target, mask)
    assert torch.equal(masked_loss(loss, logits, target, mask.to(dtype)), expected)


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_voxels_outside_of_the_mask_get_no_gradient_and_those_inside_do(dim, classes, batch_dice):
    logits, target, mask = random_logits(classes, dim), random_target(classes, dim), random_mask(dim)
    grads = gradients(masked_loss(nnunet_loss(batch_dice, deep=True), logits, target, mask), logits)
    for grad, scale in zip(grads[:2], at_all_scales(mask.to(torch.int16), dim), strict=False):
        touched = (grad != 0).any(1, keepdim=True)
        assert torch.equal(touched, scale.bool())


@pytest.mark.parametrize("batch_dice", [True, False])
def test_what_lies_outside_of_the_mask_does_not_change_the_loss(batch_dice):
    logits, target, mask = random_logits(4, 3)[0], random_target(4, 3), random_mask(3)
    loss = nnunet_loss(batch_dice)
    other_logits = torch.where(mask, logits, torch.randn_like(logits))
    other_target = torch.where(mask, target, random_target(4, 3))
    expected = masked_loss(loss, logits, target, mask)
    torch.testing.assert_close(masked_loss(loss, other_logits, other_target, mask), expected)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_an_empty_mask_gives_a_finite_constant_without_gradient(deep, batch_dice):
    loss, target = nnunet_loss(batch_dice, deep=deep), random_target(4, 3)
    values = []
    for _ in range(2):
        logits = random_logits(4, 3)
        value = masked_loss(loss, logits if deep else logits[0], target, torch.zeros_like(target))
        values.append(value.item())
        assert not any(g.any() for g in gradients(value, logits) if g is not None)
    assert values == pytest.approx([-1, -1])  # nnU-Net's Dice of nothing is 1


def test_a_sample_without_masked_voxels_does_not_disturb_the_others():
    logits, target, mask = random_logits(2, 3)[0], random_target(2, 3), random_mask(3)
    mask[1] = False
    loss = masked_loss(nnunet_loss(), logits, target, mask)
    (grad,) = gradients(loss, [logits])
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert not grad[1].any()
    assert grad[0].any()
    assert grad[2].any()


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_a_sure_and_right_prediction_gives_minus_one(dim, classes, batch_dice):
    target, mask = random_target(classes, dim), random_mask(dim)
    logits = [
        50 * torch.nn.functional.one_hot(t[:, 0].long(), classes).movedim(-1, 1).float()
        for t in at_all_scales(target, dim)
    ]
    loss = masked_loss(nnunet_loss(batch_dice, deep=True), logits, target, mask)
    assert loss.item() == pytest.approx(-1, abs=1e-4)


def test_more_voxels_than_half_precision_can_count_are_no_problem():
    logits, target = torch.randn(1, 2, 300, 300).half(), torch.randint(0, 2, (1, 1, 300, 300))
    loss = masked_loss(nnunet_loss(), logits, target, torch.ones_like(target))
    assert loss.item() == pytest.approx(nnunet_loss()(logits.float(), target).item(), abs=1e-3)


def test_a_scale_of_weight_0_is_never_looked_at():
    logits, target, mask = random_logits(2, 3), random_target(2, 3), random_mask(3)
    loss = nnunet_loss(deep=True)
    broken = [*logits[:2], torch.full_like(logits[2], float("nan"))]
    assert torch.equal(masked_loss(loss, broken, target, mask), masked_loss(loss, logits, target, mask))


def test_a_loss_and_an_output_with_different_numbers_of_scales_are_refused():
    logits, target = random_logits(2, 3), random_target(2, 3)
    with pytest.raises(ValueError, match="shorter"):
        masked_loss(nnunet_loss(deep=True), logits[:2], target, torch.ones_like(target))


def topk_loss():
    return DC_and_topk_loss({"batch_dice": False, "smooth": SMOOTH, "do_bg": False, "ddp": False}, {"k": 10})


@pytest.mark.filterwarnings("ignore:size_average and reduce args")  # nnU-Net's own top k
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("make", [topk_loss])
def test_other_losses_are_refused(make, deep):
    loss = make()
    logits, target = random_logits(2, 3), random_target(2, 3)
    if deep:
        loss = DeepSupervisionWrapper(loss, WEIGHTS)
    with pytest.raises(NotImplementedError, match="DC_and_CE_loss and DC_and_BCE_loss"):
        masked_loss(loss, logits if deep else logits[0], target, torch.ones_like(target))


@pytest.mark.parametrize("dim", [2, 3])
def test_a_mask_and_its_complement_share_the_voxels_of_every_scale(dim):
    logits, target, mask = random_logits(4, dim), random_target(4, dim), random_mask(dim)
    loss = nnunet_loss(batch_dice=True, deep=True)
    labeled = gradients(masked_loss(loss, logits, target, mask), logits)[:2]
    pseudo = gradients(masked_loss(loss, logits, target, ~mask), logits)[:2]
    for one, other in zip(labeled, pseudo, strict=True):
        assert torch.equal((one != 0).any(1), (other == 0).all(1))


def test_cross_entropies_of_a_mask_and_its_complement_add_up_to_that_of_all_voxels():
    logits, target, mask = random_logits(4, 3)[0], random_target(4, 3), random_mask(3)
    loss = nnunet_loss(weight_dice=0)
    parts = sum(masked_loss(loss, logits, target, m) * m.sum() for m in (mask, ~mask))
    torch.testing.assert_close(parts / mask.numel(), loss(logits, target))


@pytest.mark.parametrize("patch", [(16, 24), (17, 23), (8, 12, 16), (9, 13, 15)])
@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_downsampling_is_that_of_nnunets_transform(patch, factor):
    labels = torch.randint(0, 5, (3, 1, *patch), dtype=torch.int16)
    transform = DownsampleSegForDSTransform([[factor] * len(patch)])
    expected = torch.stack([transform(segmentation=sample)["segmentation"][0] for sample in labels])
    result = downsample(labels, torch.empty(3, 7, *expected.shape[2:]))
    assert result.dtype == labels.dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float32])
def test_downsampling_keeps_dtype_and_only_existing_values(dtype):
    x = (torch.rand(2, 1, 9, 11) < 0.5).to(dtype)
    result = downsample(x, torch.empty(2, 4, 5, 6))
    assert result.shape == (2, 1, 5, 6)
    assert result.dtype == dtype
    assert set(result.unique().tolist()) <= {0, 1}
    assert torch.equal(downsample(x, torch.empty(2, 4, 9, 11)), x)


def test_feature_l1_is_the_mean_absolute_difference():
    a, b = torch.randn(2, 3, 4, 5, 6, 7)
    assert feature_l1(a, b).item() == pytest.approx((a - b).abs().double().mean().item(), rel=1e-6)


def test_feature_cosine_is_one_minus_the_cosine_of_whole_samples():
    a, b = torch.randn(2, 3, 4, 5, 6, 7)
    a[0] *= 100  # samples count equally, however long their vectors are
    cosines = [
        (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
        for x, y in zip(a.double(), b.double(), strict=True)
    ]
    assert feature_cosine(a, b).item() == pytest.approx(1 - sum(cosines).item() / 3, abs=1e-6)


@pytest.mark.parametrize("loss", [feature_l1, feature_cosine])
def test_feature_losses_have_no_gradient_into_the_target(loss):
    a, b = (x.requires_grad_() for x in torch.randn(2, 3, 4, 6, 6).unbind())
    loss(a, b).backward()
    assert a.grad.any()
    assert b.grad is None


@pytest.mark.parametrize("loss", [feature_l1, feature_cosine])
def test_feature_losses_of_identical_maps_are_zero(loss):
    a = torch.randn(3, 4, 6, 6)
    assert loss(a, a.clone()).item() == pytest.approx(0, abs=1e-6)


def test_feature_cosine_lies_between_identical_and_opposite_maps():
    a, b = torch.randn(2, 4, 4, 6, 6)
    assert feature_cosine(a, 3 * a).item() == pytest.approx(0, abs=1e-6)
    assert feature_cosine(a, -0.1 * a).item() == pytest.approx(2, abs=1e-6)
    assert feature_cosine(a, torch.cat([a[:2], -a[2:]])).item() == pytest.approx(1, abs=1e-6)
    assert 0 < feature_cosine(a, b).item() < 2


def test_feature_l1_of_half_precision_maps_is_computed_in_single_precision():
    a = torch.full((2, 4, 6, 6), 60000.0, dtype=torch.float16)
    loss = feature_l1(a, -a)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * a[0, 0, 0, 0].float().item())  # more than half precision can hold


def test_feature_cosine_of_half_precision_maps_is_computed_in_single_precision():
    a, b = (100 * torch.randn(2, 2, 16, 16, 16)).half()  # the norms overflow half precision
    loss = feature_cosine(a, b)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(feature_cosine(a.float(), b.float()).item(), abs=1e-6)


def test_feature_cosine_of_empty_maps_is_finite():
    a = torch.zeros(2, 4, 6, 6, requires_grad=True)
    loss = feature_cosine(a, torch.zeros_like(a))
    loss.backward()
    assert loss.isfinite()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("settings", [{"weight": torch.tensor([0.1, 1.0])}, {"label_smoothing": 0.1}])
def test_settings_of_the_cross_entropy_that_the_masked_loss_does_not_know_are_refused(settings):
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, settings, dice_class=MemoryEfficientSoftDiceLoss)
    logits, target = torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="class weights and label smoothing"):
        masked_loss(loss, logits, target, torch.ones_like(target))
    with pytest.raises(NotImplementedError, match="class weights and label smoothing"):
        cross_entropy(loss, logits, target)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("ce", "dice"), [(1, 0), (0, 1), (0.3, 2.0), (1, 1)])
def test_other_weights_are_those_of_nnunets_own_loss_and_leave_it_alone(deep, ce, dice):
    loss = nnunet_loss(deep=deep)
    output, target = random_logits(3, 3), random_target(3, 3)
    targets = at_all_scales(target, 3)
    if not deep:
        output, targets = output[0], targets[0]
    before = loss(output, targets)
    changed = reweighted(loss, cross_entropy=ce, dice=dice)
    expected = nnunet_loss(deep=deep, weight_ce=ce, weight_dice=dice)
    torch.testing.assert_close(changed(output, targets), expected(output, targets))
    assert loss(output, targets) == before


def test_only_dice_and_cross_entropy_have_other_weights():
    with pytest.raises(NotImplementedError, match="DC_and_CE_loss"):
        reweighted(torch.nn.CrossEntropyLoss(), cross_entropy=1, dice=0)


def test_the_loss_of_the_full_resolution_is_the_one_inside_deep_supervision():
    deep, plain = nnunet_loss(deep=True), nnunet_loss()
    assert full_resolution(deep) is deep.loss
    assert full_resolution(plain) is plain


def test_probability_mse_is_the_mean_over_voxels_and_classes():
    prediction = torch.full((1, 2, 1, 2), 0.5)
    target = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])
    assert probability_mse(prediction, target) == pytest.approx(0.25 / 2)
    mask = torch.tensor([[[[True, False]]]])
    assert probability_mse(prediction, target, mask) == pytest.approx(0.25)
    assert probability_mse(prediction, target, ~mask) == 0
    assert probability_mse(prediction, target, mask & ~mask) == 0  # an empty mask


@pytest.mark.parametrize("dim", [2, 3])
def test_probability_mse_trains_the_masked_voxels_of_the_student_only(dim):
    logits = random_logits(3, dim)[0]
    target = torch.rand(logits.shape).softmax(1).requires_grad_()
    mask = random_mask(dim)
    probability_mse(logits.softmax(1), target, mask).backward()
    assert target.grad is None
    assert torch.equal(logits.grad.abs().sum(1, keepdim=True) > 0, mask)


# ---- regions and the ignore label: nnU-Net's own losses are the oracle ----

IGNORE = 9


def region_loss(batch_dice=False, *, ignore=False, deep=False, **kwargs):
    """What nnUNetTrainer._build_loss makes for regions."""
    dice = {"batch_dice": batch_dice, "smooth": SMOOTH, "do_bg": True, "ddp": False}
    loss = DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss, **kwargs)
    return DeepSupervisionWrapper(loss, WEIGHTS) if deep else loss


def region_target(regions, dim, ignore, batch_size=3):
    return torch.rand(batch_size, regions + ignore, *PATCH[dim]) > 0.6


def ignored(target, mask):
    """Labels of classes in which voxels outside of a mask have the ignore label."""
    return torch.where(mask, target, IGNORE)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize(("dim", "regions", "batch_dice"), CASES)
def test_a_full_mask_gives_nnunets_own_loss_of_regions(dim, regions, batch_dice, ignore):
    loss = region_loss(batch_dice, ignore=ignore, deep=True, weight_ce=0.7, weight_dice=1.5)
    logits, target = random_logits(regions, dim), region_target(regions, dim, ignore)
    expected = loss(logits, at_all_scales(target.to(torch.int16), dim))
    ours = masked_loss(loss, logits, target, torch.ones_like(target[:, :1]))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, logits)[:2], gradients(expected, logits)[:2])


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_a_full_mask_gives_nnunets_own_loss_with_the_ignore_label(dim, classes, batch_dice):
    loss = nnunet_loss(batch_dice, deep=True, ignore_label=IGNORE, weight_ce=0.7, weight_dice=1.5)
    logits, target = random_logits(classes, dim), ignored(random_target(classes, dim), random_mask(dim))
    expected = loss(logits, at_all_scales(target, dim))
    ours = masked_loss(loss, logits, target, torch.ones_like(target))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, logits)[:2], gradients(expected, logits)[:2])


@pytest.mark.parametrize(("dim", "classes", "batch_dice"), CASES)
def test_a_mask_and_the_ignore_label_restrict_the_loss_to_what_both_leave(dim, classes, batch_dice):
    logits, target = random_logits(classes, dim)[0], random_target(classes, dim)
    mask, annotated = random_mask(dim), random_mask(dim)
    loss = nnunet_loss(batch_dice, ignore_label=IGNORE)
    expected = by_hand(logits, target, mask & annotated, batch_dice)
    assert masked_loss(loss, logits, ignored(target, annotated), mask).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_a_mask_restricts_the_loss_of_regions_as_the_ignore_channel_does(batch_dice):
    logits, target, mask = random_logits(3, 3)[0], region_target(3, 3, True), random_mask(3)
    loss = region_loss(batch_dice, ignore=True)
    both = torch.cat([target[:, :-1], target[:, -1:] | ~mask], 1)
    torch.testing.assert_close(masked_loss(loss, logits, target, mask), loss(logits, both))


@pytest.mark.parametrize("batch_dice", [True, False])
def test_a_mask_restricts_the_loss_of_regions_without_ignore_label(batch_dice):
    logits, target, mask = random_logits(3, 3)[0], region_target(3, 3, False), random_mask(3)
    ours = masked_loss(region_loss(batch_dice), logits, target, mask)
    dice = region_loss(batch_dice, weight_ce=0).dc(logits, target, loss_mask=mask)
    chosen = mask.expand_as(logits)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits[chosen], target[chosen].float())
    torch.testing.assert_close(ours, entropy + dice)


def test_the_parts_of_the_region_loss_can_be_reweighted():
    logits, target = random_logits(3, 3)[0], region_target(3, 3, False)
    loss = region_loss()
    parts = [reweighted(loss, cross_entropy=a, dice=b)(logits, target) for a, b in ((1, 0), (0, 1), (2, 3))]
    torch.testing.assert_close(parts[0] + parts[1], loss(logits, target))
    torch.testing.assert_close(2 * parts[0] + 3 * parts[1], parts[2])
    assert (loss.weight_ce, loss.weight_dice) == (1, 1)


@pytest.mark.parametrize("ignore", [False, True])
def test_the_cross_entropy_alone_is_that_of_nnunets_loss(ignore):
    logits, dim = random_logits(3, 3), 3
    labels = random_target(3, dim)
    for deep in (False, True):
        loss = nnunet_loss(deep=deep, ignore_label=IGNORE if ignore else None, weight_ce=0.7, weight_dice=0)
        plain = full_resolution(loss)
        torch.testing.assert_close(cross_entropy(loss, logits[0], labels), plain(logits[0], labels))
    regions = region_target(3, dim, ignore)
    if ignore:
        regions[:, -1] = False
    loss = region_loss(ignore=ignore, weight_ce=0.7, weight_dice=0)
    torch.testing.assert_close(cross_entropy(loss, logits[0], regions), loss(logits[0], regions))


@pytest.mark.parametrize("ignore", [False, True])
def test_a_weighted_cross_entropy_is_the_mean_over_the_voxels_that_have_a_weight(ignore):
    logits, weight = random_logits(3, 2)[0], torch.rand(3, 1, *PATCH[2])
    samples = [torch.zeros_like(weight) for _ in range(2)]
    samples[0][1, 0, 2, 3], samples[1][2, 0, 4, 5] = 0.3, 0.9
    for loss, target in (
        (nnunet_loss(ignore_label=IGNORE if ignore else None), random_target(3, 2)),
        (region_loss(ignore=ignore), region_target(3, 2, False)),
    ):
        single = [cross_entropy(loss, logits, target, one) for one in samples]
        both = cross_entropy(loss, logits, target, samples[0] + samples[1])
        torch.testing.assert_close(both, (single[0] + single[1]) / 2)
        everywhere = cross_entropy(loss, logits, target, torch.ones_like(weight))
        torch.testing.assert_close(everywhere, cross_entropy(loss, logits, target))
        torch.testing.assert_close(cross_entropy(loss, logits, target, 3 * samples[0]), 3 * single[0])
        assert cross_entropy(loss, logits, target, 0 * weight) == 0


# ---- feature terms inside a mask ----


@pytest.mark.parametrize(("patch", "grid"), [((13, 17), (4, 5)), ((20, 28, 28), (5, 7, 7)), ((9, 16, 12), (9, 4, 3))])
def test_a_cell_counts_where_all_of_its_voxels_do(patch, grid):
    mask = block_mask(3, patch, cells=3)
    cells = shrink(mask, torch.empty(3, 5, *grid))
    assert cells.shape == (3, 1, *grid)
    edges = [-(-size // count) for size, count in zip(patch, grid, strict=True)]
    for place in itertools.product(*map(range, grid)):
        voxels = mask[(..., *(slice(p * edge, (p + 1) * edge) for p, edge in zip(place, edges, strict=True)))]
        assert torch.equal(cells[(..., *place)][:, 0], voxels.flatten(1).all(1))
    assert cells.any()
    assert not cells.all()


@pytest.mark.parametrize("distance", [feature_l1, feature_cosine])
def test_a_feature_term_does_not_see_what_is_outside_of_the_mask(distance):
    features, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    mask = torch.rand(3, 1, 5, 6) > 0.5
    mask[2] = False  # a sample of which nothing counts
    inside = distance(features, target, mask)
    assert inside > 0
    assert torch.equal(distance(torch.where(mask, features, 9.0), torch.where(mask, target, -9.0), mask), inside)
    assert distance(torch.where(mask, target, 9.0), target, mask) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(distance(features[:2], target[:2], mask[:2]), inside)
    features.requires_grad_()
    nothing = distance(features, target, torch.zeros_like(mask))
    nothing.backward()
    assert nothing == 0
    assert not features.grad.any()
    torch.testing.assert_close(distance(features, target, torch.ones_like(mask)), distance(features, target))


def test_the_divergence_is_summed_over_classes():
    target, logits = torch.rand(2, 3, 4, 5).softmax(1), torch.randn(2, 3, 4, 5)
    prediction = logits.softmax(1)
    expected = (target * (target / prediction).log()).sum(1, keepdim=True)
    torch.testing.assert_close(kl_divergence(target, logits), expected)
    torch.testing.assert_close(kl_divergence(prediction, logits), torch.zeros(2, 1, 4, 5), atol=1e-6, rtol=0)
    sure = kl_divergence(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[60000.0], [-60000.0]]]).half())
    assert sure.item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("size", [0.5, 20.0, 120.0])
def test_the_divergence_of_sure_networks_has_a_finite_gradient(regions, size):
    logits = (size * torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])).requires_grad_()
    other = (0.9 * logits).detach().requires_grad_()
    target = logits.sigmoid() if regions else logits.softmax(1)
    kl_divergence(target, other, regions=regions).sum().backward()
    assert logits.grad.isfinite().all()
    assert other.grad.isfinite().all()


def test_the_divergence_of_regions_is_that_of_their_questions():
    target, logits = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    p = logits.sigmoid()
    expected = (target * (target / p).log() + (1 - target) * ((1 - target) / (1 - p)).log()).sum(1, keepdim=True)
    torch.testing.assert_close(kl_divergence(target, logits, regions=True), expected)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_dice_distance_is_that_of_the_equation_and_smallest_where_both_agree(dim):
    target, other = (torch.rand(2, 3, *PATCH[dim]) for _ in range(2))
    values = []
    for p, t in zip(other, target, strict=True):
        overlaps = [2 * (a * b).sum() / ((a * a).sum() + (b * b).sum()) for a, b in zip(p, t, strict=True)]
        values.append(1 - sum(overlaps) / 3)
    torch.testing.assert_close(soft_dice_distance(other, target), torch.stack(values))
    unsure = target.clone().requires_grad_()
    distance = soft_dice_distance(unsure, target.requires_grad_())
    torch.testing.assert_close(distance, torch.zeros(2), rtol=0, atol=1e-6)
    distance.sum().backward()
    assert unsure.grad.abs().max() < 1e-8
    assert target.grad is None
    assert (soft_dice_distance(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)) == 0).all()
