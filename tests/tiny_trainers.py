"""Trainers of tiny datasets, for the tests."""

import importlib
import inspect
import json
import random
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.autoregister import trainers_folder
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.training.history import History

# nnU-Net times two ways to blur and takes the faster one, whose rounding differs: tests compare to the last bit
GaussianBlurTransform._benchmark_wrapper = staticmethod(blur_dimension)


def every_trainer(variants: bool = False) -> list[type[SemiSupervisedTrainer]]:
    """All methods in trainers/, and if wanted the classes that change nothing of a method but its settings."""
    found = []
    for file in sorted(Path(trainers_folder()).glob("nnUNetTrainer*.py")):
        module = importlib.import_module(f"nnunet_ssl.trainers.{file.stem}")
        classes = inspect.getmembers(module, inspect.isclass)
        found += [c for name, c in classes if c.__module__ == module.__name__ and issubclass(c, nnUNetTrainer)]
    return [c for c in found if variants or c.__base__ is SemiSupervisedTrainer]


# functions that draw, each with a stand-in that does not: drawing takes ten times as long as a tiny training
DRAWING = [
    # the file has to be there: nnU-Net packs it with a model
    (MetaLogger, "plot_progress_png", lambda _, folder: Path(folder, "progress.png").touch()),
    (History, "draw", lambda *_: None),
]


def draw_nothing() -> None:
    for owner, name, nothing in DRAWING:
        setattr(owner, name, nothing)


def make_trainer(trainer: type, dataset: Path, configuration: str = "3d_fullres", fold: int = 0, **settings):
    """A trainer on the CPU with 2 epochs of 2 steps, made as by nnU-Net's own command; settings are attributes."""
    plans = json.loads((dataset / "nnUNetPlans.json").read_text(encoding="utf-8")) | {"continue_training": False}
    dataset_json = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    made = trainer(plans, configuration, fold, dataset_json, torch.device("cpu"))
    settings = {
        "num_epochs": 2,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
        "supervised_part": 0.0,  # its tests are in training/test_supervised_phase.py
        **settings,
    }
    for name, value in settings.items():
        setattr(made, name, value)
    return made


# setting of a trainer whose loaders give labeled and unlabeled patches in every epoch, whether it needs both or not
EVERY_STREAM = {"_streams_of": lambda epoch: (True, True)}


def seed(value: int = 0) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
