"""How the loaders of a training are run: nnU-Net's workers, the first batches, and augmentation that repeats."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_ssl.system.wording import counted


def start_loaders(training: DataLoader, validation: DataLoader, device: torch.device, channels: int, described: Path):
    """Starts nnU-Net's workers, as many as nnU-Net would, and draws the first batch of each loader.

    Args:
        training: gives the keys "data" and "unlabeled", or one of them.
        validation: nnU-Net's.
        device: of the training.
        channels: that the network expects.
        described: the dataset.json that says so.

    Returns:
        Iterators over the batches of both.

    Raises:
        ValueError: labeled images have another number of channels.
    """
    workers = get_allowed_n_proc_DA()
    train = _augmenter(training, workers, max(6, workers // 2), device)
    val = _augmenter(validation, min(workers, max(1, workers // 2)), max(3, workers // 4), device)
    batch = next(train)
    next(val)
    found = batch["data"].shape[1] if "data" in batch else channels
    if found != channels:
        raise ValueError(
            f"The preprocessed labeled cases have {counted(found, 'channel')}, but dataset.json has {channels}. "
            f"Correct {described}, or preprocess again."
        )
    return train, val


class KeptItems:
    """The items of a loader, the last one again wherever `again` says so; all else is the loader's."""

    def __init__(self, loader: Iterator[dict], again: Callable[[], bool]):
        self.loader, self.again, self.item = loader, again, None

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self.item is None or not self.again():
            self.item = next(self.loader)
        return self.item

    def __getattr__(self, name):
        if name == "loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)


def stop_loaders(*loaders) -> None:
    """Ends the workers of loaders, which nnU-Net leaves behind when it is interrupted; None is passed over."""
    for loader in loaders:
        loader = loader.loader if isinstance(loader, KeptItems) else loader
        if isinstance(loader, NonDetMultiThreadedAugmenter):
            loader._finish()


def make_repeatable(transforms: ComposeTransforms) -> None:
    """Makes nnU-Net's training transforms depend on the seed alone, in place."""
    for transform in transforms.transforms:
        blur = getattr(transform, "transform", None)
        if isinstance(blur, GaussianBlurTransform):
            blur.benchmark = False  # it times two ways of blurring and takes the faster one


def _augmenter(loader, workers: int, cached: int, device: torch.device):
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    pin = device.type == "cuda"
    return NonDetMultiThreadedAugmenter(loader, None, workers, cached, pin_memory=pin, wait_time=0.002)
