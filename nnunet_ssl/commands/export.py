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
from nnunetv2.utilities.file_path_utilities import folds_tuple_to_string, get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from tqdm import tqdm

from nnunet_ssl.commands.trained_models import further_models, network_weights, trained_folds
from nnunet_ssl.system.quiet import quiet
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY, read_checkpoint

PROVENANCE_KEY = "nnunet_ssl_provenance"
NEEDED = ("plans.json", "dataset.json")
# where they are there; not debug.json, in which our trainers name their cases
FOLD_FILES = ("progress.png", "network_architecture.pdf")


def export_model(
    dataset: str,
    configuration: str,
    trainer: str,
    output: Path,
    folds: Sequence[int | str] | None = None,
    plans_identifier: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    networks: Sequence[str] | None = None,
    also: Sequence[Path] = (),
) -> dict[str, str]:
    """Writes a trained model as one of nnUNetTrainer, for machines on which only nnU-Net is installed.

    Several networks become folds 0, 1, ... of the new model: nnU-Net averages the predictions of folds, so they are an
    ensemble.

    Args:
        dataset: id or name.
        configuration: of the trained model.
        trainer: one of ours.
        output: a new folder, the model folder of nnUNetv2_predict_from_modelfolder; or, ending in .zip, a file for
            nnUNetv2_install_pretrained_model_from_zip. A file is replaced.
        folds: numbers or "all"; None: the numbers that are trained, or else "all".
        plans_identifier: of the trained model.
        checkpoint: file name in the folders of the folds.
        networks: "student", "teacher" or other networks of the checkpoint; None: the deployed one.
        also: further model folders with the same plans, of another seed or trainer of ours, whose folds join in.

    Returns:
        Per fold folder the name of the network that was exported. Validation results go along only with the weights
        that nnU-Net has validated, the deployed network of the final checkpoint, and not with an ensemble.

    Raises:
        FileNotFoundError: a fold's checkpoint is missing; FileExistsError: the folder is there already.
        ValueError: a checkpoint is damaged; the trainer is not one of ours; a model has no such network, or other plans
            than the first one.
        NotImplementedError: the trainer has another architecture than nnUNetTrainer.
    """
    output, dataset = Path(output), str(maybe_convert_to_dataset_name(dataset))
    zipped = output.suffix.lower() == ".zip"
    if output.is_dir() or (output.exists() and not zipped):
        raise FileExistsError(f"{output} exists already. Remove it or choose another -o.")
    model = Path(get_output_folder(dataset, trainer, plans_identifier, configuration))
    folders = [f"fold_{fold}" for fold in (trained_folds(model, checkpoint) if folds is None else folds)]
    require_exportable(trainer)
    files = [model / folder / checkpoint for folder in folders] or [model / "fold_0" / checkpoint]
    missing = [str(file) for file in [*files, *(model / name for name in NEEDED)] if not file.is_file()]
    if missing:
        untrained = (folder for folder in folders if not (model / folder / checkpoint).is_file())
        fold = next(untrained, "fold_0").removeprefix("fold_")
        raise FileNotFoundError(
            f"{', '.join(missing)} is missing. Train it first: "
            f"nnUNetv2_train {dataset[7:10]} {configuration} {fold} -tr {trainer} -p {plans_identifier}"
        )
    sources = [model / folder for folder in folders] + folds_of_others(model, also, checkpoint)
    members = [(source, network) for source in sources for network in dict.fromkeys(networks or [None])]
    # more than one network of a fold, or more than one model: the new model's folds have new numbers
    names = folders if len(members) == len(folders) else [f"fold_{number}" for number in range(len(members))]

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".export_") as scratch:
        inner = Path(dataset, Path(get_output_folder(dataset, "nnUNetTrainer", plans_identifier, configuration)).name)
        target = Path(scratch, inner)
        target.mkdir(parents=True)
        _copy(model, target, (*NEEDED, "dataset_fingerprint.json"))
        exported, validated = {}, names is folders
        progress = tqdm(zip(names, members, strict=True), "Exporting", len(names), unit="fold", disable=None)
        for name, (source, network) in progress:
            exported[name], same = export_fold(source, target / name, checkpoint, network, validated)
            validated &= same
        if validated and "fold_all" not in folders:
            numbers = tuple(int(folder.removeprefix("fold_")) for folder in folders)
            results = f"crossval_results_folds_{folds_tuple_to_string(numbers)}"
            _copy(model / results, target / results, ("summary.json", "postprocessing.pkl", "postprocessing.json"))
        os.replace(_packed(target, Path(scratch)) if zipped else target, output)
    return exported


def require_exportable(trainer: str) -> None:
    """Raises where a trainer is none of ours, or makes networks that plain nnU-Net does not know."""
    with quiet():  # the finder names every file that it opens
        own = recursive_find_trainer_class_by_name(trainer)
    if not issubclass(own, SemiSupervisedTrainer):
        raise ValueError(
            f"{trainer} is no semi-supervised trainer: export makes models of our trainers models of nnUNetTrainer, "
            f"for machines without nnunet-ssl. Share this one as it is: nnUNetv2_export_model_to_zip"
        )
    if own.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise NotImplementedError(f"{trainer} builds its own network, which plain nnU-Net does not know.")


def folds_of_others(model: Path, others: Sequence[Path], checkpoint: str) -> list[Path]:
    """The trained folds of further model folders; raises where one has none, or cannot join the first model."""
    found = further_models(others, model, checkpoint)
    for other in others:
        trainer, *plans = other.resolve().name.split("__")  # trainer, plans, configuration
        if plans != model.name.split("__")[1:]:
            raise ValueError(f"{other} is not of the configuration and plans of {model}. They cannot be joined.")
        require_exportable(trainer)
    return [member.file.parent for member in found]


def export_fold(source: Path, target: Path, checkpoint: str, network: str | None, alone: bool) -> tuple[str, bool]:
    """Writes a fold of the model; its validation goes along where nnU-Net has validated the same weights.

    Args:
        source: folder of the fold.
        target: the same in the exported model; it is made.
        checkpoint: its file name.
        network: one of the checkpoint's; None: the deployed one.
        alone: no other network of the fold is exported.

    Returns:
        Name of the network, and whether its weights are the validated ones.
    """
    _copy(source, target, FOLD_FILES)
    state = read_checkpoint(source / checkpoint)
    deployed = state.get(CHECKPOINT_KEY, {}).get("inference_network")
    exported = plain(state, source / checkpoint, network)
    target.mkdir(exist_ok=True)
    torch.save(state, target / checkpoint)
    validated = alone and checkpoint == "checkpoint_final.pth" and exported == deployed
    if validated:
        _copy(source, target, ("validation/summary.json",))
    return exported, validated


def plain(state: dict, file: Path, network: str | None) -> str:
    """Turns a checkpoint of ours into one of nnUNetTrainer, in place; returns the network whose weights it has.

    What it was stays under one extra key, which nnU-Net does not read: trainer, network, version.
    """
    if CHECKPOINT_KEY not in state:
        raise ValueError(f"{file} was not written by one of our trainers. Use nnUNetv2_export_model_to_zip.")
    networks, deployed = network_weights(state), state["network_weights"]
    network = network or next(iter(networks))
    del state[CHECKPOINT_KEY]
    if network not in networks:
        raise ValueError(f"{file} has no network {network!r}; it has {', '.join(sorted(networks))}.")
    weights = networks[network]
    if {k: w.shape for k, w in weights.items()} != {k: w.shape for k, w in deployed.items()}:
        raise ValueError(f"{file}: plain nnU-Net cannot load {network}, whose architecture is another one.")
    version = metadata.version("nnunet-ssl")
    state[PROVENANCE_KEY] = {"trainer": state["trainer_name"], "network": network, "nnunet-ssl": version}
    state.update(network_weights=weights, trainer_name="nnUNetTrainer")
    return network


def _packed(folder: Path, root: Path) -> Path:
    """A zip file in `root` of all files of the folder, named relative to `root`."""
    archive = root / "model.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(root))
    return archive


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
