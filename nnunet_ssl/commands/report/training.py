"""What nnU-Net's folder of a fold says about a training: how far it is, its settings, its curves, its warnings."""

import os
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2 import paths
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl import trainer as base
from nnunet_ssl.commands.report.page import Table
from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.preprocessed import find_unlabeled, finished_cases
from nnunet_ssl.data.splits import read_fold
from nnunet_ssl.system.files import read_json
from nnunet_ssl.system.wording import counted
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY, CHECKPOINTS, read_newest
from nnunet_ssl.training.history import History
from nnunet_ssl.training.variants import STOCK_SETTINGS

FURTHER_SETTINGS = ("batch_size", "seed")  # of nnU-Net's and our trainers, beside STOCK_SETTINGS


class Training(NamedTuple):
    """A training as its files have it.

    Attributes:
        folder: of the fold.
        checkpoint: file that was read; None where there is none.
        epoch: epochs that are done.
        epochs: of the whole training; None where that is not known.
        deployed: the network that predicts; empty where that is not known.
        networks: "student" and the others; none of a stock training.
        supervised_epochs: of the first phase.
        logging: nnU-Net's values of every epoch, by their names.
        debug: nnU-Net's debug.json, all texts.
        notes: what was wrong with its files.
    """

    folder: Path
    trainer: str
    fold: int | str
    plans: PlansManager
    configuration: str
    dataset_json: dict[str, Any]
    checkpoint: Path | None
    epoch: int
    epochs: int | None
    deployed: str
    networks: list[str]
    supervised_epochs: int
    logging: dict[str, list]
    debug: dict[str, str]
    notes: list[str]

    @property
    def finished(self) -> bool:
        """Whether the last checkpoint is there."""
        return self.checkpoint is not None and self.checkpoint.name == CHECKPOINTS[0]

    @property
    def preprocessed(self) -> Path:
        return Path(paths.nnUNet_preprocessed, self.plans.dataset_name)


def read_training(dataset: str, trainer: str, plans: str, configuration: str, fold: int | str) -> Training:
    """Reads the small files of a training, and of its last checkpoint what is small.

    Raises: FileNotFoundError without a training; ValueError that names a damaged file.
    """
    folder = Path(get_output_folder(dataset, trainer, plans, configuration, fold))
    if not folder.is_dir():
        command = f"nnUNetv2_train {dataset[7:10]} {configuration} {fold} -tr {trainer} -p {plans}"
        raise FileNotFoundError(f"{folder} does not exist: there is no such training. Train first: {command}")
    dataset_json = read_dataset_json(folder.parent / "dataset.json", "channel_names", "labels", "file_ending")
    manager = PlansManager(read_json(folder.parent / "plans.json"))
    debug = read_json(folder / "debug.json") if (folder / "debug.json").is_file() else {}
    if not isinstance(debug, dict):
        raise ValueError(f"{folder / 'debug.json'} is damaged. Remove it; the training is not affected.")
    debug, notes = {str(name): str(value) for name, value in debug.items()}, []
    kept = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    file, checkpoint = read_newest(kept[0], True, notes.append) if kept else (None, {})
    ours = checkpoint.get(CHECKPOINT_KEY, {})
    known = debug.get("supervised_epochs", "")
    supervised_epochs = ours.get("supervised_epochs", int(known) if known.isdecimal() else 0)
    rows = History(folder).columns().get("epoch", ())
    epochs = debug.get("num_epochs", "")
    return Training(
        folder,
        trainer,
        fold,
        manager,
        configuration,
        dataset_json,
        file,
        max([int(checkpoint.get("current_epoch", 0)), *(int(row) + 1 for row in rows)]),
        int(epochs) if epochs.isdecimal() else None,
        ours.get("inference_network", ""),
        ["student", *ours["companions"]] if ours else [],
        supervised_epochs,
        checkpoint.get("logging", {}),
        debug,
        notes,
    )


def state_of(training: Training) -> str:
    """How far the training is, in a sentence."""
    of = "" if training.epochs is None else f" of {training.epochs}"
    if training.finished:
        return f"finished, {training.epoch}{of} epochs"
    if training.checkpoint is None:
        return f"not finished: epoch {training.epoch}{of}, no checkpoint yet"
    return f"not finished: epoch {training.epoch}{of}, last checkpoint {training.checkpoint.name}"


def header(training: Training) -> list[tuple[str, str]]:
    """What made the model, beside what the heading says: names and their values."""
    facts = [
        ("Configuration", f"{training.configuration}, {training.plans.plans_name}"),
    ]
    if training.networks:
        facts.append(("Deployed network", f"{training.deployed} (of {', '.join(training.networks)})"))
    if training.checkpoint is not None:
        changed = datetime.fromtimestamp(training.checkpoint.stat().st_mtime)
        facts.append(("Checkpoint", f"{training.checkpoint.name}, {changed:%Y-%m-%d %H:%M}"))
    begins, ends = (training.logging.get(f"epoch_{moment}_timestamps", []) for moment in ("start", "end"))
    if ends:
        seconds = sum(end - begin for begin, end in zip(begins, ends, strict=False))
        facts.append(("Time of all epochs", str(timedelta(seconds=round(seconds)))))
    used = [training.debug[name] for name in ("gpu_name", "torch_version") if name in training.debug]
    return facts + ([("Trained with", ", ".join(["torch " + used[-1], *used[:-1]]))] if used else [])


def data_and_plans(training: Training) -> list[tuple[str, str]]:
    """Numbers of cases, and what nnU-Net has planned: names and their values."""
    manager = training.plans.get_configuration(training.configuration)
    network = manager.network_arch_init_kwargs
    features = ", ".join(map(str, network.get("features_per_stage", ())))
    stages = f", {network['n_stages']} stages, {features} features" if "n_stages" in network else ""
    return [
        *cases_of(training),
        ("patch", f"{as_size(manager.patch_size)} voxels"),
        ("batch", counted(manager.batch_size, "patch", "patches")),
        ("spacing", f"{as_size(np.round(manager.spacing, 3))} mm"),
        ("median scan", f"{as_size(np.round(manager.median_image_size_in_voxels).astype(int))} voxels at this spacing"),
        ("normalization", ", ".join(manager.normalization_schemes)),
        ("network", manager.network_arch_class_name.rpartition(".")[2] + stages),
    ]


def as_size(values: Sequence) -> str:
    """Numbers per axis, as "20 x 28 x 28"."""
    return " x ".join(f"{value:g}" for value in values)


def cases_of(training: Training) -> list[tuple[str, str]]:
    """How many cases the fold has for what."""
    folder = training.preprocessed
    identifier = training.plans.get_configuration(training.configuration).data_identifier
    splits = folder / "splits_final.json"
    if training.fold == "all":
        every = finished_cases(folder / identifier)
        numbers = {"labeled": len(every), "validation": len(every)}
        listed = []
    elif splits.is_file():
        try:
            fold = read_fold(splits, training.fold)
        except ValueError as error:  # the split has changed since the training
            return [("cases", f"not known here: {error}")]
        numbers, listed = {"labeled": len(fold["train"]), "validation": len(fold["val"])}, fold["unlabeled"]
    else:
        return [("cases", f"not known here: {splits} is missing")]
    found = [(f"{kind} cases", str(number)) for kind, number in numbers.items()]
    try:
        return [*found, ("unlabeled cases", str(len(find_unlabeled(folder, identifier, listed))))]
    except (OSError, ValueError) as error:  # data that was removed or changed since the training
        return [*found, ("unlabeled cases", f"not known here: {error}")]


def settings_of(training: Training) -> Table:
    """Settings of the method and of nnU-Net's training as they were in this training, with what they mean."""
    meanings = {}
    for file in (*trainer_files(training.trainer), Path(base.__file__)):
        text = file.read_text(encoding="utf-8")
        for name, meaning in re.findall(r"^    (\w+)(?:: [\w | ]+)? = [^#\n]+(?:# (.*))?$", text, re.MULTILINE):
            meanings[name] = meanings.get(name) or meaning
    stock = dict.fromkeys((*STOCK_SETTINGS, *FURTHER_SETTINGS), "nnU-Net's")
    names = [name for name in {**meanings, **stock} if name in training.debug]
    rows = [(name, training.debug[name], meanings.get(name) or stock.get(name, "")) for name in names]
    return Table(("setting", "value", "meaning"), rows)


def trainer_files(name: str) -> list[Path]:
    """The file of a trainer, or of the one whose number of epochs it varies, and those of its base classes.

    They are looked for in the folders of nnUNet_extTrainer and read, not imported.
    """
    folders = [Path(folder) for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]
    found, left = [], [name]
    while left:
        wanted = left.pop(0)
        for file in [file for folder in folders for file in sorted(folder.glob("*.py"))]:
            classes = dict(re.findall(r"^class (\w+)\(([^)]*)\)", file.read_text(encoding="utf-8"), re.MULTILINE))
            own = wanted if wanted in classes else re.sub(r"_\d+epochs$", "", wanted)
            if own in classes and file not in found:
                found.append(file)
                left += re.findall(r"\w+", classes[own])
                break
    return found
