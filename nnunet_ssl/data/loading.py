"""The batch that a method sees, and how its labeled and unlabeled patches are read and augmented."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnunet_ssl.blocks.distances import signed_distances
from nnunet_ssl.data.augmentation import OnDevice, split_transforms
from nnunet_ssl.system.pool import exit_with_parent

OUTSIDE = 1e-3  # normalised intensity; below it in every mask-normalised channel a voxel lies outside the mask


@dataclass
class Batch:
    """What a method sees of one step, on the device; B is the planned batch size.

    Attributes:
        image: labeled images (B, C, *spatial).
        target: their labels as nnU-Net gives them: classes (B, 1, *spatial), or regions (B, regions, *spatial) and,
            with an ignore label, one more channel; with deep supervision a list, full size first.
        unlabeled: unlabeled images (B, C, *spatial), fully augmented. There is no target of them anywhere.
        unlabeled_weak: the same crops with spatial augmentation only; None unless the method sets `weak_view`.
        signed_distance: of the labeled images, (B, foreground classes or regions, *spatial), float32, see
            `signed_distances`; None unless the method sets `signed_distance`.

    What the method does not learn from in this part of the training is None, see `SemiSupervisedTrainer.streams`.
    """

    image: Tensor | None
    target: Tensor | list[Tensor] | None
    unlabeled: Tensor | None
    unlabeled_weak: Tensor | None = None
    signed_distance: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """The target at full resolution."""
        return self.target[0] if isinstance(self.target, list) else self.target

    def rolled(self, shift: int) -> "Batch":
        """The same batch beginning with sample `shift` (modulo B), the earlier ones at its end."""
        return self if shift % len(self.image) == 0 else self._each(lambda x: x.roll(-shift, 0))

    def part(self, samples: slice) -> "Batch":
        """Some of the samples of all patches; a view."""
        return self._each(lambda x: x[samples])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(x):
            if isinstance(x, list):
                return [changed(scale) for scale in x]
            return None if x is None else change(x)

        return Batch(**{name: changed(value) for name, value in vars(self).items()})


def to_device(item: dict, device: torch.device, weak_view: bool, intensity: OnDevice | None = None) -> Batch:
    """An item of the loaders as a batch on the device.

    Args:
        item: of the loaders.
        device: of the training.
        weak_view: the batch has it.
        intensity: what makes the unlabeled patches of the weak view on the device; None: the loaders have made them.
    """

    def move(x):
        return [move(scale) for scale in x] if isinstance(x, list) else x.to(device, non_blocking=True)

    names = {"data", "target", "unlabeled", "unlabeled_weak", "outside", "signed_distance"} & item.keys()
    given = {name: move(item[name]) for name in names}
    unlabeled, weak = given.get("unlabeled"), given.get("unlabeled_weak")
    if intensity is not None and weak is not None:
        unlabeled, weak = intensity(weak, given.get("outside"))
    weak = weak if weak_view else None
    return Batch(given.get("data"), given.get("target"), unlabeled, weak, given.get("signed_distance"))


class UnlabeledDataset:
    """Preprocessed images without anything that was derived from a label.

    Only `<case>.b2nd` is ever opened: not `<case>_seg.b2nd`, and not `<case>.pkl`, which holds class locations.

    Args:
        files: case identifier to its preprocessed image; nothing is opened here.
        predicted: case identifier to the file with its predicted class locations, see `predicted_foreground`.
    """

    def __init__(self, files: dict[str, Path], predicted: dict[str, Path] | None = None):
        self.files = files
        self.predicted = predicted or {}
        self.identifiers = sorted(files)

    def __len__(self) -> int:
        return len(self.files)

    def load_image(self, identifier: str) -> blosc2.NDArray:
        """The image (C, *spatial), normalised and resampled; read lazily, so that a crop reads only its blocks."""
        # memory maps fail on Windows, as nnU-Net notes in its own dataset class
        mmap = {} if os.name == "nt" else {"mmap_mode": "r"}
        return blosc2.open(urlpath=str(self.files[identifier]), mode="r", dparams={"nthreads": 1}, **mmap)

    def damaged(self, identifier: str, error: Exception) -> RuntimeError:
        """What to raise where a case cannot be read."""
        return RuntimeError(
            f"{self.files[identifier]} is missing or damaged ({error}). Remove the files of this case there and "
            f"preprocess it again, then continue the training with --c."
        )

    def class_locations(self, identifier: str) -> dict | None:
        """Where a model found which class, as nnU-Net has it; None where it has not looked at this case."""
        file = self.predicted.get(identifier)
        if file is None:
            return None
        try:
            return load_pickle(str(file))["class_locations"]
        except Exception as error:  # pickle raises anything for a damaged file
            if of_the_system(error):
                raise
            raise RuntimeError(
                f"{file} is missing or damaged ({error}). Run nnUNetv2_preprocess for its dataset again, then continue "
                f"the training with --c."
            ) from error


class UnlabeledDataLoader(nnUNetDataLoader):
    """Random crops of unlabeled images: nnU-Net's loader without anything that a label decides.

    Where the dataset has predicted class locations, the last crops of a batch are centred on predicted foreground, as
    those of the labeled images on foreground.

    Args:
        dataset: the unlabeled images.
        batch_size: crops per batch.
        patch_size: size of the crop before the spatial augmentation.
        final_patch_size: size of the crop that the network sees.
        transforms: nnU-Net's training transforms of the labeled stream.
        weak_view: also give every crop with spatial augmentation only.
        strong_view: give the crops with all of the augmentation; without it, what is outside of the mask comes along.
        sampling: nnU-Net's settings of the oversampling.
    """

    def __init__(
        self,
        dataset,
        batch_size,
        patch_size,
        final_patch_size,
        label_manager,
        transforms,
        weak_view,
        strong_view=True,
        **sampling,
    ):
        super().__init__(dataset, batch_size, patch_size, final_patch_size, label_manager, **sampling)
        self.has_ignore = False  # crops of labeled images keep to annotated voxels; here there are none
        self.geometry, self.intensity, self.masking = split_transforms(transforms)
        self.weak_view, self.strong_view = weak_view, strong_view

    def get_indices(self):
        self.drawn = super().get_indices()
        return self.drawn

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        begin_worker()

    def generate_train_batch(self) -> dict[str, Tensor]:
        views = []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for position, identifier in enumerate(self.get_indices()):
                oversample = self._data.predicted and self.get_do_oversample(position)
                found = self._data.class_locations(identifier) if oversample else None
                try:
                    image = self._data.load_image(identifier)
                    lower, upper = self.get_bbox(image.shape[1:], force_fg=bool(found), class_locations=found)
                    box = [list(bounds) for bounds in zip(lower, upper, strict=True)]
                    crop = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
                except Exception as error:  # blosc2 raises anything for a damaged file
                    if of_the_system(error):
                        raise
                    raise self._data.damaged(identifier, error) from error
                views.append(self.augment(crop[:, 0] if self.patch_size_was_2d else crop))
        return {name: torch.stack([view[name] for view in views]) for name in views[0]}

    def augment(self, crop: Tensor) -> dict[str, Tensor]:
        """Views of a crop (C, *spatial): `unlabeled` and, where it is asked for, `unlabeled_weak`.

        Without the strong view: `unlabeled_weak` and the mask `outside` (1, *spatial) that belongs to it.
        """
        sample = {"image": crop}
        if self.masking.transforms:
            # nnU-Net's mask is -1 outside; read off the image, because stored segmentations know the labels
            normalised = crop[self.masking.transforms[0].apply_to_channels]
            sample["segmentation"] = -(normalised.abs() < OUTSIDE).all(0, keepdim=True).to(torch.int16)
        weak = self.geometry(**sample)
        if not self.strong_view:
            outside = {"outside": weak["segmentation"] < 0} if "segmentation" in weak else {}
            return {"unlabeled_weak": weak["image"], **outside}
        # intensity transforms work in place
        strong = self.intensity(**{**weak, "image": weak["image"].clone()})
        views = {"unlabeled": self.masking(**strong)["image"]}
        if self.weak_view:
            views["unlabeled_weak"] = self.masking(**{**weak, "image": weak["image"].clone()})["image"]
        return views


class LabeledDataLoader(nnUNetDataLoader):
    """nnU-Net's loader, which says which of its files are damaged, and with `distances` gives signed distances too."""

    def __init__(self, *args, label_manager, distances: bool = False, **kwargs):
        super().__init__(*args, label_manager=label_manager, **kwargs)
        self.label_manager, self.distances = label_manager, distances

    def get_indices(self):
        self.drawn = super().get_indices()
        return self.drawn

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        begin_worker()

    def generate_train_batch(self) -> dict:
        try:
            batch = super().generate_train_batch()
        except Exception as error:  # blosc2 raises anything for a damaged file
            damaged = [case for case in dict.fromkeys(self.drawn) if not self.is_sound(case)]
            if of_the_system(error) or not damaged:
                raise
            raise RuntimeError(
                f"Files of {', '.join(damaged)} in {self._data.source_folder} are missing or damaged ({error}). Run "
                f"nnUNetv2_preprocess for this configuration again, then continue the training with --c."
            ) from error
        if self.distances:
            target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
            batch["signed_distance"] = signed_distances(*foreground(target, self.label_manager))
        return batch

    def is_sound(self, case: str) -> bool:
        """Whether all of a case can be read."""
        try:
            image, segmentation, _, _ = self._data.load_case(case)
            return image[:].shape[1:] == segmentation[:].shape[1:]
        except Exception:  # whatever it is: the case cannot be read
            return False


def of_the_system(error: Exception) -> bool:
    """Whether a file could not be read for another reason than the file: memory, too many open files, a drive."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.ENOENT)


def foreground(target: Tensor, labels: LabelManager) -> tuple[Tensor, Tensor]:
    """Voxels of every foreground class or region (B, K, *spatial), and those that are annotated (B, 1, *spatial): bool.

    Args:
        target: at full resolution, as nnU-Net gives it.
        labels: nnU-Net's.
    """
    if labels.has_regions:
        regions, ignored = target.bool().tensor_split([labels.num_segmentation_heads], 1)
        return regions, ~ignored.any(1, keepdim=True)
    annotated = torch.ones_like(target, dtype=torch.bool)
    if labels.has_ignore_label:
        annotated = target != labels.ignore_label
    return torch.cat([target == label for label in labels.foreground_labels], 1), annotated


def begin_worker() -> None:
    """In a worker: nnU-Net's go on for ever when the training is killed, and draw the same of torch's numbers."""
    if parent_process() is not None:
        exit_with_parent()
        torch.manual_seed(np.random.randint(2**31))  # those of numpy differ


class PairedDataLoader(DataLoader):
    """Labeled and unlabeled crops as one item, so that nnU-Net's own workers and their number serve both."""

    def __init__(self, labeled: nnUNetDataLoader, unlabeled: UnlabeledDataLoader):
        super().__init__(None, labeled.batch_size, infinite=True)
        self.labeled = labeled
        self.unlabeled = unlabeled

    def generate_train_batch(self) -> dict:
        return {**self.labeled.generate_train_batch(), **self.unlabeled.generate_train_batch()}

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        self.labeled.set_thread_id(thread_id)
        self.unlabeled.set_thread_id(thread_id)


def make_loaders(
    train,
    unlabeled: UnlabeledDataset | None,
    val,
    sizes: tuple,
    transforms: tuple,
    views: dict[str, bool],
    sampling: dict,
    distances: bool = False,
) -> tuple[DataLoader, DataLoader]:
    """The loaders of training and validation batches; no worker runs yet.

    Args:
        train: nnU-Net's dataset of the labeled cases; None: unlabeled crops alone.
        unlabeled: of the unlabeled cases, whose crops come with those of the labeled ones; None: labeled crops alone.
        val: nnU-Net's dataset of the validation cases.
        sizes: batch size, size of the crop before the spatial augmentation, and the network's.
        transforms: nnU-Net's for training and for validation.
        views: of unlabeled crops, `weak_view` and `strong_view`.
        sampling: nnU-Net's label manager and settings of the oversampling.
        distances: labeled crops for training come with their signed distances.
    """
    options = {"transforms": transforms[0], **sampling}
    parts: list[DataLoader] = []
    if train is not None:
        parts.append(LabeledDataLoader(train, *sizes, distances=distances, **options))
    if unlabeled is not None:
        parts.append(UnlabeledDataLoader(unlabeled, *sizes, **views, **options))
    training = PairedDataLoader(*parts) if len(parts) == 2 else parts[0]
    batch_size, _, patch_size = sizes
    return training, LabeledDataLoader(val, batch_size, patch_size, patch_size, transforms=transforms[1], **sampling)
