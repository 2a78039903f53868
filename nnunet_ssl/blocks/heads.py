"""Modules beside a U-Net: its last features, a second head on them, and the discriminator of what that predicts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import unwrap


class FeatureDecoder(nn.Module):
    """A U-Net's decoder that also returns the features which its full-resolution head turns into logits.

    It consists of the modules of the U-Net and has no weights of its own.

    Args:
        network: a U-Net with encoder stages, perhaps wrapped.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.decoders = [unwrap(network).decoder]  # in a list, so that nothing is registered
        self.eval()  # nothing of it is trained

    def forward(self, skips: list[Tensor]) -> tuple[Tensor | list[Tensor], Tensor]:
        """Stage outputs of the encoder to the output of the decoder, and the features (B, F, *spatial)."""
        (decoder,) = self.decoders
        x, outputs = skips[-1], []
        parts = zip(decoder.transpconvs, decoder.stages, decoder.seg_layers, strict=True)
        for level, (upsample, convolve, head) in zip(reversed(range(len(skips) - 1)), parts, strict=True):
            x = convolve(torch.cat([upsample(x), skips[level]], 1))
            if decoder.deep_supervision or level == 0:
                outputs.append(head(x))
        return outputs[::-1] if decoder.deep_supervision else outputs[0], x


class DistanceHead(nn.Module):
    """A second head on the last features of a U-Net's decoder, which predicts signed distances (SASSNet, DTC).

    Only the head's weights are its own; those of the decoder belong to the U-Net.

    Args:
        network: a U-Net with encoder stages, perhaps wrapped.
        classes: channels of the distances.
    """

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        last = unwrap(network).decoder.seg_layers[-1]
        self.decode, self.features = FeatureDecoder(network), last.in_channels
        self.head = type(last)(self.features, classes, 1)
        self.head.apply(unwrap(network).initialize)

    def forward(self, skips: list[Tensor]) -> tuple[Tensor | list[Tensor], Tensor]:
        """Stage outputs of the encoder to the decoder's output and the distances (B, classes, *spatial) float32."""
        output, features = self.decode(skips)
        return output, self.head(features).float().tanh()


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
