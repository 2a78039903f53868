"""Targets from a network's logits, and how sure they are."""

import numpy as np
import torch
import torch.nn.functional as F
from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component
from torch import Tensor


def hard_labels(logits: Tensor) -> Tensor:
    """The most probable class of every voxel: (B, C, *spatial) logits to (B, 1, *spatial) int16, without gradient."""
    return logits.detach().argmax(1, keepdim=True).to(torch.int16)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (B, 1, *spatial) as probabilities (B, classes, *spatial), float32."""
    return F.one_hot(labels[:, 0].long(), classes).movedim(-1, 1).float()


def entropy(probabilities: Tensor) -> Tensor:
    """Of every voxel in nats: (B, C, *spatial) to (B, 1, *spatial), from 0 (sure) to ln C (uniform)."""
    return torch.special.entr(probabilities).sum(1, keepdim=True)


def keep_largest_component(labels: Tensor) -> Tensor:
    """Sets all but the largest connected component of every class of every sample to background (0).

    Full connectivity (26 neighbours in 3D, 8 in 2D), as BCP and M3HL's released code; components of the same size all
    stay. Runs on the host: a GPU waits.

    Args:
        labels: (B, 1, *spatial), integer, 0 is background. A class without voxels stays empty.

    Returns:
        New tensor of the same shape, dtype and device.
    """
    cleaned = np.zeros(labels.shape, dtype=np.int64)
    for sample, result in zip(labels.cpu().numpy(), cleaned, strict=True):
        for value in np.unique(sample[sample > 0]):
            result[0][remove_all_but_largest_component(sample[0] == value)] = value
    return torch.from_numpy(cleaned).to(labels)
