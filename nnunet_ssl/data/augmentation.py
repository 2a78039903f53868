"""nnU-Net's augmentation of unlabeled patches: in the loaders' workers, or its intensity part on the device."""

import os
from copy import deepcopy

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from torch import Tensor

GEOMETRY = (Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform, MirrorTransform)
NEEDS_LABELS = (SegOnlyTransform, MoveSegAsOneHotToDataTransform)
KNOWN_ON_DEVICE = (
    GaussianNoiseTransform,
    GaussianBlurTransform,
    MultiplicativeBrightnessTransform,
    ContrastTransform,
    SimulateLowResolutionTransform,
    GammaTransform,
)
AUGMENT = "nnUNet_ssl_augment"  # environment variable


def split_transforms(transforms: ComposeTransforms) -> tuple[BasicTransform, BasicTransform, BasicTransform]:
    """Splits nnU-Net's training transforms for images without labels: geometry, intensity, outside mask.

    Mirroring moves from the end to the other spatial transforms, so that a weak view (geometry only) and a strong one
    (geometry and intensity) show the same voxels. Everything that concerns labels only is left out.

    Raises:
        NotImplementedError: a transform of which it is not known whether it moves voxels.
    """
    geometry = [t for t in transforms.transforms if isinstance(t, GEOMETRY)]
    masking = [t for t in transforms.transforms if isinstance(t, MaskImageTransform)]
    skipped = (*GEOMETRY, MaskImageTransform, *NEEDS_LABELS)
    intensity = [t for t in transforms.transforms if not isinstance(t, skipped)]
    for transform in intensity:
        if not isinstance(getattr(transform, "transform", transform), ImageOnlyTransform):
            raise NotImplementedError(
                f"The augmentation of unlabeled images does not support {transform}. Use nnU-Net's default training "
                f"transforms, or extend split_transforms in nnunet_ssl/data/augmentation.py."
            )
    return ComposeTransforms(geometry), ComposeTransforms(intensity), ComposeTransforms(masking)


def augments_on_device() -> bool:
    """Whether `nnUNet_ssl_augment` moves the intensity transforms of unlabeled patches to the training device.

    Raises: ValueError for any other value than "device" and "workers".
    """
    where = os.environ.get(AUGMENT, "workers")
    if where not in ("device", "workers"):
        raise ValueError(f"{AUGMENT}={where} is not known. Set it to device or workers, or unset it.")
    return where == "device"


class OnDevice:
    """nnU-Net's intensity transforms of patches that are on the training device, so that no worker spends time on them.

    They are the same transforms with the same probabilities: what is drawn at random is drawn on the host, so that it
    does not wait for the device; only the noise itself is drawn there.

    Args:
        transforms: nnU-Net's training transforms of the labeled stream.

    Raises:
        NotImplementedError: a transform that nnU-Net does not use by default; others make tensors on the host.
    """

    def __init__(self, transforms: ComposeTransforms):
        _, intensity, masking = split_transforms(transforms)
        own = deepcopy(intensity.transforms)  # the loaders go on with theirs
        self.transforms = [(getattr(t, "transform", t), getattr(t, "apply_probability", 1)) for t in own]
        for transform, _ in self.transforms:
            if not isinstance(transform, KNOWN_ON_DEVICE):
                raise NotImplementedError(f"{AUGMENT}=device does not support {transform}. Unset {AUGMENT}.")
            if isinstance(transform, GaussianBlurTransform):
                transform.benchmark = False  # a clock on the host cannot tell which way of blurring is faster
        self.masked = [channel for mask in masking.transforms for channel in mask.apply_to_channels]

    def __call__(self, weak: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor]:
        """The strong and the weak view.

        Args:
            weak: (B, C, *spatial), with spatial augmentation only.
            outside: (B, 1, *spatial), True where mask-normalised channels shall be 0; None where there are none.
        """
        strong = torch.stack([self.changed(patch) for patch in weak.clone()])
        if outside is None:
            return strong, weak
        channels = torch.zeros(weak.shape[1], dtype=torch.bool)
        channels[self.masked] = True
        zero = outside & channels.to(weak.device, non_blocking=True).view(-1, *[1] * (weak.ndim - 2))
        return strong.masked_fill(zero, 0), weak.masked_fill(zero, 0)

    def changed(self, patch: Tensor) -> Tensor:
        """A patch (C, *spatial), which is changed in place, after all transforms that chance has chosen."""
        on_host = torch.empty(1).expand(patch.shape)  # transforms look at the shape and the device of an image
        for transform, probability in self.transforms:
            if torch.rand(1).item() >= probability:
                continue
            drawn = transform.get_parameters(image=on_host)
            if "apply_idx" in drawn:  # of the noise: an index, which has to be where the image is
                drawn["apply_idx"] = drawn["apply_idx"].to(patch.device, non_blocking=True)
            with patch.device:  # where transforms make tensors of their own
                patch = transform._apply_to_image(patch, **drawn)
        return patch
