"""Targets from a network's logits, and how sure they are."""

from math import log

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component
from torch import Tensor


def probabilities(logits: Tensor, *, regions: bool = False) -> Tensor:
    """Softmax over the classes, or the sigmoid of every region: (B, C, *spatial) to the same shape, float32."""
    return logits.float().sigmoid() if regions else logits.float().softmax(1)


def hard_labels(logits: Tensor, *, regions: bool = False, ignore_channel: bool = False) -> Tensor:
    """The most probable class of every voxel, or the regions with p > 0.5, as nnU-Net's losses take them; no gradient.

    Args:
        logits: (B, C, *spatial). Probabilities of classes give the same labels.
        regions: the channels are overlapping regions.
        ignore_channel: append the channel that marks ignored voxels to regions, empty: pseudo labels ignore nothing.

    Returns:
        Classes: (B, 1, *spatial) int16. Regions: (B, C, *spatial) int16 of 0 and 1, or C + 1 channels.
    """
    logits = logits.detach()
    if not regions:
        return logits.max(1, keepdim=True).indices.to(torch.int16)  # on a CPU ten times as fast as argmax
    labels = (logits > 0).to(torch.int16)
    return torch.cat([labels, torch.zeros_like(labels[:, :1])], 1) if ignore_channel else labels


def as_probabilities(
    labels: Tensor, channels: int, *, regions: bool = False, ignore_label: int | None = None
) -> tuple[Tensor, Tensor]:
    """Labels as the probabilities that a network would predict, and the voxels that are annotated.

    Args:
        labels: as nnU-Net gives them: classes (B, 1, *spatial), or regions (B, channels, *spatial), where there is an
            ignore label with one more channel, which is 1 where the voxel is ignored.
        channels: of the network's output.
        regions: the labels are regions.
        ignore_label: the class value that marks ignored voxels (for regions any number); None: there is none.

    Returns:
        Probabilities (B, channels, *spatial) float32, and a bool mask (B, 1, *spatial), False where it is ignored.
    """
    known = annotated(labels, channels, regions=regions, ignore_label=ignore_label)
    if regions:
        return labels[:, :channels].float(), known
    classes = torch.where(known, labels, 0).long()
    found = torch.zeros((len(labels), channels, *labels.shape[2:]), device=labels.device)
    return found.scatter_(1, classes, 1), known  # one_hot would make integers of 8 bytes first


def annotated(labels: Tensor, channels: int, *, regions: bool = False, ignore_label: int | None = None) -> Tensor:
    """The voxels that are not ignored: bool (B, 1, *spatial). See `as_probabilities`."""
    if ignore_label is None:
        return torch.ones_like(labels[:, :1], dtype=torch.bool)
    return ~labels[:, channels:].bool() if regions else labels != ignore_label


def uncertainty(probabilities: Tensor, *, regions: bool = False) -> Tensor:
    """Entropy of every voxel as a part of the largest possible: (B, C, *spatial) to (B, 1, *spatial).

    From 0 (sure) to 1 (uniform classes). For regions the mean of the entropies of their yes-no questions.
    """
    if not regions:
        return torch.special.entr(probabilities).sum(1, keepdim=True) / log(probabilities.shape[1])
    both = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return both.mean(1, keepdim=True) / log(2)


def confidence(probabilities: Tensor, *, regions: bool = False) -> Tensor:
    """How probable the hard label of every voxel is: (B, C, *spatial) to (B, 1, *spatial).

    The largest probability of the classes, in [1 / C, 1]; of regions that of the least certain one, in [0.5, 1].
    """
    if regions:
        return torch.maximum(probabilities, 1 - probabilities).amin(1, keepdim=True)
    return probabilities.amax(1, keepdim=True)


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / (p^(1/T) + (1 - p)^(1/T)) of every class or region for itself (MC-Net, Eq. 2); same shape.

    Of more than two classes the results do not sum to 1.

    Args:
        probabilities: float32.
        temperature: T, above 0; 1 changes nothing, towards 0 gives 0 and 1.
    """
    return (torch.logit(probabilities, eps=1e-6) / temperature).sigmoid()


def keep_largest_component(labels: Tensor) -> Tensor:
    """Sets all but the largest connected component of every class or region of every sample to background (0).

    Full connectivity (26 neighbours in 3D, 8 in 2D), as BCP and M3HL's released code; components of the same size all
    stay. Runs on the host: a GPU waits.

    Args:
        labels: (B, 1, *spatial), or (B, regions, *spatial), integer, 0 is background. What has no voxel stays empty.

    Returns:
        New tensor of the same shape, dtype and device.
    """
    cleaned = np.zeros(labels.shape, dtype=np.int64)
    for sample, result in zip(labels.cpu().numpy(), cleaned, strict=True):
        for channel, kept in zip(sample, result, strict=True):
            for value in np.unique(channel[channel > 0]):
                kept[remove_all_but_largest_component(channel == value)] = value
    return torch.from_numpy(cleaned).to(labels)
