"""Models in nnUNet_results or in folders of their own, as several commands take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_ssl.system.files import read_json


@dataclass(frozen=True)
class Model:
    """A fold of a model folder: the file of its weights is folder/fold_<fold>/checkpoint."""

    folder: Path
    fold: int | str
    checkpoint: str

    @property
    def file(self) -> Path:
        return self.folder / f"fold_{self.fold}" / self.checkpoint


def trained_folds(folder: Path, checkpoint: str) -> list[int | str]:
    """The numbered folds of a model folder that have the checkpoint; where there is none, "all" if it has it."""
    trained = {file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}")}
    return sorted(int(fold) for fold in trained if fold.isdecimal()) or sorted(trained & {"all"})


def further_models(
    folders: Sequence[Path], first: Path, checkpoint: str, folds: Sequence[int | str] | None = None
) -> list[Model]:
    """The models of --also: folds of further model folders, whose networks are joined with those of a first one.

    Args:
        folders: of the further models.
        first: folder of the first model.
        checkpoint: file name in the folders of the folds.
        folds: of every folder; None: all that are trained.

    Raises:
        FileNotFoundError: a folder is no model folder, or a fold is not trained.
        ValueError: a folder has other plans than the first one.
    """
    found = []
    for folder in folders:
        plans = folder / "plans.json"
        if plans.is_file() and read_json(plans) != read_json(first / "plans.json"):
            raise ValueError(f"{folder} has other plans than {first}. Only models with the same plans can be joined.")
        models = [Model(folder, fold, checkpoint) for fold in folds or trained_folds(folder, checkpoint) or ["*"]]
        missing = [file for file in (plans, *(model.file for model in models)) if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]} is missing. --also takes model folders.")
        found += models
    return found
