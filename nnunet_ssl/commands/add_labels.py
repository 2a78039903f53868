"""New labels in a dataset that is planned already: unlabeled scans become labeled ones of a fold."""

import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk
from nnunetv2 import paths
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.commands.interrupted_labels import convert_series
from nnunet_ssl.commands.preprocess import preprocess_case
from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.label_checks import label_problems
from nnunet_ssl.data.plausibility import Expected, expected_scans
from nnunet_ssl.data.preprocessed import FILES, finished_cases, labeled_folders
from nnunet_ssl.data.scan_checks import check_scan
from nnunet_ssl.data.scans import find_scans, unlabeled_scans, unpacked
from nnunet_ssl.data.splits import move_to_train, read_fold, read_splits, refuse_running_trainings, save_splits
from nnunet_ssl.system.files import read_json, replacing
from nnunet_ssl.system.lock import locked
from nnunet_ssl.system.pool import run_all, worker_pool

SERIES = "dicom_labeled"  # of the raw dataset: where DICOM series go whose scan is in imagesTr now


@dataclass(frozen=True)
class Addition:
    """A scan that gets a label: the files of its images, its label file, and whether it is in imagesUn."""

    case: str
    images: tuple[Path, ...]
    label: Path
    is_own: bool


def add_labels(
    dataset: str, cases: Sequence[str], fold: int | str, new_fold: bool = False, num_processes: int = 3
) -> tuple[int, dict[str, list[str]]]:
    """Moves unlabeled scans, whose labels are in labelsTr now, to the labeled ones of a fold; nothing is planned anew.

    Every label is checked first. Then the cases are preprocessed as labeled ones, for all plans and configurations that
    have preprocessed cases, where they are missing or older than the label. Scans of imagesUn move to imagesTr, and
    count as unlabeled in the other folds still. The split changes last but for the files that are taken away; it keeps
    a backup. An interrupted run is repeated with the same command.

    Args:
        dataset: id or name.
        cases: names of scans in the "unlabeled" list of the fold, in imagesUn, or in imagesTr and no list of the fold.
        fold: a number.
        new_fold: leave the fold as it is, and append one with the new labels.
        num_processes: worker processes.

    Returns:
        Number of the fold that has the labels now, and its lists.

    Raises:
        FileNotFoundError: no dataset, no splits_final.json, nothing preprocessed.
        ValueError: no such fold; cases or labels that do not fit, all of which are named. Nothing was changed then.
        RuntimeError: a training of the dataset is running, or another run of this command.
    """
    name = str(maybe_convert_to_dataset_name(dataset))
    raw, folder = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name
    splits = folder / "splits_final.json"
    if fold == "all":
        raise ValueError("Fold all has every case of imagesTr, and no list to add to. Give the number of a fold.")
    if not splits.is_file():
        raise FileNotFoundError(
            f"{splits} is missing: there is no fold yet. A training, or nnunet-ssl split, makes it."
        )
    read_fold(splits, fold)
    dataset_json = read_dataset_json(raw / "dataset.json", "channel_names", "labels", "file_ending")
    targets = labeled_folders(folder)
    with locked(folder / ".split.lock", f"adding labels to {name}"):
        refuse_running_trainings(name)
        folds = read_splits(splits)
        additions = find_additions(list(dict.fromkeys(cases)), raw, dataset_json, folds, fold)
        plans, configuration = next(iter(targets.values()))
        expected = expected_scans(plans, {configuration: plans.get_configuration(configuration)}, dataset_json)
        with worker_pool(min(num_processes, len(additions))) as pool:
            found = run_all(pool, problems_of, {a.case: (a, expected) for a in additions}, "Checking labels")
            if problems := [line for lines in found.values() for line in lines]:
                raise ValueError("Nothing was added:\n  " + "\n  ".join(problems))
            preprocess_labeled(pool, additions, targets, dataset_json)
        own = [addition for addition in additions if addition.is_own]
        publish_labels(additions, raw, folder, dataset_json["file_ending"])
        note_cases(own, raw, folder, dataset_json["file_ending"])
        number = move_to_train(folds, fold, [a.case for a in additions], [a.case for a in own], new_fold)
        save_splits(splits, folds, overwrite=True)
        take_away(own, raw, folder)
    return number, folds[number]


def find_additions(cases: Sequence[str], raw: Path, dataset_json: dict, folds: list, fold: int) -> list[Addition]:
    """The files of scans that get a label; raises ValueError with a line for each that cannot get one."""
    known = get_filenames_of_train_images_and_targets(str(raw))
    own, _ = unlabeled_scans(raw / "imagesUn", dataset_json)
    found, problems = [], []
    train = set(folds[fold]["train"])
    interrupted = any(case in own and case in train for case in cases)  # a run that had its split written
    for case in cases:
        lists = [key for key in ("train", "val", "test") if case in folds[fold].get(key, [])]
        if interrupted and lists == ["train"] and case not in own:
            continue  # of that run, and done
        if lists and not (lists == ["train"] and case in own):
            kinds = {"train": "labeled already", "val": "for validation", "test": "for testing"}
            problems.append(f"{case}: {' and '.join(kinds[key] for key in lists)} in fold {fold}")
        elif case in known:
            files, there = tuple(map(Path, own.get(case, known[case]["images"]))), known[case]["images"]
            if case in own and not all(same_image(*pair) for pair in zip(files, there, strict=False)):
                problems.append(f"{case}: another scan of this name is in imagesTr; rename the one in imagesUn")
            found.append(Addition(case, files, Path(known[case]["label"]), case in own))
        elif case in own:
            label = raw / "labelsTr" / f"{case}{dataset_json['file_ending']}"
            found.append(Addition(case, tuple(own[case]), label, True))
        else:
            problems.append(f"{case}: no scan of {raw}, neither in imagesUn nor in imagesTr")
    if problems:
        raise ValueError("Nothing was added:\n  " + "\n  ".join(problems))
    return found


def same_image(file: Path, other: str) -> bool:
    """Whether a file, or the DICOM series in a folder, is the image in another file: a copy of an interrupted run."""
    if not file.is_dir():
        return filecmp.cmp(file, other, shallow=False)
    with unpacked(file, "".join(Path(other).suffixes[-2:])) as path:
        one, two = (sitk.GetArrayFromImage(sitk.ReadImage(str(each))) for each in (path, other))
    return one.shape == two.shape and bool((one == two).all())


def problems_of(addition: Addition, expected: Expected) -> list[str]:
    """Lines with what is wrong with the files of a scan that gets a label."""
    errors = check_scan(addition.case, addition.images, expected, named=addition.is_own).errors
    return errors or label_problems(addition.case, addition.label, addition.images, expected)


def preprocess_labeled(
    pool, additions: Sequence[Addition], targets: dict[Path, tuple[PlansManager, str]], dataset_json: dict
) -> None:
    """Preprocesses scans with their labels into every folder that lacks them, or has them from before the label."""
    jobs, scratches = {}, []
    for target, (plans, name) in targets.items():
        scratch = target.with_name(f"{target.name}_new_labels.tmp")
        there, how = finished_cases(target), (plans, plans.get_configuration(name), dataset_json)
        for a in additions:
            if a.case not in there or is_newer(a.label, target / f"{a.case}.pkl"):
                jobs[f"{a.case} ({target.name})"] = (a.case, a.images, target, scratch, *how, a.label)
        scratches.append(scratch)
    for scratch in scratches:
        shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run has left
        scratch.mkdir()
    run_all(pool, preprocess_case, jobs, "Preprocessing labeled scans")
    for scratch in scratches:
        shutil.rmtree(scratch)


def is_newer(file: Path, than: Path) -> bool:
    """Whether a file was written, or put in its place, after another one was written."""
    state = file.stat()
    return max(state.st_mtime_ns, state.st_ctime_ns) > than.stat().st_mtime_ns


def publish_labels(additions: Iterable[Addition], raw: Path, folder: Path, ending: str) -> None:
    """Copies labels to gt_segmentations, as nnU-Net's preprocessing does, and images of imagesUn to imagesTr."""
    (folder / "gt_segmentations").mkdir(exist_ok=True)
    for addition in additions:
        copy(addition.label, folder / "gt_segmentations" / f"{addition.case}{ending}")
        if not addition.is_own:
            continue
        (raw / "imagesTr").mkdir(exist_ok=True)
        if addition.images[0].is_dir():
            convert_series(addition.case, [str(addition.images[0])], raw / "imagesTr", ending)
            continue
        for file in addition.images:
            copy(file, raw / "imagesTr" / channel_name(file, addition.case, ending))
            beside = file.with_name(f"{addition.case}.json")  # the spacing of a TIFF
            if beside.is_file():
                copy(beside, raw / "imagesTr" / beside.name)


def channel_name(file: Path, case: str, ending: str) -> str:
    """Name of an image file with the number of its channel, which the only channel may lack in imagesUn."""
    numbered = re.fullmatch(re.escape(case) + r"_\d{4}" + re.escape(ending), file.name)
    return file.name if numbered else f"{case}_0000{ending}"


def copy(source: Path, target: Path) -> None:
    """Copies a file, with its times, in one step."""
    with replacing(target) as temporary:
        shutil.copy2(source, temporary)


def note_cases(own: Sequence[Addition], raw: Path, folder: Path, ending: str) -> None:
    """Writes the number of labeled cases, and entries for `own` where there is a table, into both dataset.json."""
    scans, _ = find_scans(raw / "imagesTr", ending)
    for file in (raw / "dataset.json", folder / "dataset.json"):
        if not file.is_file():
            continue
        content = read_json(file)
        if content.get("dataset"):
            for addition in own:
                images = [os.path.relpath(path, raw) for path in scans[addition.case]]
                content["dataset"][addition.case] = {"images": images, "label": os.path.relpath(addition.label, raw)}
        content["numTraining"] = len(content.get("dataset") or scans)
        if content != read_json(file):
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(content, indent=4))


def take_away(own: Iterable[Addition], raw: Path, folder: Path) -> None:
    """Removes scans that are in imagesTr now from imagesUn, and their preprocessed unlabeled copies."""
    for addition in own:
        for target in folder.glob("*_unlabeled"):
            for suffix in reversed(FILES):  # the one that marks a complete case first
                (target / f"{addition.case}{suffix}").unlink(missing_ok=True)
        for file in addition.images:
            if file.is_dir():
                (raw / SERIES).mkdir(exist_ok=True)
                os.replace(file, raw / SERIES / file.name)
            else:
                file.unlink()
                file.with_name(f"{addition.case}.json").unlink(missing_ok=True)  # the spacing of a TIFF
