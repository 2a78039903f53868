"""The tasks of the benchmark, and the tables of cases that methods.py writes and ruler.py reads."""

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
STEPS_PER_EPOCH = 250  # nnU-Net's
SUPERVISED, SELF_TRAINING = "supervised", "self-training"  # rows that are no trainer's name
RUN = ["row", "seed"]  # what identifies a run in the table of a task
# Of one core: what the phases took, labeling is in the second; and a first phase on the machine of that day, the unit
# of the cost
SECONDS = ["first_seconds", "second_seconds", "unit_seconds"]
# Per case, means over the classes: percent; distances in the task's unit; the Dice of the largest component alone
METRICS = ["dice", "hd95", "asd", "dice_largest"]


@dataclass(frozen=True)
class Task:
    dataset: int
    fold: int
    base: str  # the configuration on whose data the small network is trained
    patch: tuple[int, ...]  # voxels
    features: tuple[int, ...]  # per stage; every stage halves every axis
    batch_size: int
    steps: int  # of a phase
    unit: str  # of the distances: "mm", or "voxels" where the scans came without a spacing
    first_pseudo_dataset: int | None = None  # id for seed 0, the other seeds follow; None: all labels are known
    hidden: int = 0  # unlabeled scans whose labels serve for development, beside the validation cases


LA = {"dataset": 501, "base": "3d_fullres", "patch": (20, 28, 28), "features": (16, 32, 64), "batch_size": 4}
LA |= {"steps": 4000, "unit": "mm", "hidden": 22}
ACDC = {"dataset": 503, "base": "2d", "patch": (112, 112), "features": (16, 32, 64, 128, 128), "batch_size": 8}
ACDC |= {"steps": 2500, "unit": "voxels"}
TASKS = {
    "LA-8": Task(fold=0, first_pseudo_dataset=510, **LA),
    "LA-4": Task(fold=1, first_pseudo_dataset=520, **LA),
    "LA-60": Task(fold=3, **LA),
    "ACDC-7": Task(fold=0, first_pseudo_dataset=530, **ACDC),
    "ACDC-3": Task(fold=1, first_pseudo_dataset=540, **ACDC),
    "ACDC-60": Task(fold=3, **ACDC),
}
# LA-4 and five scans more, in folds that annotating.py appends
ANNOTATED = {
    name: Task(fold=4 + i, **LA) for i, name in enumerate(["LA-9-ranked", *(f"LA-9-random-{n}" for n in range(3))])
}
TASKS |= ANNOTATED


def table_file(task: str, on: str) -> Path:
    return RESULTS / f"{task}{'' if on == 'test' else f'_{on}'}.csv"


def read_rows(task: str, on: str) -> list[list[str]]:
    """The cells of a task's table without its header; none where there is no table yet."""
    file = table_file(task, on)
    if not file.is_file():
        return []
    with file.open(newline="") as f:
        return list(csv.reader(f))[1:]


def mean_of_present(values: list[float]) -> float:
    """Mean of what is not NaN; NaN where everything is."""
    present = [value for value in values if not np.isnan(value)]
    return statistics.mean(present) if present else float("nan")
