"""Self-training: a trained model labels the unlabeled scans, and stock nnU-Net trains on the result."""

import json
import os
import shutil
from collections import deque
from collections.abc import Collection
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from nnunetv2 import paths
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets, maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_ssl.commands.interrupted_labels import (
    RECORD,
    SCRATCH,
    convert_series,
    finished_labels,
    start_or_resume,
)
from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.preprocessed import load_plans
from nnunet_ssl.data.scan_checks import check_accepted, check_unlabeled
from nnunet_ssl.data.scans import name_problems, no_scan, reserved_names, unlabeled_scans
from nnunet_ssl.data.splits import read_fold, save_splits
from nnunet_ssl.system.lock import locked
from nnunet_ssl.system.pool import worker_pool
from nnunet_ssl.training.checkpoints import read_checkpoint


def pseudo_label(
    dataset: str,
    configuration: str,
    fold: int | str,
    output_id: int,
    trainer: str = "nnUNetTrainer",
    plans_identifier: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cuda",
    num_processes: int = 2,
    mirroring: bool = True,
    accept: Collection[str] = (),
) -> Path:
    """Writes a raw dataset of the fold's labeled scans and of its unlabeled scans with predicted labels.

    This is what nnU-Net's maintainers recommend where most scans have no labels, and so the baseline of every
    semi-supervised method. Images and true labels stay where they are: dataset.json refers to them, relative to the
    new folder; a DICOM series is converted into a file there. The entry "pseudo_labels" says which cases a model has
    labeled, and which model. The plans and a split with the fold's validation cases, whose labels are true, go to
    nnUNet_preprocessed. Nothing of the new dataset exists until all scans are labeled. A run that was interrupted goes
    on where it stopped: labels of the same model are kept, except where the scan is newer.

    Args:
        dataset: id or name of the source dataset.
        configuration: of the trained model.
        fold: of the trained model, a number or "all"; its labeled cases become those of the new dataset.
        output_id: id of the new dataset.
        trainer: of the trained model, any of nnU-Net's or ours.
        plans_identifier: of the trained model.
        checkpoint: file name in the fold's folder.
        device: "cuda", "cpu" or "mps".
        num_processes: for preprocessing, and as many for export; with 1 this process does the export.
        mirroring: average predictions over mirrored images, nnU-Net's default; takes up to 8 times as long.
        accept: scans of imagesUn whose voxels and size are right, whatever they look like.

    Returns:
        Folder of the new dataset in nnUNet_raw.

    Raises:
        FileNotFoundError: no dataset, no trained model or no unlabeled scans; the message has the fix.
        FileExistsError: the id is taken.
        ValueError: no such fold, or unsound scans, as in `preprocess_unlabeled`.
        RuntimeError: another run labels the same scans.
        NotImplementedError: a cascade.
    """
    name = str(maybe_convert_to_dataset_name(dataset))
    raw, preprocessed = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name
    plans = load_plans(preprocessed, plans_identifier, [configuration])
    if plans.get_configuration(configuration).previous_stage_name is not None:
        raise NotImplementedError(f"{configuration} is a cascade. Label the scans with 3d_fullres or 3d_lowres.")
    require_free_id(output_id)
    model = trained_model(name, configuration, fold, trainer, plans_identifier, checkpoint)
    dataset_json = read_dataset_json(raw / "dataset.json", "channel_names", "file_ending")
    cases = get_filenames_of_train_images_and_targets(str(raw))
    labeled, validation, scans = sort_cases(name, fold, cases, dataset_json)
    read_checkpoint(model / f"fold_{fold}" / checkpoint)  # it is used after all scans are checked
    num_processes, ending = max(1, num_processes), dataset_json["file_ending"]
    origin = {"dataset": name, "trainer": trainer, "plans": plans_identifier, "configuration": configuration}
    origin |= {"fold": fold, "checkpoint": checkpoint}
    state = (model / f"fold_{fold}" / checkpoint).stat()
    record = json.dumps(origin | {"mirroring": mirroring, "size": state.st_size, "mtime_ns": state.st_mtime_ns})

    folder = raw.with_name(f"Dataset{output_id:03d}_{name[11:]}PseudoLabels")
    # nnU-Net does not see a hidden folder as a dataset; the same depth keeps relative paths right
    unfinished = folder.with_name(f".{folder.name}.tmp")
    with locked(folder.with_name(f".{folder.name}.lock"), f"labeling scans for {folder}"):
        kept = finished_labels(unfinished, record, scans, ending)
        left = {case: files for case, files in scans.items() if case not in kept}
        unlabeled = {case: list(map(Path, files)) for case, files in scans.items() if case not in cases}
        refuse_unsound(unlabeled, left, raw, plans, configuration, dataset_json, num_processes, accept)
        start_or_resume(unfinished, record, kept, len(scans), ending)
        scans = {case: convert_series(case, files, unfinished, ending) for case, files in scans.items()}
        if left:
            model_of = (unfinished, model, fold, checkpoint, device, num_processes, mirroring)
            predict({case: scans[case] for case in left}, *model_of)
        true_labels = {case: cases[case] for case in sorted(labeled + validation)}
        publish(unfinished, folder, dataset_json, true_labels, scans, validation, origin)
    move_plans_between_datasets(name, folder.name, plans_identifier, plans_identifier)  # only labels shall differ
    return folder


def require_free_id(number: int) -> None:
    """Raises ValueError where a number is no id of a dataset, FileExistsError where a dataset has it."""
    if not 0 < number < 1000:
        raise ValueError(f"The id of a dataset has three digits: -o 1 to 999, not {number}.")
    datasets = sorted(find_candidate_datasets(number))
    if datasets:
        raise FileExistsError(f"Dataset {number} exists already: {', '.join(datasets)}. Choose another -o.")


def trained_model(
    name: str, configuration: str, fold: int | str, trainer: str, plans_identifier: str, checkpoint: str
) -> Path:
    """Folder of a model; raises FileNotFoundError, which has the command that trains it, without the checkpoint."""
    model = Path(get_output_folder(name, trainer, plans_identifier, configuration))
    file = model / f"fold_{fold}" / checkpoint
    if not file.is_file():
        command = f"nnUNetv2_train {name[7:10]} {configuration} {fold} -tr {trainer} -p {plans_identifier}"
        raise FileNotFoundError(f"{file} is missing. Train the model first: {command}")
    return model


def refuse_unsound(
    unlabeled: dict[str, list[Path]],
    left: Collection[str],
    raw: Path,
    plans: PlansManager,
    configuration: str,
    dataset_json: dict,
    num_processes: int,
    accept: Collection[str],
) -> None:
    """Reads the scans of imagesUn that are left to label, before a model spends hours on some.

    Raises: ValueError with a line per problem of scans that are not accepted as they are.
    """
    check_accepted(accept, unlabeled, raw / "imagesUn")
    new = {case: files for case, files in unlabeled.items() if case in left}
    with worker_pool(min(num_processes, len(new))) as pool:
        report = check_unlabeled(pool, raw, plans, [configuration], dataset_json, unlabeled, new, accept)
    report.require_sound("Nothing was labeled", raw / "imagesUn")


def publish(
    unfinished: Path,
    folder: Path,
    dataset_json: dict,
    labeled: dict[str, dict],
    scans: dict[str, list[str]],
    validation: list[str],
    origin: dict,
) -> None:
    """Makes the hidden folder, in which all labels are, a dataset of nnU-Net; the raw dataset appears in one step.

    Args:
        unfinished: the hidden folder.
        folder: what it becomes; one of the same name is made in nnUNet_preprocessed.
        dataset_json: of the dataset that the scans are from.
        labeled: as in `dataset_entries`, as `scans`.
        validation: cases with true labels that are not trained on; where there is none, nnU-Net trains on all cases.
        origin: of the new labels.
    """
    preprocessed = Path(paths.nnUNet_preprocessed) / folder.name
    entries = dataset_entries(unfinished, labeled, scans, dataset_json["file_ending"])
    provenance = {"cases": sorted(scans), **origin, "nnunet-ssl": metadata.version("nnunet-ssl")}
    own = {"name": folder.name, "numTraining": len(entries), "dataset": entries, "pseudo_labels": provenance}
    (unfinished / "dataset.json").write_text(json.dumps(dataset_json | own, indent=1))
    if validation:
        train = sorted(entries.keys() - set(validation))
        save_splits(preprocessed / "splits_final.json", [{"train": train, "val": sorted(validation)}])
    shutil.rmtree(unfinished / SCRATCH, ignore_errors=True)
    (unfinished / RECORD).unlink()
    os.replace(unfinished, folder)
    preprocessed.mkdir(exist_ok=True)
    shutil.copy2(folder / "dataset.json", preprocessed)


def dataset_entries(folder: Path, labeled: dict[str, dict], scans: dict[str, list[str]], ending: str) -> dict:
    """The "dataset" table of dataset.json in `folder`: per case its images and label, relative to it.

    Args:
        labeled: per case the images and label that it has already.
        scans: per newly labeled case its images; the label is in the folder's own labelsTr.
        ending: of the label files.
    """

    def relative(files):
        return [os.path.relpath(file, folder) for file in files]

    old = {c: {"images": relative(e["images"]), "label": relative([e["label"]])[0]} for c, e in labeled.items()}
    new = {c: {"images": relative(files), "label": f"labelsTr/{c}{ending}"} for c, files in scans.items()}
    return old | new


def sort_cases(
    name: str, fold: int | str, cases: dict, dataset_json: dict
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Labeled and validation cases of a fold, and its unlabeled scans with their image files, from both sources.

    Args:
        name: of the dataset.
        fold: its number, or "all": every case of imagesTr is labeled then, none for validation.
        cases: what nnU-Net finds in the raw dataset: per case its images and label.
        dataset_json: of the raw dataset.
    """
    raw, splits = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name / "splits_final.json"
    entry = {"train": list(cases), "val": []}
    if fold != "all":
        entry = read_fold(splits, fold)
    missing = sorted({case for key in ("train", "val", "unlabeled") for case in entry.get(key, [])} - cases.keys())
    if missing:
        raise ValueError(f"Cases of fold {fold} in {splits} are not in {raw}: {', '.join(missing[:5])}.")
    twice = sorted(set(entry.get("unlabeled", [])) & {*entry["train"], *entry["val"]})
    if twice:
        raise ValueError(f"{splits}: cases of fold {fold} are unlabeled and labeled at once: {', '.join(twice[:5])}.")
    scans = {case: cases[case]["images"] for case in entry.get("unlabeled", [])}
    own, others = unlabeled_scans(raw / "imagesUn", dataset_json)
    reserved = reserved_names(raw, splits.parent, dataset_json, set())
    problems = [no_scan(name, dataset_json["file_ending"]) for name in others]
    problems += name_problems(own, f"rename or remove it in {raw / 'imagesUn'}", reserved)
    if problems:
        raise ValueError("Unlabeled scans need names of their own:\n  " + "\n  ".join(problems))
    scans |= {case: [str(file) for file in files] for case, files in own.items()}
    if not scans:
        raise FileNotFoundError(
            f"{name} has no unlabeled scans for fold {fold}: neither files in {raw / 'imagesUn'} nor an "
            f'"unlabeled" list in {splits}.'
        )
    return entry["train"], entry["val"], dict(sorted(scans.items()))


def predict(
    scans: dict[str, list[str]],
    unfinished: Path,
    model: Path,
    fold: int | str,
    checkpoint: str,
    device: str,
    num_processes: int,
    mirroring: bool,
) -> None:
    """Predicts the scans with nnU-Net's own predictor, behind a progress bar.

    A label file appears in `labelsTr` of the folder `unfinished` when it is complete, as soon as its scan is predicted.

    Raises:
        RuntimeError: a worker died.
    """
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,), checkpoint)
    how = (predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json)
    prepared = preprocessing_iterator_fromfiles(
        list(scans.values()),
        None,
        list(scans),
        predictor.plans_manager,
        predictor.dataset_json,
        predictor.configuration_manager,
        num_processes,
        device == "cuda",
    )
    exports = deque()
    try:
        with worker_pool(num_processes) as pool:
            for item in tqdm(prepared, total=len(scans), desc="Labeling scans", unit="scan"):
                logits = predictor.predict_logits_from_preprocessed_data(item["data"]).cpu().detach().numpy()
                job = (item["ofile"], unfinished, logits, item["data_properties"], *how)
                if pool is None:
                    export(*job)
                    continue
                exports.append(pool.submit(export, *job))
                while len(exports) > num_processes + 2:  # more would fill the memory
                    exports.popleft().result()
            while exports:
                exports.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker process died without an error, most likely because memory ran out. Run the same command again "
            "with fewer processes (-np 1 needs the least): complete labels are kept."
        ) from error


def export(
    case: str, unfinished: Path, logits: np.ndarray, properties: dict, configuration, plans, dataset_json
) -> None:
    """Writes a label file with nnU-Net's own export into a folder of its own, and moves it to `labelsTr` in one step.

    Args:
        logits: (classes, *spatial) of the preprocessed scan.
        properties: of the preprocessed scan.
        configuration: nnU-Net's manager, as `plans`.
        dataset_json: of the model.
    """
    scratch = unfinished / SCRATCH / case
    scratch.mkdir(parents=True, exist_ok=True)
    export_prediction_from_logits(logits, properties, configuration, plans, dataset_json, str(scratch / case))
    label = f"{case}{dataset_json['file_ending']}"
    # the label goes last, it says that all is there: nnU-Net writes the spacing of a TIFF beside it
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == label):
        os.replace(file, unfinished / "labelsTr" / file.name)
