"""A small synthetic dataset, nnU-Net's own commands on it, and the Dice of nnUNetTrainer and nnUNetTrainerM3HL."""

import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import binary_dilation, gaussian_filter, label as components
from scipy.spatial.transform import Rotation
from tqdm import tqdm

DATASET = "Dataset999_Demo"
CONFIGURATION = "demo"
EPOCHS = 5  # of nnU-Net, so 250 steps each
TRAINERS = (f"nnUNetTrainer_{EPOCHS}epochs", f"nnUNetTrainerM3HL_{EPOCHS}epochs")
CASES = {"labeled": 4, "unlabeled": 16, "test": 8}
SHAPE = (24, 32, 32)  # voxels of a scan
SPACING = 3.0  # mm, along every axis
PATCH = (20, 24, 24)  # voxels
FEATURES = (8, 16, 32)  # of the network, per stage
BATCH_SIZE = 2
SEED = 0


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], scale: float) -> np.ndarray:
    """Random field with mean 0 and standard deviation 1; structures are about `scale` voxels wide."""
    field = gaussian_filter(rng.standard_normal(shape), scale, mode="wrap")
    return (field - field.mean()) / field.std()


def ellipsoid(grid: np.ndarray, center: np.ndarray, radii: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Distance of every voxel from the center in units of the radii: 1 on the surface, less inside."""
    return np.linalg.norm(np.tensordot(rotation, grid - center[:, None, None, None], 1) / radii[:, None, None, None], axis=0)


def make_case(rng: np.random.Generator, shape: Sequence[int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij"))
    size = np.array(shape, dtype=float)
    unit = size.min()

    # the organ: two or three joined chambers with an uneven surface
    center = size * rng.uniform(0.38, 0.62, 3)
    radii = unit * rng.uniform(0.17, 0.26, 3)
    rotation = Rotation.random(random_state=rng).as_matrix()
    surface = ellipsoid(grid, center, radii, rotation)
    for _ in range(rng.integers(1, 3)):
        direction = rng.standard_normal(3)
        direction /= np.linalg.norm(direction)
        chamber = ellipsoid(grid, center + 0.9 * radii.mean() * direction, 0.7 * radii, rotation)
        surface = np.minimum(surface, chamber)
    organ = surface + 0.12 * smooth_noise(rng, shape, 2.5) < 1
    organ[[0, -1]] = organ[:, [0, -1]] = organ[:, :, [0, -1]] = False
    parts, _ = components(organ)
    organ = parts == np.bincount(parts[parts > 0]).argmax()

    # distractors as bright as the organ: vessels that may touch it, and balls that do not
    distractors = np.zeros(shape, bool)
    for _ in range(rng.integers(2, 5)):
        start = size * rng.uniform(0, 1, 3)
        direction = rng.standard_normal(3)
        direction /= np.linalg.norm(direction)
        offset = grid - start[:, None, None, None]
        along = np.tensordot(direction, offset, 1)
        distance = np.linalg.norm(offset - along * direction[:, None, None, None], axis=0)
        distractors |= distance < unit * rng.uniform(0.04, 0.09)
    free = ~binary_dilation(organ, iterations=2)
    for _ in range(rng.integers(3, 7)):
        ball = ellipsoid(grid, size * rng.uniform(0, 1, 3), unit * rng.uniform(0.07, 0.16, 3), np.eye(3))
        distractors |= (ball < 1) & free
    distractors &= ~organ

    contrast = rng.uniform(40, 90)
    image = 100 + 12 * smooth_noise(rng, shape, 3)
    image += contrast * gaussian_filter((organ + distractors * rng.uniform(0.8, 1.1)).astype(float), 0.6)
    position = (grid / size[:, None, None, None] - 0.5)
    direction = rng.standard_normal(3)
    image *= np.exp(rng.uniform(0, 0.8) * np.tensordot(direction / np.linalg.norm(direction), position, 1))
    image += rng.uniform(5, 25) * rng.standard_normal(shape)
    return image.astype(np.float32), organ.astype(np.uint8)


def write_dataset(folder: Path, seed: int = SEED) -> None:
    """Writes the raw dataset: imagesTr with labelsTr, imagesUn without, imagesTs with labels only for the Dice."""
    rng = np.random.default_rng(seed)
    for kind, ending in (("labeled", "Tr"), ("unlabeled", "Un"), ("test", "Ts")):
        for index in range(CASES[kind]):
            case = f"{kind}_{index:03d}"
            image, label = make_case(rng)
            write_image(folder / f"images{ending}" / f"{case}_0000.nii.gz", image)
            if kind != "unlabeled":
                write_image(folder / f"labels{ending}" / f"{case}.nii.gz", label)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": CASES["labeled"],
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=4))


def write_image(file: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([SPACING] * 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def add_configuration(file: Path) -> None:
    """Adds a configuration to the plans that a CPU can train in minutes, on the data of 3d_fullres."""
    plans = json.loads(file.read_text())
    architecture = json.loads(json.dumps(plans["configurations"]["3d_fullres"]["architecture"]))
    stages = len(FEATURES)
    architecture["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=FEATURES,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    plans["configurations"][CONFIGURATION] = {
        "inherits_from": "3d_fullres",
        "patch_size": PATCH,
        "batch_size": BATCH_SIZE,
        "architecture": architecture,
    }
    file.write_text(json.dumps(plans, indent=4))
