"""Self-training: a trained model labels the unlabeled scans, and stock nnU-Net trains on the result."""

import json
import os
import shutil
from collections import deque
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from nnunetv2 import paths
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets, maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.preprocessed import load_plans
from nnunet_ssl.data.scans import name_problems, no_scan, reading_problems, reserved_names, unlabeled_scans, unpacked
from nnunet_ssl.data.splits import read_fold, save_splits
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.pool import worker_pool
from nnunet_ssl.training.checkpoints import read_checkpoint

RECORD, SCRATCH = "model.json", "predicting"  # in the hidden folder of a run that is not finished


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

    Returns:
        Folder of the new dataset in nnUNet_raw.

    Raises:
        FileNotFoundError: no dataset, no trained model or no unlabeled scans; the message has the fix.
        FileExistsError: the id is taken.
        ValueError: no such fold, or an unlabeled scan's name is that of a labeled one.
        NotImplementedError: a cascade.
    """
    name = str(maybe_convert_to_dataset_name(dataset))
    raw, preprocessed = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name
    plans = load_plans(preprocessed, plans_identifier, [configuration])
    if plans.get_configuration(configuration).previous_stage_name is not None:
        raise NotImplementedError(f"{configuration} is a cascade. Label the scans with 3d_fullres or 3d_lowres.")
    require_free_id(output_id)
    model = Path(get_output_folder(name, trainer, plans_identifier, configuration))
    command = f"nnUNetv2_train {name[7:10]} {configuration} {fold} -tr {trainer} -p {plans_identifier}"
    require_trained(model / f"fold_{fold}" / checkpoint, command)
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
    kept = finished_labels(unfinished, record, scans, ending)
    left = {case: files for case, files in scans.items() if case not in kept}
    own = {case: files for case, files in left.items() if case not in cases}
    check_scans(own, dataset_json, plans.image_reader_writer_class, num_processes)
    start_or_resume(unfinished, record, kept, len(scans), ending)
    scans = {case: convert_series(case, files, unfinished, ending) for case, files in scans.items()}
    if left:
        predict(
            {case: scans[case] for case in left}, unfinished, model, fold, checkpoint, device, num_processes, mirroring
        )

    provenance = {"cases": sorted(scans), **origin, "nnunet-ssl": metadata.version("nnunet-ssl")}
    entries = dataset_entries(unfinished, {c: cases[c] for c in sorted(labeled + validation)}, scans, ending)
    own_entries = {"name": folder.name, "numTraining": len(entries), "dataset": entries, "pseudo_labels": provenance}
    splits = [{"train": sorted([*labeled, *scans]), "val": sorted(validation)}] if validation else []
    publish(unfinished, folder, dataset_json | own_entries, splits)
    move_plans_between_datasets(name, folder.name, plans_identifier, plans_identifier)  # only labels shall differ
    return folder


def require_free_id(number: int) -> None:
    """Raises ValueError where a number is no id of a dataset, FileExistsError where a dataset has it."""
    if not 0 < number < 1000:
        raise ValueError(f"The id of a dataset has three digits: -o 1 to 999, not {number}.")
    datasets = sorted(find_candidate_datasets(number))
    if datasets:
        raise FileExistsError(f"Dataset {number} exists already: {', '.join(datasets)}. Choose another -o.")


def require_trained(file: Path, command: str) -> None:
    """Raises FileNotFoundError, which names the command that trains it, where a checkpoint is missing."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. Train the model first: {command}")


def publish(unfinished: Path, folder: Path, dataset_json: dict, splits: list[dict[str, list[str]]]) -> None:
    """Makes the hidden folder, in which all labels are, a dataset of nnU-Net; the raw dataset appears in one step.

    Args:
        unfinished: the hidden folder.
        folder: what it becomes; one of the same name is made in nnUNet_preprocessed.
        dataset_json: of the new dataset.
        splits: its folds; none where nnU-Net shall train on all cases.
    """
    preprocessed = Path(paths.nnUNet_preprocessed) / folder.name
    (unfinished / "dataset.json").write_text(json.dumps(dataset_json, indent=1))
    if splits:
        save_splits(preprocessed / "splits_final.json", splits)
    shutil.rmtree(unfinished / SCRATCH, ignore_errors=True)
    (unfinished / RECORD).unlink()
    os.replace(unfinished, folder)
    preprocessed.mkdir(exist_ok=True)
    shutil.copy2(folder / "dataset.json", preprocessed)


def finished_labels(unfinished: Path, record: str, scans: dict[str, list[str]], ending: str) -> set[str]:
    """The scans that an interrupted run of the same model has labeled, and that are not newer than their labels.

    Args:
        unfinished: the hidden folder; it may be missing.
        record: what determines the labels; those of a folder with another one do not count.
        scans: per case its image files.
        ending: of the label files.
    """
    file = unfinished / RECORD
    if not file.is_file() or file.read_bytes() != record.encode():
        return set()
    labels = {case: unfinished / "labelsTr" / f"{case}{ending}" for case in scans}
    written = {case: label.stat().st_mtime_ns for case, label in labels.items() if label.is_file()}
    return {case for case, time in written.items() if all(changed_at(f) <= time for f in scans[case])}


def changed_at(scan: str | Path) -> int:
    """When a scan was written, in ns; of a DICOM series its newest file."""
    files = [scan, *Path(scan).iterdir()] if os.path.isdir(scan) else [scan]
    return max(os.stat(file).st_mtime_ns for file in files)


def start_or_resume(unfinished: Path, record: str, kept: set[str], number: int, ending: str) -> None:
    """Makes the hidden folder with its record, or removes from an existing one all that is not kept, and says so.

    Args:
        kept: scans whose labels stay, from `finished_labels`.
        number: of all scans.
        ending: of the label files.
    """
    labels = unfinished / "labelsTr"
    dropped = len(list(labels.glob(f"*{ending}"))) - len(kept)
    if dropped:
        print(
            f"Dropped labels of an interrupted run: {dropped}. Their scans have changed since, or another model, "
            f"checkpoint or mirroring made them."
        )
    if kept:
        print(f"Labeled by an interrupted run of the same model, and kept: {len(kept)} of {number} scans.")
        shutil.rmtree(unfinished / SCRATCH, ignore_errors=True)
        names = {f"{case}{suffix}" for case in kept for suffix in (ending, ".json")}  # .json: beside a TIFF
        for file in labels.iterdir():
            if file.name not in names:
                file.unlink()
        return
    if unfinished.exists():
        shutil.rmtree(unfinished)
    labels.mkdir(parents=True)
    with replacing(unfinished / RECORD) as temporary:
        temporary.write_text(record)


def convert_series(case: str, files: list[str], unfinished: Path, ending: str) -> list[str]:
    """A scan's files as nnU-Net reads them: a DICOM series, a folder, becomes a file in imagesTr of `unfinished`.

    A file that an interrupted run has converted, and that is not older than the series, is kept.
    """
    source = Path(files[0])
    if not source.is_dir():
        return files
    target = unfinished / "imagesTr" / f"{case}_0000{ending}"
    if not target.is_file() or changed_at(target) < changed_at(source):
        target.parent.mkdir(exist_ok=True)
        with unpacked(source, ending) as path, replacing(target) as temporary:
            shutil.copyfile(path, temporary)
    return [str(target)]


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


def check_scans(
    scans: dict[str, list[str]], dataset_json: dict, reader: type[BaseReaderWriter], num_processes: int
) -> None:
    """Reads the scans of imagesUn, before a model spends hours on some; raises ValueError with a line per problem."""
    with worker_pool(min(num_processes, len(scans))) as pool:
        problems = reading_problems(pool, scans, dataset_json, reader)
    if problems:
        raise ValueError("Nothing was labeled. Problems:\n  " + "\n  ".join(problems))


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
