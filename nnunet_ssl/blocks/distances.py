"""Signed distances to the boundary of a class: as a target, as a prediction, and what judges predictions."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import unwrap


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


class DistanceHead(nn.Module):
    """A second head on the last features of a U-Net's decoder, which predicts signed distances (SASSNet, DTC).

    Only the head's weights are its own; those of the decoder belong to the U-Net.

    Args:
        network: a U-Net with encoder stages, perhaps wrapped.
        classes: channels of the distances.
    """

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        network = unwrap(network)
        self.unregistered = (network.decoder,)  # in a tuple: it is no part of this module
        last = network.decoder.seg_layers[-1]
        self.features = last.in_channels
        self.head = type(last)(self.features, classes, 1)
        self.head.apply(network.initialize)

    def forward(self, skips: list[Tensor]) -> tuple[Tensor | list[Tensor], Tensor]:
        """Stage outputs of the encoder to the decoder's output and the distances (B, classes, *spatial) float32."""
        (decoder,) = self.unregistered
        x, outputs = skips[-1], []
        stages = zip(decoder.transpconvs, decoder.stages, decoder.seg_layers, strict=True)
        for level, (upsample, convolve, segment) in zip(reversed(range(len(skips) - 1)), stages, strict=True):
            x = convolve(torch.cat([upsample(x), skips[level]], 1))
            if decoder.deep_supervision or level == 0:
                outputs.append(segment(x))
        return outputs[::-1] if decoder.deep_supervision else outputs[0], self.head(x).float().tanh()


class Discriminator(nn.Module):
    """Says whether signed distances are of a labeled or of an unlabeled scan, which it sees with them (SASSNet).

    Four convolutions with stride 2, the mean over what they leave of the patch, and a linear layer: any size of patch
    will do. An axis of one voxel stays as it is. No normalisation: no sample depends on the others.

    Args:
        classes: channels of the distances.
        channels: of the scans.
        patch_size: voxels per axis, two or three of them.
        width: channels of the first layer; the last one has eight times as many.
        dropout: probability with which a channel is left out between two layers.
    """

    def __init__(self, classes: int, channels: int, patch_size: Sequence[int], width: int = 64, dropout: float = 0.5):
        super().__init__()
        sizes = [tuple(max(1, size >> times) for size in patch_size) for times in range(4)]
        self.distances = _halving(classes, width, sizes[0])
        self.scan = _halving(channels, width, sizes[0])
        self.later = nn.ModuleList(_halving(width << i, width << i + 1, size) for i, size in enumerate(sizes[1:]))
        self.verdict = nn.Linear(8 * width, 2)
        self.dropout = (nn.Dropout2d if len(patch_size) == 2 else nn.Dropout3d)(dropout)

    def forward(self, distances: Tensor, scan: Tensor) -> Tensor:
        """(B, classes, *patch_size) and (B, channels, *patch_size) to the logits (B, 2) of unlabeled and of labeled."""
        x = F.leaky_relu(self.distances(distances) + self.scan(scan), 0.2)
        for convolve in self.later:
            x = F.leaky_relu(convolve(self.dropout(x)), 0.2)
        return self.verdict(x.flatten(2).mean(2))


def _halving(inputs: int, outputs: int, size: Sequence[int]) -> nn.Module:
    """A convolution with 4 voxels and stride 2 along every axis of more than one voxel."""
    kernel, stride, padding = zip(*[(4, 2, 1) if voxels > 1 else (1, 1, 0) for voxels in size], strict=True)
    return (nn.Conv2d if len(size) == 2 else nn.Conv3d)(inputs, outputs, kernel, stride, padding)
