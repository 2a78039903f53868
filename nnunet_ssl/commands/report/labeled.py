"""Scans with labels on the page: the numbers of every case, and the worst ones as pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from tqdm import tqdm

from nnunet_ssl.commands.evaluate import case_metrics, label_masks, label_values, paired_files, read_pair
from nnunet_ssl.commands.pictures import PREDICTION, REFERENCE
from nnunet_ssl.commands.report.page import Card, Key, Table
from nnunet_ssl.commands.report.scans import FEW, Reading, first_channels, labeled_images, millilitres, number, show
from nnunet_ssl.commands.report.training import Training
from nnunet_ssl.system.pool import run_all, worker_pool
from nnunet_ssl.training.preflight import raw_folder

WORST = 5  # pictures
KEYS = [Key("reference", REFERENCE, "solid"), Key("prediction", PREDICTION, "dashed")]
LOOK = "Is the prediction wrong, or the reference? Pieces far from the reference make the distances large."

Metrics = dict[str, dict[str, float]]  # of a case: per class or region its metrics and volumes


class Labeled(NamedTuple):
    """Predictions with their references.

    Attributes:
        what: which scans these are, for the page.
        pairs: per case its prediction and its reference.
        images: per case the file of its first channel.
    """

    what: str
    pairs: dict[str, tuple[Path, Path]]
    images: dict[str, Path]


def validation(training: Training) -> Labeled | None:
    """What nnU-Net has predicted of the validation cases when the training was over; None where it has not."""
    ending, folder = training.dataset_json["file_ending"], training.folder / "validation"
    labels, references = raw_folder(training.plans.dataset_name, "labelsTr"), training.preprocessed / "gt_segmentations"
    if labels is not None and labels.is_dir() and issubclass(training.plans.image_reader_writer_class, Tiff3DIO):
        references = labels  # nnU-Net's copies lack CASE.json, which has the spacing of a TIFF file
    files = {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))}
    pairs = {case: (file, references / file.name) for case, file in files.items() if (references / file.name).is_file()}
    if not pairs:
        return None
    images = labeled_images(training.plans.dataset_name, training.dataset_json)
    what = f"the validation scans of fold {training.fold}, predicted by nnU-Net when the training was over"
    return Labeled(what, pairs, images)


def given(predictions: Path, labels: Path, images: Path | None, training: Training) -> Labeled:
    """The scans of --predictions and --labels; their images are those of nnU-Net's folder beside that of the labels.

    Raises: FileNotFoundError where a folder does not exist or is empty; ValueError where they have other cases.
    """
    for option, folder in {"--predictions": predictions, "--labels": labels, "--images": images}.items():
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{option} {folder} is no folder. Give the folder that the files are in.")
    pairs = paired_files(predictions, labels, training.dataset_json["file_ending"])
    beside = labels.with_name(labels.name.replace("labels", "images", 1))
    folders = [images] if images is not None else [beside] * (beside != labels)
    return Labeled(f"{predictions} against {labels}", pairs, first_channels(folders, training.dataset_json))


def measure(labeled: Labeled, training: Training, how: Reading, num_processes: int) -> dict[str, Metrics]:
    """Metrics of every case, worst mean Dice first, those without any last.

    Raises: ValueError where predictions and references are not of the same scans.
    """
    values, ignore_label = label_values(training.dataset_json)
    jobs = {case: (*files, values, ignore_label, how.reader) for case, files in labeled.pairs.items()}
    with worker_pool(min(num_processes, len(jobs))) as pool:
        results = run_all(pool, measure_case, jobs, "Measuring labeled scans")
    problems = [result for result in results.values() if isinstance(result, str)]
    if problems:
        raise ValueError("Predictions and references are not of the same scans:\n  " + "\n  ".join(problems))

    def order(case: str) -> tuple[float, float, str]:
        dice, distance = mean(results[case], "Dice"), mean(results[case], "HD95_mm")
        return (np.nan_to_num(dice, nan=np.inf), -np.nan_to_num(distance), case)

    return {case: results[case] for case in sorted(jobs, key=order)}


def measure_case(
    prediction_file: Path,
    reference_file: Path,
    labels: dict[str, tuple[int, ...]],
    ignore_label: int | None,
    reader: type[BaseReaderWriter],
) -> Metrics | str:
    """`case_metrics` per label or region, and the volumes in ml of both; a sentence where the files do not fit."""
    pair = read_pair(prediction_file, reference_file, reader)
    if isinstance(pair, str):
        return pair
    prediction, reference, spacing = pair
    found = {}
    for name, masks in label_masks(prediction, reference, labels, ignore_label):
        volumes = [float(mask.sum() * np.prod(spacing)) / 1000 for mask in masks]
        own = dict(zip(("predicted_ml", "reference_ml"), volumes, strict=True))
        found[name] = {**case_metrics(*masks, spacing), **own}
    return found


def mean(metrics: Metrics, name: str) -> float:
    """Over the classes that have the metric; NaN where none has."""
    values = [own[name] for own in metrics.values() if np.isfinite(own[name])]
    return float(np.mean(values)) if values else np.nan


def table(cases: dict[str, Metrics]) -> Table:
    """A row per case."""
    classes = list(next(iter(cases.values())))
    shown = classes if 1 < len(classes) <= FEW else []
    heads = ["scan", "mean Dice (%)" if len(classes) > 1 else "Dice (%)", *(f"{name} (%)" for name in shown)]
    heads += ["HD95 (mm)", "ASSD (mm)"]
    heads += ["predicted (ml)", "reference (ml)"] if len(classes) == 1 else []
    rows = []
    for case, metrics in cases.items():
        dice = [100 * mean(metrics, "Dice"), *(100 * metrics[name]["Dice"] for name in shown)]
        distances = [number(mean(metrics, name), 1) for name in ("HD95_mm", "ASSD_mm")]
        own = metrics[classes[0]]
        volumes = [millilitres(own[f"{kind}_ml"]) for kind in ("predicted", "reference")] if len(classes) == 1 else []
        rows.append([case, *(number(value, 1) for value in dice), *distances, *volumes])
    return Table(heads, rows)


def cards(cases: dict[str, Metrics], labeled: Labeled, how: Reading) -> Iterator[Card]:
    """The worst scans as pictures, behind a progress bar."""
    worst = [case for case, metrics in cases.items() if np.isfinite(mean(metrics, "Dice"))][:WORST]
    for case in tqdm(worst, "Drawing labeled scans", unit="scan", disable=None):
        metrics = cases[case]
        facts = []
        for name, own in metrics.items():
            predicted, true = millilitres(own["predicted_ml"]), millilitres(own["reference_ml"])
            facts += [(f"Dice of {name}", f"{number(100 * own['Dice'], 1)} %")]
            facts += [(f"volume of {name}", f"{predicted} ml, reference {true} ml")]
        facts += [(n.removesuffix("_mm"), f"{number(mean(metrics, n), 1)} mm") for n in ("HD95_mm", "ASSD_mm")]
        missed = [name for name, own in metrics.items() if own["reference_ml"] and not own["predicted_ml"]]
        invented = [name for name, own in metrics.items() if own["predicted_ml"] and not own["reference_ml"]]
        notes = [f"Missed: {', '.join(missed)}."] * bool(missed)
        notes += [f"Not in the reference: {', '.join(invented)}."] * bool(invented)
        alt = f"Scan {case}, " + ", ".join(" ".join(fact) for fact in facts)
        picture, note = show(labeled.images.get(case), labeled.pairs[case], KEYS, how, LOOK, alt)
        yield Card(case, facts, picture, " ".join(filter(None, (*notes, note))))


def remarks(cases: dict[str, Metrics]) -> list[str]:
    """Sentences on what all cases have in common."""
    found = []
    for name in next(iter(cases.values())):
        volumes = [(metrics[name]["predicted_ml"], metrics[name]["reference_ml"]) for metrics in cases.values()]
        if not any(reference for _, reference in volumes):
            found.append(f"No reference has {name}: nothing can be said about it.")
        elif not any(predicted for predicted, _ in volumes):
            found.append(f"{name} is never predicted.")
    without = [case for case, metrics in cases.items() if not np.isfinite(mean(metrics, "Dice"))]
    if without:
        found.append(f"Without foreground in reference and prediction, so without Dice: {', '.join(without[:10])}.")
    return found


def mean_dice(cases: dict[str, Metrics]) -> float:
    """Mean over the cases of their mean Dice, in percent; NaN where none has one."""
    values: Sequence[float] = [mean(metrics, "Dice") for metrics in cases.values()]
    return 100 * float(np.nanmean(values)) if np.isfinite(values).any() else np.nan
