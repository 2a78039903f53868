"""Losses that nnU-Net does not have; everything else is nnU-Net's own."""

from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn


def masked_loss(
    loss: nn.Module, output: Tensor | Sequence[Tensor], target: Tensor, mask: Tensor, *, dice: bool = True
) -> Tensor:
    """nnU-Net's own Dice and cross entropy, restricted to the voxels of a mask, at every deep-supervision scale.

    Where the mask is 1 everywhere this equals `loss` on targets that nnU-Net's transforms downsampled. Dice counts
    only the masked voxels, cross entropy is their mean. Voxels with the ignore label do not count. An empty mask gives
    a constant without gradient.

    Args:
        loss: what `nnUNetTrainer._build_loss` made: DC_and_CE_loss, for regions DC_and_BCE_loss, perhaps in a
            DeepSupervisionWrapper.
        output: logits (B, C, *spatial); with deep supervision a list of them, highest resolution first.
        target: labels at full resolution: (B, 1, *spatial), or the channels that nnU-Net gives regions.
        mask: (B, 1, *spatial), 1 or True where the voxel counts.
        dice: False leaves nnU-Net's Dice out.

    Returns:
        Scalar in nnU-Net's scaling: cross entropy minus Dice, in [-1, inf).

    Raises:
        NotImplementedError: any other loss.
    """
    (value,) = masked_losses(loss, output, target, [mask], dice=[dice])
    return value


def masked_losses(
    loss: nn.Module,
    output: Tensor | Sequence[Tensor],
    target: Tensor,
    masks: Sequence[Tensor],
    *,
    dice: Sequence[bool] | None = None,
) -> list[Tensor]:
    """`masked_loss` for each of several masks; the cross entropy of the voxels is computed, and kept, once for all."""
    dice = dice or [True] * len(masks)
    if not isinstance(loss, DeepSupervisionWrapper):
        return _masked_dice_ce(loss, output, target, masks, dice)
    # a scale with weight 0 is never trained: keep it out, as nnU-Net does
    scales = [(w, o) for w, o in zip(loss.weight_factors, output, strict=True) if w != 0]
    found = []
    for weight, logits in scales:
        small = [downsample(mask, logits) for mask in masks]
        values = _masked_dice_ce(loss.loss, logits, downsample(target, logits), small, dice)
        found.append([weight * x for x in values])
    return [sum(values) for values in zip(*found, strict=True)]


def labeled_loss(loss: nn.Module, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
    """nnU-Net's loss on labeled patches, for methods that need it more than once in a step.

    With an ignore label nnU-Net asks the GPU for the number of annotated voxels, and the host waits each time; here
    it does not. The value is the same. Takes what `loss` takes.
    """
    plain = full_resolution(loss)
    ignores = getattr(plain, "ignore_label", None) is not None or getattr(plain, "use_ignore_label", False)
    if not ignores or not _can_be_masked(plain):
        return loss(output, target)
    labels = target if isinstance(target, Tensor) else target[0]
    return masked_loss(loss, output, labels, torch.ones_like(labels[:, :1], dtype=torch.bool))


def _can_be_masked(loss: nn.Module) -> bool:
    """Whether it is nnU-Net's Dice and cross entropy without class weights and label smoothing."""
    if type(loss) not in (DC_and_CE_loss, DC_and_BCE_loss):
        return False
    weights = (loss.ce.weight, getattr(loss.ce, "pos_weight", None))
    return all(weight is None for weight in weights) and not getattr(loss.ce, "label_smoothing", 0)


def _require_plain(loss: nn.Module) -> None:
    if not _can_be_masked(loss):
        raise NotImplementedError(
            f"Losses with pseudo labels are implemented for nnU-Net's DC_and_CE_loss and DC_and_BCE_loss without class "
            f"weights and label smoothing, not for {loss}."
        )


def _masked_dice_ce(
    loss: nn.Module, logits: Tensor, target: Tensor, masks: Sequence[Tensor], dice: Sequence[bool]
) -> list[Tensor]:
    _require_plain(loss)
    masks, regions = [mask.bool() for mask in masks], type(loss) is DC_and_BCE_loss
    if regions and loss.use_ignore_label:
        masks, target = [mask & ~target[:, -1:].bool() for mask in masks], target[:, :-1]
    elif not regions and loss.ignore_label is not None:
        annotated = target != loss.ignore_label
        masks, target = [mask & annotated for mask in masks], torch.where(annotated, target, 0)
    voxels, values = _entropy(loss, logits, target), []
    for mask, with_dice in zip(masks, dice, strict=True):
        counts = mask.float()  # not half: the number of voxels is beyond its range
        values.append(loss.weight_ce * (voxels * counts).sum() / counts.sum().clamp_min(1))
        if with_dice:
            values[-1] = values[-1] + loss.weight_dice * loss.dc(logits, target, loss_mask=counts)
    return values


def _entropy(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of every voxel, (B, 1, *spatial), with labels or regions of which none is ignored."""
    if type(loss) is not DC_and_BCE_loss:
        return F.cross_entropy(logits, target[:, 0].long(), reduction="none")[:, None]
    entropy = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    # as nnU-Net: the mean over the regions, with the ignore label their sum
    return entropy.sum(1, keepdim=True) if loss.use_ignore_label else entropy.mean(1, keepdim=True)


def cross_entropy(loss: nn.Module, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The cross entropy in nnU-Net's loss alone, with hard pseudo labels, of which none is ignored.

    Args:
        loss: what `nnUNetTrainer._build_loss` made.
        logits: (B, C, *spatial).
        target: from `hard_labels`.
        weight: (B, 1, *spatial), not negative, a factor for every voxel; None: 1 everywhere.

    Returns:
        Scalar, the mean over all voxels whose weight is not 0; 0 where there is none.

    Raises:
        NotImplementedError: another loss than nnU-Net's Dice and cross entropy, class weights or label smoothing.
    """
    loss = full_resolution(loss)
    _require_plain(loss)
    if type(loss) is DC_and_BCE_loss:
        target = target[:, : logits.shape[1]]  # without the channel of ignored voxels
    entropy = _entropy(loss, logits, target)
    if weight is None:
        return loss.weight_ce * entropy.mean()
    return loss.weight_ce * (entropy * weight).sum() / (weight > 0).float().sum().clamp_min(1)


def full_resolution(loss: nn.Module) -> nn.Module:
    """nnU-Net's loss of the full-resolution output alone, for targets that have no deep supervision."""
    return loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss


def reweighted(loss: nn.Module, *, cross_entropy: float, dice: float) -> nn.Module:
    """nnU-Net's Dice and cross entropy with other weights (its own are 1 and 1).

    Raises: NotImplementedError for any other loss.
    """
    if isinstance(loss, DeepSupervisionWrapper):
        inner = reweighted(loss.loss, cross_entropy=cross_entropy, dice=dice)
        return DeepSupervisionWrapper(inner, loss.weight_factors)
    if type(loss) not in (DC_and_CE_loss, DC_and_BCE_loss):
        raise NotImplementedError(f"Only nnU-Net's DC_and_CE_loss and DC_and_BCE_loss have such weights, not {loss}.")
    loss = copy(loss)  # shallow: the parts, perhaps compiled, are the same
    loss.weight_ce, loss.weight_dice = cross_entropy, dice
    return loss


def probability_mse(probabilities: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over voxels and classes (Mean Teacher, UA-MT, co-learning Eq. 15-17).

    The target gets no gradient.

    Args:
        probabilities: (B, C, *spatial), float32.
        target: probabilities (B, C, *spatial).
        mask: (B, 1, *spatial), 1 or True where the voxel counts; an empty one gives 0. None: every voxel.

    Returns:
        Scalar in [0, 1].
    """
    difference = (probabilities - target.detach()).square().mean(1, keepdim=True)
    if mask is None:
        return difference.mean()
    mask = mask.float()
    return (difference * mask).sum() / mask.sum().clamp_min(1)


def soft_dice_distance(probabilities: Tensor, target: Tensor) -> Tensor:
    """1 - Dice of two predictions with squares in the denominator, the mean over the classes: (B,), each in [0, 1].

    It is smallest, 0, where both agree, also where they are unsure; nnU-Net's Dice is smaller where one of them is 0 or
    1. A class that neither sees has distance 0. The target gets no gradient. Source: V-Net (arXiv:1606.04797).

    Args:
        probabilities: (B, C, *spatial), float32.
        target: the same shape.
    """
    p, t = probabilities.flatten(2), target.detach().flatten(2)
    overlap, sizes = 2 * (p * t).sum(2), p.square().sum(2) + t.square().sum(2)
    return (1 - (overlap + 1e-5) / (sizes + 1e-5)).mean(1)


def kl_divergence(target: Tensor, logits: Tensor, *, regions: bool = False) -> Tensor:
    """KL(target || prediction) of every voxel: sum over the classes, or over the yes-no questions of the regions.

    Args:
        target: probabilities (B, C, *spatial), float32; with gradient, if it has one. Taken off 0 and 1, where the
            logarithm of the target has none.
        logits: of the prediction, same shape; taken in float32.
        regions: the channels are overlapping regions.

    Returns:
        (B, 1, *spatial), at least 0 but for rounding.
    """
    logits = logits.float()
    if not regions:
        target = target.clamp_min(1e-30)
        return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1, keepdim=True)
    target = target.clamp(1e-7, 1 - 1e-7)
    yes = F.kl_div(F.logsigmoid(logits), target, reduction="none")
    return (yes + F.kl_div(F.logsigmoid(-logits), 1 - target, reduction="none")).sum(1, keepdim=True)


def downsample(x: Tensor, like: Tensor) -> Tensor:
    """Resizes labels or masks (B, C, *spatial) to the spatial shape of `like` by nearest neighbour, dtype kept.

    The same interpolation as nnU-Net's DownsampleSegForDSTransform, but on the device and for mixed targets.
    """
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x.float(), like.shape[2:], mode="nearest-exact").to(x.dtype)


def shrink(mask: Tensor, like: Tensor) -> Tensor:
    """Cells of a feature map all of whose voxels are in the mask: (B, 1, *spatial) to the spatial shape of `like`.

    That shape is the mask's divided by the strides of an encoder, rounded up.
    """
    pool = F.max_pool2d if mask.ndim == 4 else F.max_pool3d
    cell = [-(-size // cells) for size, cells in zip(mask.shape[2:], like.shape[2:], strict=True)]
    return pool((~mask.bool()).float(), cell, ceil_mode=True) == 0


def feature_l1(features: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference of two feature maps (B, C, *spatial), at least 0; the target gets no gradient.

    Source: M3HL, L_low.

    Args:
        mask: (B, 1, *spatial), 1 or True where the cell counts; an empty one gives 0. None: every cell.
    """
    difference = (features.float() - target.detach().float()).abs().mean(1, keepdim=True)
    if mask is None:
        return difference.mean()
    return (difference * mask).sum() / mask.sum().clamp_min(1)


def feature_cosine(features: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 minus the cosine of two feature maps (B, C, *spatial), flattened to a vector per sample; batch mean, in [0, 2].

    The target gets no gradient. Computed in fp32: the vector has thousands of entries (M3HL, L_high).

    Args:
        mask: (B, 1, *spatial), 1 or True where the cell counts; samples without such a cell do not, and where there is
            none in the batch the result is 0. None: every cell.
    """
    features, target = features.float(), target.detach().float()
    if mask is None:
        return 1 - F.cosine_similarity(features.flatten(1), target.flatten(1), dim=1).mean()
    cosine = F.cosine_similarity((features * mask).flatten(1), (target * mask).flatten(1), dim=1)
    counts = mask.flatten(1).any(1)
    return ((1 - cosine) * counts).sum() / counts.sum().clamp_min(1)
