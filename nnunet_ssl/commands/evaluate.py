"""How far predictions are from their references: overlap, and distances between the surfaces."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json
from scipy import ndimage

from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.nifti import require_complete
from nnunet_ssl.data.scan_checks import as_text, geometry
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.pool import run_all, worker_pool
from nnunet_ssl.system.wording import counted


class SurfaceDistances(NamedTuple):
    """Of a prediction and a reference, in the unit of the spacing; NaN where one of them is empty.

    Attributes:
        hd95: 95th percentile of the distances of both directions together (95 % Hausdorff distance).
        asd: mean distance from the prediction's surface to the reference's, in this direction only.
        assd: mean of the distances of both directions together.
    """

    hd95: float
    asd: float
    assd: float


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """95 % Hausdorff and average surface distances of two masks.

    The surface is every voxel of the mask with a face neighbour outside of it; outside of the image counts as outside.
    These definitions are those of the tool that the literature on this topic uses.

    Args:
        prediction: bool, two or three axes.
        reference: bool, the same shape.
        spacing: size of a voxel along every axis of the arrays, in mm; ones give distances in voxels.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"Prediction and reference differ in shape: {prediction.shape} and {reference.shape}.")
    if not (prediction.any() and reference.any()):
        return SurfaceDistances(np.nan, np.nan, np.nan)
    # all surfaces and the way between them lie in the box around both masks
    box = ndimage.find_objects((prediction | reference).astype(np.uint8))[0]
    surfaces = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (prediction, reference)]
    there, back = (
        ndimage.distance_transform_edt(~target, sampling=spacing)[source]
        for source, target in (surfaces, surfaces[::-1])
    )
    both = np.concatenate([there, back])
    return SurfaceDistances(float(np.percentile(both, 95)), float(there.mean()), float(both.mean()))


METRICS = ("Dice", "Jaccard", "HD95_mm", "ASD_mm", "ASSD_mm", "HD95_voxels", "ASD_voxels", "ASSD_voxels")


# Keyword arguments of case_metrics. The last two are those of published tables, which are in voxels.
PROTOCOLS = {
    "strict": {},
    # test_3d_patch.py of BCP, and the same in SS-Net, AD-MT and M3HL; UA-MT and MC-Net keep all components
    "la-literature": {"largest_component": True, "zero_where_empty": True},
    # test_ACDC.py of BCP, and the same in SS-Net and MC-Net; SSL4MIS stops where a prediction is empty
    "acdc-literature": {"zero_where_empty": True},
}


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    *,
    largest_component: bool = False,
    zero_where_empty: bool = False,
) -> dict[str, float]:
    """The METRICS of two masks; Dice and Jaccard in [0, 1].

    With one mask empty Dice and Jaccard are 0 and the distances NaN, with both everything is NaN, as in nnU-Net.

    Args:
        prediction: bool, two or three axes.
        reference: bool, the same shape.
        spacing: size of a voxel along every axis of the arrays, in mm.
        largest_component: only the largest component of the prediction counts; voxels that touch by a corner are
            connected.
        zero_where_empty: everything is 0 where the prediction is empty, which flatters the distances.
    """
    if largest_component and prediction.any():
        # the first of several that are as large
        parts, _ = ndimage.label(prediction, np.ones([3] * prediction.ndim))
        prediction = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    if zero_where_empty and not prediction.any():
        return dict.fromkeys(METRICS, 0.0)
    both, either = int((prediction & reference).sum()), int((prediction | reference).sum())
    overlap = (2 * both / (both + either), both / either) if either else (np.nan, np.nan)
    millimetres = surface_distances(prediction, reference, spacing)
    voxels = surface_distances(prediction, reference, [1.0] * prediction.ndim)
    return dict(zip(METRICS, (*overlap, *millimetres, *voxels), strict=True))


def read_pair(
    prediction_file: Path, reference_file: Path, reader: type[BaseReaderWriter]
) -> tuple[np.ndarray, np.ndarray, Sequence[float]] | str:
    """Labels of both files (*spatial) and the spacing along their axes; a sentence where they are not of one scan.

    A 2D image has two axes.
    """
    for file in (prediction_file, reference_file):
        require_complete(file)
    prediction, properties = reader().read_seg(str(prediction_file))
    reference, wanted = reader().read_seg(str(reference_file))
    expected = geometry(reference, wanted)
    for key, value in geometry(prediction, properties).items():
        if np.shape(value) != np.shape(expected[key]) or not np.allclose(value, expected[key], rtol=1e-4, atol=1e-3):
            return f"{prediction_file.name}: {key} {as_text(value)}, but the reference has {as_text(expected[key])}"
    if reference.shape[1] > 1:
        return prediction[0], reference[0], wanted["spacing"]
    return prediction[0, 0], reference[0, 0], wanted["spacing"][1:]  # one slice is no axis to measure along


def evaluate_case(
    prediction_file: Path,
    reference_file: Path,
    labels: dict[str, tuple[int, ...]],
    ignore_label: int | None,
    reader: type[BaseReaderWriter],
    options: dict[str, bool],
) -> dict[str, dict[str, float]] | str:
    """METRICS per label or region of one case; a sentence where the two files are not of the same scan.

    Voxels with the ignore label belong to neither mask. The options are keyword arguments of `case_metrics`.
    """
    pair = read_pair(prediction_file, reference_file, reader)
    if isinstance(pair, str):
        return pair
    prediction, reference, spacing = pair
    return {
        name: case_metrics(*masks, spacing, **options)
        for name, masks in label_masks(prediction, reference, labels, ignore_label)
    }


def label_masks(
    prediction: np.ndarray, reference: np.ndarray, labels: dict[str, tuple[int, ...]], ignore_label: int | None
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """The masks of every label or region in two label maps, cut to the box around both.

    With a hundred labels that is a hundred times faster than whole masks. Overlap and distances are those of the whole.

    Args:
        prediction: (*spatial), labels.
        reference: the same.
        labels: name to values.
        ignore_label: voxels where the reference has it belong to no mask.
    """
    top = max((value for values in labels.values() for value in values), default=0)
    # what is no label may be any number
    known = (np.where((image > 0) & (image <= top), image, 0).astype(np.int32) for image in (prediction, reference))
    boxes = [ndimage.find_objects(image) for image in known]
    for name, values in labels.items():
        own = [found[v - 1] for found in boxes for v in values if 0 < v <= len(found) and found[v - 1] is not None]
        if 0 in values:  # the background has no box
            own = [tuple(slice(0, size) for size in reference.shape)]
        box = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*own, strict=True))
        box = box or (slice(0, 0),) * reference.ndim
        counts = True if ignore_label is None else reference[box] != ignore_label
        yield name, tuple(np.isin(image[box], values) & counts for image in (prediction, reference))


def evaluate(
    reference: Path,
    prediction: Path,
    dataset_json: Path | None = None,
    output: Path | None = None,
    num_processes: int = 4,
    protocol: str = "strict",
    labels: Sequence[int] = (),
) -> str:
    """Compares a folder of predictions with one of references, case by case and label by label (or region).

    Args:
        reference: folder of label files, as labelsTs.
        prediction: folder of label files of the same names.
        dataset_json: for labels, regions and the file ending; default: dataset.json in `prediction`, where
            nnUNetv2_predict puts it, or beside `reference`.
        output: folder for evaluation.csv (a row per case and label) and evaluation.json (the means); default:
            `prediction`.
        num_processes: cases at a time.
        protocol: "strict" counts all voxels, and a case with an empty mask has no distance. "la-literature" and
            "acdc-literature" count as the scripts do that the published tables of these datasets come from: everything
            is 0 where the prediction of a label is empty, and for the left atrium only its largest component counts.
        labels: values of the labels in the files; then no dataset.json is needed or read.

    Returns:
        The means as a Markdown table: Dice and Jaccard in percent, distances in mm for "strict", else in voxels.

    Raises:
        FileNotFoundError: no dataset.json, or no reference.
        ValueError: no such protocol, missing or surplus files, or files that do not fit together; nothing is written
            then.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"There is no protocol {protocol!r}. Choose among {', '.join(PROTOCOLS)}.")
    description = (
        describe_labels(labels, reference) if labels else read_description(prediction, reference, dataset_json)
    )
    ending = description["file_ending"]
    pairs = paired_files(prediction, reference, ending)
    values, ignore_label = label_values(description)
    reader = determine_reader_writer_from_dataset_json(description, str(min(pairs.values())[1]), verbose=False)
    shared = (values, ignore_label, reader, PROTOCOLS[protocol])
    jobs = {case: (*files, *shared) for case, files in pairs.items()}
    with worker_pool(min(num_processes, len(jobs))) as pool:
        results = run_all(pool, evaluate_case, jobs, "Evaluating")
    problems = [result for result in results.values() if isinstance(result, str)]
    if problems:
        raise ValueError("Predictions and references are not of the same scans:\n  " + "\n  ".join(problems))

    rows = [(case, label, metrics) for case in jobs for label, metrics in results[case].items()]
    output = Path(output or prediction)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "evaluation.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["case", "label", *METRICS])
        writer.writerows([case, label, *(repr(float(m[name])) for name in METRICS)] for case, label, m in rows)
    means = {label: statistics_of([m for _, name, m in rows if name == label]) for label in values}
    with replacing(output / "evaluation.json") as temporary:
        summary = {"protocol": protocol, "reference": str(reference), "cases": len(jobs), "labels": means}
        temporary.write_text(json.dumps(summary, indent=1))
    return markdown(means, "mm" if protocol == "strict" else "voxels")


def paired_files(prediction: Path, reference: Path, ending: str) -> dict[str, tuple[Path, Path]]:
    """Per case its files in both folders.

    Raises: FileNotFoundError without any reference, ValueError where only one of the folders has a case.
    """
    wanted, found = ({f.name for f in folder.glob(f"*{ending}")} for folder in (reference, prediction))
    if not wanted:
        raise FileNotFoundError(f"{reference} has no file *{ending}.")
    problems = [f"{name}: no prediction in {prediction}" for name in sorted(wanted - found)]
    problems += [f"{name}: no reference in {reference}" for name in sorted(found - wanted)]
    if problems:
        raise ValueError("Nothing was evaluated:\n  " + "\n  ".join(problems))
    return {name.removesuffix(ending): (prediction / name, reference / name) for name in sorted(wanted)}


def read_description(prediction: Path, reference: Path, dataset_json: Path | None) -> dict:
    """The dataset.json that is given, or the one that belongs to the folders, see `evaluate`."""
    places = [dataset_json] if dataset_json else [prediction / "dataset.json", reference.parent / "dataset.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        several = "Neither of these is there" if len(places) > 1 else "This is not there"
        raise FileNotFoundError(
            f"{several}: {', '.join(map(str, places))}. Give one: -djfile FILE, or the values of the labels: -l 1 2"
        )
    return read_dataset_json(file, "labels", "file_ending")


def describe_labels(labels: Sequence[int], reference: Path) -> dict:
    """What a dataset.json would say of the files in the folder `reference`, which have the labels of these values.

    Raises: ValueError for a value that is no label, or files of several formats; FileNotFoundError without any file.
    """
    if min(labels) < 1:
        raise ValueError(f"-l {min(labels)} is no label: 0 is the background, labels are numbers from 1.")
    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    names = [file.name for file in reference.iterdir()] if reference.is_dir() else []
    # .nii.gz before .gz: the longest that fits
    endings = {max((e for e in known if name.endswith(e)), key=len, default="") for name in names} - {""}
    if not endings:
        raise FileNotFoundError(f"{reference} has no file that nnU-Net reads ({', '.join(sorted(known))}).")
    if len(endings) > 1:
        raise ValueError(f"{reference} has files of several formats ({', '.join(sorted(endings))}). Keep one of them.")
    return {"labels": {"background": 0, **{str(label): label for label in labels}}, "file_ending": endings.pop()}


def label_values(dataset_json: dict) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Name to values of the foreground labels or regions of a dataset.json, and the ignore label."""
    labels = dict(dataset_json["labels"])
    ignore_label = labels.pop("ignore", None)
    as_tuples = {name: tuple(v) if isinstance(v, list) else (int(v),) for name, v in labels.items()}
    return {name: values for name, values in as_tuples.items() if values != (0,)}, ignore_label


def statistics_of(cases: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Per metric the mean, standard deviation and worst of the cases that have one, and how many have none."""
    summary = {}
    for name in METRICS:
        values = np.array([case[name] for case in cases], dtype=float)
        values, missing = values[~np.isnan(values)], int(np.isnan(values).sum())
        worst = np.min if name in ("Dice", "Jaccard") else np.max
        figures = (values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0, worst(values)) if len(values) else ()
        keys = ("mean", "sd", "worst")
        summary[name] = dict(zip(keys, map(float, figures), strict=True)) if figures else dict.fromkeys(keys)
        summary[name]["undefined"] = missing
    return summary


def markdown(means: dict[str, dict], unit: str) -> str:
    """Table of the means over the cases, and a line per label with cases that have no distance."""
    columns = ("Dice", "Jaccard", f"HD95_{unit}", f"ASD_{unit}", f"ASSD_{unit}")
    heads = " | ".join(f"{c} (%)" if "_" not in c else f"{c.split('_')[0]} ({unit})" for c in columns)
    lines = [f"| label | {heads} | worst Dice (%) |", "|---" * (len(columns) + 2) + "|"]
    notes = []
    for label, metrics in means.items():
        shown = [_figure(metrics[c]["mean"], 100 if "_" not in c else 1) for c in columns]
        lines.append(f"| {label} | {' | '.join(shown)} | {_figure(metrics['Dice']['worst'], 100)} |")
        missing = metrics[columns[2]]["undefined"]
        notes += [f"{label}: no distance in {counted(missing, 'case')}, where a mask is empty"] if missing else []
    return "\n".join([*lines, *notes])


def _figure(value: float | None, factor: float) -> str:
    return "" if value is None else f"{factor * value:.2f}"
