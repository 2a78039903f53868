"""Self-training: trained models label the unlabeled scans, and stock nnU-Net trains on the result."""

import csv
import json
import os
import shutil
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path

from nnunetv2 import paths
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets, maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.commands.interrupted_labels import RECORD, convert_all, finished_labels, start_or_resume
from nnunet_ssl.commands.labeling import DISAGREEMENT, SCRATCH, export, predict, refuse_unsound
from nnunet_ssl.commands.predictors import load_predictors
from nnunet_ssl.commands.ranking_files import require_usable, take_labels
from nnunet_ssl.commands.trained_models import Network, plans_without_cascade, states_of, trained_models
from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.fold_scans import sort_folds
from nnunet_ssl.data.splits import require_hidden, save_splits
from nnunet_ssl.system.device import require_device
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.lock import locked
from nnunet_ssl.system.pool import run_all


def pseudo_label(
    dataset: str,
    configuration: str,
    folds: Sequence[int | str],
    output_id: int,
    trainers: Sequence[str] = ("nnUNetTrainer",),
    plans_identifier: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cuda",
    num_processes: int = 2,
    mirroring: bool = True,
    accept: Collection[str] = (),
    also: Sequence[Path] = (),
    uncertain: str = "keep",
    drop_worst: int = 0,
    predictions: Path | None = None,
) -> Path:
    """Writes a raw dataset of the folds' labeled scans and of their unlabeled scans with predicted labels.

    This is what nnU-Net's maintainers recommend where most scans have no labels, and so the baseline of every
    semi-supervised method. Images and true labels stay where they are: dataset.json refers to them, relative to the
    new folder; a DICOM series is converted into a file there. "pseudo_labels" in dataset.json says which cases have
    been labeled, and by what. Plans and a split with the folds' validation cases go to nnUNet_preprocessed. Nothing of
    the new dataset exists until all scans are labeled. A run that was interrupted goes on where it stopped: labels of
    the same models are kept, except where the scan is newer. Several models label with the mean of their probabilities;
    disagreement.csv says how much they differ on each scan.

    Args:
        dataset: id or name of the source dataset.
        configuration: of the trained models.
        folds: of the models, numbers or "all"; their labeled cases become those of the new dataset.
        output_id: id of the new dataset.
        trainers: of the models, any of nnU-Net's or ours; all of the folds of each are used.
        plans_identifier: of the models, as `checkpoint`, a file name in the folders of the folds.
        device: "cuda", "cpu" or "mps".
        num_processes: for preprocessing, and as many for export; with 1 this process does the export.
        mirroring: average predictions over mirrored images, nnU-Net's default; takes up to 8 times as long.
        accept: scans of imagesUn whose voxels and size are right, whatever they look like.
        also: further model folders with the same plans and folds, as of other seeds.
        uncertain: "keep", or "ignore": voxels on which the models disagree get nnU-Net's ignore label.
        drop_worst: leaves out so many scans, those on which the models disagree most.
        predictions: folder of `nnunet-ssl rank`, whose labels are taken. Nothing is predicted then, and trainers,
            checkpoint, mirroring and further models are those of that command.

    Returns:
        Folder of the new dataset in nnUNet_raw.

    Raises:
        FileNotFoundError: no dataset, model or unlabeled scans; FileExistsError: the id is taken.
        ValueError: no such fold or device, folds that hide different labels, models with other plans, unsound scans.
        RuntimeError: another run labels the same scans.
        NotImplementedError: a cascade.
    """
    if predictions is None:
        require_device(device)
    name = str(maybe_convert_to_dataset_name(dataset))
    raw, preprocessed = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name
    plans = plans_without_cascade(preprocessed, plans_identifier, configuration)
    require_free_id(output_id)
    cases = get_filenames_of_train_images_and_targets(str(raw))
    dataset_json = read_dataset_json(raw / "dataset.json", "channel_names", "file_ending")
    origin = {"dataset": name, "trainer": alone(trainers), "plans": plans_identifier, "configuration": configuration}
    origin |= {"fold": alone(folds), "checkpoint": checkpoint, "also": list(map(str, also)), "uncertain": uncertain}
    if predictions is None:
        models = trained_models(name, configuration, folds, trainers, plans_identifier, checkpoint, also)
    entries = sort_folds(name, folds, cases, dataset_json)
    scans = entries[0][2]
    if predictions is None:
        require_enough(len(models), scans, uncertain, drop_worst)
        record = {"mirroring": mirroring, "files": states_of(models, configuration)}
    else:
        kind = {"dataset": name, "configuration": configuration, "plans": plans_identifier}
        made = require_usable(predictions, kind, folds, scans)
        for file in (Path(network["file"]) for network in made["networks"].values()):
            fold = file.parent.name.removeprefix("fold_")
            require_hidden(preprocessed / "splits_final.json", int(fold) if fold.isdecimal() else fold, file)
        require_enough(len(made["networks"]), scans, uncertain, drop_worst)
        origin |= {"trainer": alone(made["trainers"]), "checkpoint": made["checkpoint"], "also": made["also"]}
        origin |= {"networks": list(made["networks"])}
        record = {"predictions": str(predictions.absolute()), **made}
    record = json.dumps(origin | record)
    dataset_json, ignore_label = with_ignore_label(dataset_json) if uncertain == "ignore" else (dataset_json, None)
    num_processes, ending = max(1, num_processes), dataset_json["file_ending"]

    folder = raw.with_name(f"Dataset{output_id:03d}_{name[11:]}PseudoLabels")
    unfinished = hidden(folder)
    with locked(folder.with_name(f".{folder.name}.lock"), f"labeling scans for {folder}"):
        kept = finished_labels(unfinished, record, scans, ending)
        left = scans.keys() - kept
        unlabeled = {case: list(map(Path, files)) for case, files in scans.items() if case not in cases}
        if predictions is None:
            refuse_unsound(unlabeled, left, raw, plans, configuration, dataset_json, num_processes, accept)
        start_or_resume(unfinished, record, kept, len(scans), ending)
        scans = convert_all(scans, unfinished / "imagesTr", ending, num_processes)
        remaining = {case: files for case, files in scans.items() if case in left}
        if predictions is not None:
            how = (predictions, made, unfinished, ignore_label, plans, dataset_json)
            run_all(None, take_labels, {case: (case, *how) for case in remaining}, "Taking labels", unit="scan")
        elif remaining:
            predictors = load_predictors([Network(model) for model in models], device, mirroring)
            predict(remaining, predictors, num_processes, export, lambda: (unfinished, ignore_label))
        scans = without_worst(scans, unfinished, drop_worst)
        publish(unfinished, folder, cases, entries, scans, dataset_json, origin, plans.plans)
    return folder


def hidden(folder: Path) -> Path:
    """Where a new raw dataset is made: nnU-Net does not see it there, and relative paths stay right."""
    return folder.with_name(f".{folder.name}.tmp")


def alone(values: Sequence) -> object:
    """The only one of the values; where there are several, a list of them."""
    return values[0] if len(values) == 1 else list(values)


def require_enough(number: int, scans: Collection[str], uncertain: str, drop_worst: int) -> None:
    """Raises ValueError where one model, their number, cannot disagree, or where no scan would be left."""
    if number == 1 and (uncertain != "keep" or drop_worst):
        raise ValueError("One model does not disagree with itself: give several, with -f 0 1 2, -tr or --also.")
    if not 0 <= drop_worst < len(scans):
        raise ValueError(f"--drop-worst {drop_worst} leaves none of {len(scans)} unlabeled scans.")


def with_ignore_label(dataset_json: dict) -> tuple[dict, int]:
    """The dataset with nnU-Net's ignore label, whose number it returns too; its own one where it has one."""
    labels = dataset_json["labels"]
    if "ignore" in labels:
        return dataset_json, labels["ignore"]
    numbers = [n for value in labels.values() for n in (value if isinstance(value, list) else [value])]
    number = max(numbers) + 1  # nnU-Net wants the highest
    return dataset_json | {"labels": labels | {"ignore": number}}, number


def without_worst(scans: dict[str, list[str]], unfinished: Path, number: int) -> dict[str, list[str]]:
    """The scans but those on which the models disagree most; writes disagreement.csv, with a row for every scan."""
    files = {case: unfinished / DISAGREEMENT / f"{case}.txt" for case in scans}
    if not all(file.is_file() for file in files.values()):  # a single model
        return scans
    values = {case: float(file.read_text()) for case, file in files.items()}
    worst_first = sorted(values, key=lambda case: (-values[case], case))
    with (unfinished / "disagreement.csv").open("w", newline="", encoding="utf-8") as f:
        rows = [(case, f"{values[case]:.4f}", "no" if i < number else "yes") for i, case in enumerate(worst_first)]
        csv.writer(f).writerows([("case", "disagreement", "used"), *rows])
    return {case: scans[case] for case in sorted(worst_first[number:])}


def require_free_id(number: int) -> None:
    """Raises ValueError where a number is no id of a dataset, FileExistsError where a dataset has it."""
    if not 0 < number < 1000:
        raise ValueError(f"The id of a dataset has three digits: -o 1 to 999, not {number}.")
    begun = Path(paths.nnUNet_raw)
    # a run that was interrupted in its last moments has left a folder in nnUNet_preprocessed, and goes on
    datasets = sorted(d for d in find_candidate_datasets(number) if not (hidden(begun / d) / RECORD).is_file())
    if datasets:
        raise FileExistsError(f"Dataset {number} exists already: {', '.join(datasets)}. Choose another -o.")


def publish(
    unfinished: Path,
    folder: Path,
    cases: dict,
    entries: list,
    scans: dict[str, list[str]],
    dataset_json: dict,
    origin: dict,
    plans: dict,
) -> None:
    """Makes the hidden folder, in which all labels are, a dataset of nnU-Net; the raw dataset appears in one step.

    Args:
        unfinished: the hidden folder.
        folder: what it becomes; one of the same name is made in nnUNet_preprocessed.
        cases: of the source dataset, with images and label.
        entries: per fold its labeled and its validation cases; without the latter nnU-Net shall train on all cases.
        scans: that have new labels.
        dataset_json: of the source dataset.
        origin: of the new labels.
        plans: of the source dataset; those of the new one are the same: only labels shall differ.
    """
    preprocessed = Path(paths.nnUNet_preprocessed) / folder.name
    true = sorted({case for train, val, _ in entries for case in (*train, *val)})
    table = dataset_entries(unfinished, {case: cases[case] for case in true}, scans, dataset_json["file_ending"])
    provenance = {"cases": sorted(scans), **origin, "nnunet-ssl": metadata.version("nnunet-ssl")}
    own = {"name": folder.name, "numTraining": len(table), "dataset": table, "pseudo_labels": provenance}
    (unfinished / "dataset.json").write_text(json.dumps(dataset_json | own, indent=1))
    splits = [{"train": sorted([*train, *scans]), "val": sorted(val)} for train, val, _ in entries if val]
    if splits:
        save_splits(preprocessed / "splits_final.json", splits)
    for temporary in (SCRATCH, DISAGREEMENT):
        shutil.rmtree(unfinished / temporary, ignore_errors=True)
    preprocessed.mkdir(exist_ok=True)
    # as nnU-Net's move_plans_between_datasets, which needs the raw dataset that shall appear last
    with replacing(preprocessed / f"{plans['plans_name']}.json") as temporary:
        temporary.write_text(json.dumps(plans | {"dataset_name": folder.name}, indent=4))
    shutil.copy2(unfinished / "dataset.json", preprocessed)
    os.replace(unfinished, folder)  # now it is there, with all that belongs to it
    (folder / RECORD).unlink()


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
