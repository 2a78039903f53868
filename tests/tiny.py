"""Tiny nnU-Net datasets for the tests: raw files, plans of toy networks, preprocessed labeled cases, in seconds."""

import io
import json
import multiprocessing.dummy
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2 import paths
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

FEATURES = (4, 8, 16)  # per stage, so three stages
CONV_KEYS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}


def make_raw_dataset(
    dataset_id: int,
    name: str,
    *,
    cases: int,
    unlabeled: int,
    shape: Sequence[int] = (24, 20, 22),
    test: int = 0,
    channels: int = 1,
    seed: int = 0,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    labels: dict | None = None,
    regions_class_order: Sequence[int] | None = None,
) -> Path:
    """Write `nnUNet_raw/DatasetXXX_name`: a bright blob per image on a noisy background, labeled where it is bright.

    Args:
        cases: labeled images `case_000...` in imagesTr and labelsTr.
        unlabeled: images `unlabeled_000...` in imagesUn, without label file; 0 makes no folder.
        test: images `test_000...` in imagesTs, without label file; 0 makes no folder.
        shape: voxels, slices first (z, y, x); a first entry of 1 gives a 2D dataset.
        spacing: millimetres, in the order of `shape`.
        labels: as in dataset.json, default one foreground class. The values 1..n are nested, n innermost; with an
            `ignore` label the last quarter of the slices (of the rows in 2D) is ignored.
        regions_class_order: as in dataset.json, for labels that are regions.
    """
    labels = labels or {"background": 0, "blob": 1}
    folder = Path(paths.nnUNet_raw) / f"Dataset{dataset_id:03d}_{name}"
    rng = np.random.default_rng(seed)
    for prefix, subfolder, count in (("case", "Tr", cases), ("unlabeled", "Un", unlabeled), ("test", "Ts", test)):
        for index in range(count):
            images, label = make_case(rng, shape, channels, labels)
            for channel, image in enumerate(images):
                file = folder / f"images{subfolder}" / f"{prefix}_{index:03d}_{channel:04d}.nii.gz"
                write_image(file, image, spacing)
            if subfolder == "Tr":
                write_image(folder / "labelsTr" / f"{prefix}_{index:03d}.nii.gz", label, spacing)
    description = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    if regions_class_order is not None:
        description["regions_class_order"] = list(regions_class_order)
    (folder / "dataset.json").write_text(json.dumps(description, indent=1))
    return folder


def make_case(rng: np.random.Generator, shape: Sequence[int], channels: int, labels: dict):
    """One case: images (channels, *shape) float32 and its label map (*shape) uint8."""
    ignore = labels.get("ignore")
    classes = max(np.max(value) for name, value in labels.items() if name != "ignore")
    # Per axis, the distance from a center near the middle in thirds of the width; 0 where there is one slice only.
    scaled = [(np.arange(size) / size - rng.uniform(0.4, 0.6)) * 3 * (size > 1) for size in shape]
    radius = np.sqrt(sum(grid**2 for grid in np.meshgrid(*scaled, indexing="ij")))
    label = np.zeros(shape, np.uint8)
    for value in range(1, classes + 1):
        label[radius < 1 - (value - 1) / classes] = value
    images = [100 + 10 * rng.standard_normal(shape) + 60 * label + 5 * channel for channel in range(channels)]
    if ignore is not None:
        axis = 0 if shape[0] > 1 else 1
        label[tuple(slice(-(size // 4), None) if a == axis else slice(None) for a, size in enumerate(shape))] = ignore
    return np.stack(images).astype(np.float32), label


def write_image(file: Path, array: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
    """Write an array (z, y, x) with its spacing (mm, same order); folders are made."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(size) for size in reversed(spacing)])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


class SmallFingerprint(fingerprint_extractor.DatasetFingerprintExtractor):
    """nnU-Net's fingerprint from ten thousand voxels: it draws 10^8 with replacement, seconds even for tiny images."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1e4


def write_dicom(image: sitk.Image, folder: Path) -> None:
    """One file per slice, as a scanner writes them, but in no order of their names."""
    folder.mkdir()
    direction, spacing = image.GetDirection(), image.GetSpacing()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(image.GetDepth()):
        slice_ = sitk.Cast(image[:, :, index], sitk.sitkInt16)
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            "0008|0060": "MR",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.1.1",
            "0020|0037": "\\".join(map(str, (*direction[0:9:3], *direction[1:9:3]))),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0013": str(index),
            "0018|0050": str(spacing[2]),
            "0028|0030": f"{spacing[1]}\\{spacing[0]}",
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(7 * index) % image.GetDepth():03d}.dcm"))
        writer.Execute(slice_)


def plan(
    dataset_id: int,
    configurations: Sequence[str] = ("2d", "3d_fullres"),
    patch_size: dict[str, Sequence[int]] | None = None,
    *,
    batch_size: int = 2,
    residual: bool = False,
    preprocess_cases: bool = True,
) -> Path:
    """Plan a raw dataset with nnU-Net, shrink the planned networks, preprocess the labeled cases.

    Args:
        configurations: those that are shrunk and preprocessed; they must be among the planned ones.
        patch_size: voxels per configuration; default 16 along every axis.
        residual: ResidualEncoderUNet in place of PlainConvUNet.
        preprocess_cases: False stops after the plans.

    Returns:
        The folder `nnUNet_preprocessed/DatasetXXX_name`, with `nnUNetPlans.json` in it.
    """
    with in_threads():
        extract_fingerprint_dataset(
            dataset_id, SmallFingerprint, num_processes=1, verbose=False, show_progress_bar=False
        )
        plan_experiment_dataset(dataset_id)
        folder = Path(paths.nnUNet_preprocessed) / convert_id_to_dataset_name(dataset_id)
        file = folder / "nnUNetPlans.json"
        plans = json.loads(file.read_text(encoding="utf-8"))
        for name in configurations:
            size = (patch_size or {}).get(name)
            shrink(plans["configurations"][name], patch_size=size, batch_size=batch_size, residual=residual)
        file.write_text(json.dumps(plans, indent=1))
        if preprocess_cases:
            preprocess_dataset(
                dataset_id, configurations=list(configurations), num_processes=[1], show_progress_bar=False
            )
    return folder


def preprocess(dataset_id: int, configurations: Sequence[str]) -> None:
    """Fingerprint and preprocess a raw dataset whose plans are there already."""
    with in_threads():
        extract_fingerprint_dataset(
            dataset_id, SmallFingerprint, num_processes=1, verbose=False, show_progress_bar=False
        )
        preprocess_dataset(dataset_id, configurations=list(configurations), num_processes=[1], show_progress_bar=False)


@contextmanager
def in_threads():
    """Threads in place of nnU-Net's spawned processes, each of which would import torch for seconds."""
    threads = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)
    with (
        mock.patch("nnunetv2.utilities.utils.Pool", multiprocessing.dummy.Pool),
        mock.patch.object(fingerprint_extractor, "multiprocessing", threads),
        mock.patch.object(default_preprocessor, "multiprocessing", threads),
        mock.patch.dict(os.environ, nnUNet_n_proc_DA="1"),  # 0 is good for training and crashes planning
    ):
        yield


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can become larger than so many bytes in the block, as on a full disk."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with mock.patch.object(sys, "dont_write_bytecode", True):  # Python cuts it off without an error
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def shrink(configuration: dict, *, patch_size: Sequence[int] | None, batch_size: int, residual: bool) -> None:
    """Give one configuration of the plans a toy network, a small patch and a small batch, in place."""
    dimensions = len(configuration["spacing"])
    stages = len(FEATURES)
    architecture = configuration["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet." + (
        "ResidualEncoderUNet" if residual else "PlainConvUNet"
    )
    kwargs = architecture["arch_kwargs"]
    for key in CONV_KEYS.values():
        kwargs.pop(key, None)
    kwargs |= {
        "n_stages": stages,
        "features_per_stage": list(FEATURES),
        "kernel_sizes": [[3] * dimensions] * stages,
        "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
        CONV_KEYS[architecture["network_class_name"].rpartition(".")[2]]: [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
    }
    configuration["patch_size"] = list(patch_size or [16] * dimensions)
    configuration["batch_size"] = batch_size


def nnunet_command(program: str, *arguments: str) -> str:
    """Runs a console command by its own entry point, with threads for its workers; returns what it prints.

    A process of its own would import everything again, for longer than it works.
    """
    (command,) = metadata.entry_points(group="console_scripts", name=program)
    output = io.StringIO()
    with (
        redirect_stdout(output),
        mock.patch.object(sys, "argv", [program, *arguments]),
        mock.patch.object(multiprocessing, "get_context", return_value=multiprocessing.dummy),
        mock.patch.object(torch, "set_num_threads"),  # nnU-Net takes all cores, where other tests run too
    ):
        command.load()()
    return output.getvalue()
