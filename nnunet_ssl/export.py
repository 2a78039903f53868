"""Exporting a model that plain nnU-Net predicts with: the trainer's name is nnU-Net's own, our state is left out."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from tqdm import tqdm

from nnunet_ssl.trainer import CHECKPOINT_KEY

PROVENANCE_KEY = "nnunet_ssl_provenance"
MODEL_FILES = ("plans.json", "dataset.json", "dataset_fingerprint.json")  # the last one only where it is there
FOLD_FILES = ("debug.json", "progress.png", "network_architecture.pdf", "validation/summary.json")  # where there


def export_model(
    dataset: str,
    configuration: str,
    trainer: str,
    output: Path,
    folds: Sequence[int | str] | None = None,
    plans_identifier: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    network: str | None = None,
) -> dict[str, str]:
    """Writes a trained model as one of nnUNetTrainer, for machines on which only nnU-Net is installed.

    Args:
        dataset: id or name.
        configuration: of the trained model.
        trainer: one of ours.
        output: a new folder, the model folder of nnUNetv2_predict_from_modelfolder; or, ending in .zip, a file for
            nnUNetv2_install_pretrained_model_from_zip. A file is replaced.
        folds: numbers or "all"; None: those that are trained.
        plans_identifier: of the trained model.
        checkpoint: file name in the folders of the folds.
        network: "student", "teacher" or another network of the checkpoint; None: the deployed one.

    Returns:
        Per fold folder the name of the network that was exported.

    Raises:
        FileNotFoundError: a fold's checkpoint is missing; FileExistsError: the folder is there already.
        ValueError: the model is not of one of our trainers, or has no such network.
        NotImplementedError: the trainer has another architecture than nnUNetTrainer.
    """
    output, dataset = Path(output), str(maybe_convert_to_dataset_name(dataset))
    zipped = output.suffix.lower() == ".zip"
    if not zipped and output.exists():
        raise FileExistsError(f"{output} exists already. Remove it or choose another -o.")
    model = Path(get_output_folder(dataset, trainer, plans_identifier, configuration))
    folders = [f"fold_{fold}" for fold in folds] if folds is not None else _trained_folds(model, checkpoint)
    missing = [str(model / folder / checkpoint) for folder in folders if not (model / folder / checkpoint).is_file()]
    if missing or not folders:
        raise FileNotFoundError(
            f"{', '.join(missing) or f'{model}/fold_*/{checkpoint}'} is missing. Train it first: "
            f"nnUNetv2_train {dataset[7:10]} {configuration} 0 -tr {trainer} -p {plans_identifier}"
        )
    own = recursive_find_trainer_class_by_name(trainer)
    if own.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise NotImplementedError(f"{trainer} builds its own network, which plain nnU-Net does not know.")

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".export_") as scratch:
        inner = Path(dataset, Path(get_output_folder(dataset, "nnUNetTrainer", plans_identifier, configuration)).name)
        target = Path(scratch, inner)
        target.mkdir(parents=True)
        _copy(model, target, MODEL_FILES)
        for folder in model.glob("crossval_results_folds_*"):
            _copy(folder, target / folder.name, ("summary.json", "postprocessing.pkl", "postprocessing.json"))
        exported = {}
        for folder in tqdm(folders, desc="Exporting", unit="fold", disable=None):
            _copy(model / folder, target / folder, FOLD_FILES)
            state = torch.load(model / folder / checkpoint, map_location="cpu", weights_only=False)
            exported[folder] = plain(state, model / folder / checkpoint, network)
            (target / folder).mkdir(exist_ok=True)
            torch.save(state, target / folder / checkpoint)
        if zipped:
            archive = Path(scratch, "model.zip")
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
                for path in sorted(target.rglob("*")):
                    file.write(path, path.relative_to(scratch))
            os.replace(archive, output)
        else:
            os.replace(target, output)
    return exported


def plain(state: dict, file: Path, network: str | None) -> str:
    """Turns a checkpoint of ours into one of nnUNetTrainer, in place; returns the network whose weights it has.

    What it was stays under one extra key, which nnU-Net does not read: trainer, network, version.
    """
    ours = state.pop(CHECKPOINT_KEY, None)
    if ours is None:
        raise ValueError(f"{file} was not written by one of our trainers. Use nnUNetv2_export_model_to_zip.")
    network = network or ours["inference_network"]
    deployed = state["network_weights"]
    networks = {"student": ours["student"], **ours["companions"], ours["inference_network"]: deployed}
    if network not in networks:
        raise ValueError(f"{file} has no network {network!r}; it has {', '.join(sorted(networks))}.")
    weights = networks[network]
    if {k: w.shape for k, w in weights.items()} != {k: w.shape for k, w in deployed.items()}:
        raise ValueError(f"{file}: plain nnU-Net cannot load {network}, whose architecture is another one.")
    version = metadata.version("nnunet-ssl")
    state[PROVENANCE_KEY] = {"trainer": state["trainer_name"], "network": network, "nnunet-ssl": version}
    state.update(network_weights=weights, trainer_name="nnUNetTrainer")
    return network


def _trained_folds(model: Path, checkpoint: str) -> list[str]:
    return sorted(path.parent.name for path in model.glob(f"fold_*/{checkpoint}"))


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
