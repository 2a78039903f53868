"""Hiding labels of a fully labeled dataset: folds with labeled, validation and unlabeled cases."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2 import paths
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.splits import save_splits
from nnunet_ssl.system.wording import counted

KINDS = {"train": "labeled", "val": "for validation", "unlabeled": "unlabeled"}
VAL_FRACTION = 0.2  # part of the cases that is held out for validation unless their number is given


def nested_folds(
    cases: Sequence[str], labeled: Sequence[int], val: int | None = None, seed: int = 12345
) -> list[dict[str, list[str]]]:
    """Draw one fold per number in `labeled`: the same `val` cases in each, and smaller labeled sets inside larger ones.

    Every list of a fold is sorted and the three are disjoint; `unlabeled` is empty where the numbers use all cases up.
    Raises: ValueError for numbers that the cases cannot serve.
    """
    if not labeled:
        raise ValueError("--labeled is empty: give at least one number of labeled cases, for example --labeled 8.")
    if min(labeled) < 1:
        raise ValueError(f"--labeled {min(labeled)} is too small: a fold needs at least 1 labeled case.")
    twice = sorted({number for number in labeled if list(labeled).count(number) > 1})
    if twice:
        raise ValueError(f"--labeled has {twice[0]} more than once: these folds would be the same. Give it once.")
    if val is None:
        val = max(1, int(VAL_FRACTION * len(cases)))
    if val < 1:
        raise ValueError(f"--val {val} is too small: nnU-Net validates every fold, so it needs at least 1 case.")
    if max(labeled) + val > len(cases):
        raise ValueError(
            f"--labeled {max(labeled)} and --val {val} need {counted(max(labeled) + val, 'case')}, but the dataset has "
            f"{len(cases)}. Lower --labeled or --val."
        )
    # RandomState: NumPy guarantees its stream for good, so that a seed means the same split in every version.
    order = np.random.RandomState(seed).permutation(len(cases))
    shuffled = [sorted(cases)[index] for index in order]
    held_out, rest = shuffled[:val], shuffled[val:]
    return [
        {"train": sorted(rest[:number]), "val": sorted(held_out), "unlabeled": sorted(rest[number:])}
        for number in labeled
    ]


def split_dataset(
    dataset: str, labeled: Sequence[int], val: int | None = None, seed: int = 12345, overwrite: bool = False
) -> Path:
    """Write a splits_final.json that hides the labels of most cases of a fully labeled dataset; return its path.

    What every fold holds is printed.
    `dataset` is an id or a name in nnUNet_raw; fold i gets `labeled[i]` labeled cases; `val` is a number of cases
    (default: a fifth, at least 1), the same ones in every fold.
    Raises: ValueError, FileNotFoundError, FileExistsError, or RuntimeError where a training of the dataset is running,
    before anything is written.
    """
    name = str(maybe_convert_to_dataset_name(dataset))
    raw = Path(paths.nnUNet_raw) / name
    if not (raw / "dataset.json").is_file():
        raise FileNotFoundError(f"{raw / 'dataset.json'} is missing: -d needs a dataset in nnUNet_raw.")
    read_dataset_json(raw / "dataset.json", "file_ending")  # what nnU-Net reads next
    files = get_filenames_of_train_images_and_targets(str(raw))
    without_label = sorted(case for case, of_case in files.items() if not Path(of_case["label"]).is_file())
    if without_label:
        raise FileNotFoundError(
            f"{len(without_label)} of {counted(len(files), 'case')} in {raw / 'imagesTr'} without a label file: "
            f"{', '.join(without_label)}. Move their images to {raw / 'imagesUn'}: these need no split."
        )
    folds = nested_folds([str(case) for case in files], labeled, val, seed)
    path = Path(paths.nnUNet_preprocessed) / name / "splits_final.json"
    save_splits(path, folds, overwrite)
    for number, fold in enumerate(folds):
        counts = ", ".join(f"{len(fold[key])} {kind}" for key, kind in KINDS.items())
        print(f"fold {number}: {counts}; labeled: {', '.join(fold['train'])}")
    return path
