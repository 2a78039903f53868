"""Which cases a fold trains on with labels, which ones without, and which ones it validates on."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from nnunetv2 import paths

from nnunet_ssl.system.files import read_json, replacing
from nnunet_ssl.system.lock import refuse_if_held

LISTS = ("train", "val", "unlabeled", "test")  # of a fold; nnU-Net reads the first two
CROSSVAL_FOLDS = 5  # that nnU-Net draws where there is no splits_final.json


def read_splits(path: Path) -> list[dict[str, list[str]]]:
    """The folds of a splits_final.json; none where there is no file.

    Raises: ValueError that names the file where it is damaged, or its lists are not lists of cases.
    """
    folds = read_json(path) if path.is_file() else []
    if not isinstance(folds, list) or not all(isinstance(fold, dict) for fold in folds):
        raise ValueError(f'{path} must be a list of folds, as [{{"train": ["case_a"], "val": ["case_b"]}}].')
    for number, fold in enumerate(folds):
        for name in LISTS:
            cases = fold.get(name, [])
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise ValueError(f'{path}: "{name}" of fold {number} must be a list of case names. Correct the file.')
    return folds


def read_fold(path: Path, number: int) -> dict[str, list[str]]:
    """The lists of one fold of splits_final.json; "unlabeled" and "test" are empty where the file has none.

    Raises: ValueError that names the file where it has no such fold, or one that nnU-Net cannot train on.
    """
    folds = read_splits(path)
    if not 0 <= number < len(folds):
        has = f"has the folds 0 to {len(folds) - 1}" if folds else "has no fold"
        raise ValueError(f"Fold {number} does not exist: {path} {has}.")
    fold = {name: folds[number].get(name, []) for name in LISTS}
    for name in ("train", "val"):
        if not fold[name]:
            raise ValueError(f'{path}: fold {number} has no cases in "{name}". Put at least one there.')
    twice = sorted(case for case, number in Counter(fold["unlabeled"]).items() if number > 1)
    if twice:
        raise ValueError(f'{path}: "unlabeled" of fold {number} names cases more than once: {", ".join(twice[:5])}.')
    return fold


def labels_learnt(folder: Path) -> int | None:
    """With how many labeled cases the model in a fold's folder was trained, by its newest log; None without one."""
    logs = {tuple(map(int, re.findall(r"\d+", log.stem))): log for log in folder.glob("training_log_*.txt")}
    if not logs:
        return None
    text = logs[max(logs)].read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"split has (\d+) training and", text)  # nnU-Net's sentence
    return int(found[-1]) if found else None


def require_hidden(path: Path, number: int | str, model: Path, learnt: Collection[str] | None = None) -> None:
    """Raises ValueError where a model has learnt labels that the same fold hides or validates on now.

    Args:
        path: of splits_final.json; nothing is checked where there is none.
        number: of the fold.
        model: file in the folder of the fold.
        learnt: the cases; where they are not known, their number in the log counts.
    """
    if number == "all" or not path.is_file():
        return
    fold, what = read_fold(path, number), ""
    if learnt is None:
        count = labels_learnt(model.parent) or 0
        what = f"{count} labels, and that fold has {len(fold['train'])} now" * (count > len(fold["train"]))
    # a case that is in no list may have been lost, or left out for its label
    elif hidden := sorted(set(learnt) & {*fold["val"], *fold["unlabeled"], *fold["test"]}):
        what = f"the labels of {', '.join(hidden[:5])}"
    if what:
        raise ValueError(
            f"{model} has learnt labels that fold {number} of {path} hides or validates on now: {what}. The split has "
            f"changed since: train the model again in a new folder, or restore a backup of the split."
        )


def check_fold(path: Path, number: int) -> None:
    """Raises ValueError where nnU-Net has no such fold: in splits_final.json, or, without it, among those it draws."""
    if path.is_file():
        read_fold(path, number)
    elif not 0 <= number < CROSSVAL_FOLDS:
        raise ValueError(f"Fold {number} does not exist: without {path} there are the folds 0 to {CROSSVAL_FOLDS - 1}.")


def check_splits(path: Path, folds: list[dict[str, list[str]]], overwrite: bool = False) -> None:
    """Refuse to replace a split that differs from `folds`.

    Raises: FileExistsError without `overwrite`, RuntimeError with it where a training of the dataset is running.
    """
    if not path.exists() or path.read_text(encoding="utf-8") == _to_text(folds):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} already holds another split. Pass --overwrite to replace it (a backup is kept beside it)."
        )
    refuse_running_trainings(path.parent.name)


def refuse_running_trainings(dataset: str) -> None:
    """Raises RuntimeError where a training of the dataset of this name is running.

    nnU-Net's own trainings tell only where `nnunet-ssl compare` has started them.
    """
    folder = Path(paths.nnUNet_results, dataset) if paths.nnUNet_results.is_set() else None
    for pattern in ("*/fold_*/.training.lock", "*/.fold_*.lock") if folder else ():
        for lock in folder.glob(pattern):
            refuse_if_held(lock)


def save_splits(path: Path, folds: list[dict[str, list[str]]], overwrite: bool = False) -> None:
    """Write `folds` to `path` (splits_final.json) in one step: a reader sees the old file or the new one.

    A replaced file is kept as `<name>.bak`, `<name>.bak1`, ...; nothing happens when the content is the same.
    Raises: FileExistsError when another split is there and `overwrite` is off.
    """
    check_splits(path, folds, overwrite)
    text = _to_text(folds)
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        shutil.copy2(path, _free_backup(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text)


def move_to_train(folds: list[dict], fold: int, cases: Collection[str], own: Sequence[str], new_fold: bool) -> int:
    """Changes the lists of folds, and returns the number of the fold with the new labels.

    Args:
        folds: of splits_final.json; changed in place.
        fold: that the labels are for.
        cases: all new labeled ones.
        own: those from imagesUn, which every fold has used; the others go on with them as unlabeled ones.
        new_fold: append one, where no fold is like it already, in place of a change.
    """
    unlabeled = [case for case in folds[fold].get("unlabeled", []) if case not in cases]
    labeled = folds[fold] | {"train": sorted({*folds[fold]["train"], *cases})}
    if unlabeled or "unlabeled" in folds[fold]:
        labeled["unlabeled"] = unlabeled
    others = [entry for number, entry in enumerate(folds) if new_fold or number != fold]
    for entry in others:
        listed = {case for value in entry.values() if isinstance(value, list) for case in value}
        if new := [case for case in own if case not in listed]:
            entry["unlabeled"] = [*entry.get("unlabeled", []), *new]
    if not new_fold:
        folds[fold] = labeled
        return fold
    alike = [n for n, e in enumerate(folds) if n != fold and as_sets(e) == as_sets(labeled)]
    if alike:  # of an interrupted run
        return alike[0]
    folds.append(labeled)
    return len(folds) - 1


def as_sets(fold: dict[str, list[str]]) -> dict[str, set[str]]:
    """The lists of a fold, whose order does not count; an empty one is as none."""
    return {key: set(value) for key, value in fold.items() if value}


def _to_text(folds: list[dict[str, list[str]]]) -> str:
    return json.dumps(folds, indent=4) + "\n"


def _free_backup(path: Path) -> Path:
    backup, number = path.with_name(f"{path.name}.bak"), 0
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.bak{number}")
    return backup
