"""The scans of a fold in the raw dataset: labeled, for validation, and unlabeled ones from both sources."""

from collections.abc import Sequence
from pathlib import Path

from nnunetv2 import paths

from nnunet_ssl.data.scans import name_problems, no_scan, reserved_names, unlabeled_scans
from nnunet_ssl.data.splits import read_fold


def sort_folds(
    name: str, folds: Sequence[int | str], cases: dict, dataset_json: dict
) -> list[tuple[list[str], list[str], dict[str, list[str]]]]:
    """What `sort_cases` finds for every fold; raises ValueError where a fold hides labels that another one knows."""
    entries = [sort_cases(name, fold, cases, dataset_json) for fold in folds]
    for fold, (_, _, scans) in zip(folds, entries, strict=True):
        if scans.keys() != entries[0][2].keys():
            raise ValueError(
                f"Folds {folds[0]} and {fold} of {name} have different unlabeled cases: a model of the one has seen "
                f"labels that the other one hides. Give folds with the same unlabeled cases."
            )
    return entries


def sort_cases(
    name: str, fold: int | str, cases: dict, dataset_json: dict
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Labeled and validation cases of a fold, and its unlabeled scans with their image files, from both sources.

    Args:
        name: of the dataset.
        fold: its number, or "all": every case of imagesTr is labeled then, none for validation.
        cases: what nnU-Net finds in the raw dataset: per case its images and label.
        dataset_json: of the raw dataset.

    Raises: ValueError that names cases of the fold that are missing, or in two roles; what `read_fold` raises.
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
