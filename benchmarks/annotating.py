"""What annotating the five scans that `nnunet-ssl rank` puts first brings, against five at random.

    nnunet-ssl rank -d 501 -c 3d_fullres_quick -f 1 -tr nnUNetTrainerM3HL -o OUT      # LA-4, seed 0 of methods.py
    python benchmarks/annotating.py folds OUT
    python benchmarks/methods.py queue benchmarks/annotating.txt --bf16
    python benchmarks/annotating.py table

`folds` appends to splits_final.json, by `nnunet-ssl split --add --new-fold`, a fold with the scans that are first and
three with as many at random: the tasks LA-9-ranked, LA-9-random-0, -1 and -2 of tasks.py. Each is trained from random
weights. The labels were hidden, so an annotator would have drawn what the dataset's did.
"""

import argparse
import csv
import json
import subprocess
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from ruler import read
from tasks import ANNOTATED, TASKS

from nnunet_ssl.commands.ranking_files import TABLE

BEFORE, NUMBER = "LA-4", 5
ROW = "nnUNetTrainerM3HL, pseudo_dice=True, pseudo_weight=0.5, rampup=0.0"  # the defaults when this was measured


def choices(table: Path) -> dict[str, list[str]]:
    """The scans that each task annotates: the first of the table, and draws from all of it."""
    with table.open(encoding="utf-8", newline="") as f:
        cases = [row["case"] for row in csv.DictReader(f)]
    drawn = [np.random.default_rng(seed).choice(sorted(cases), NUMBER, replace=False) for seed in range(3)]
    return dict(zip(ANNOTATED, [cases[:NUMBER], *(sorted(map(str, draw)) for draw in drawn)], strict=True))


def add_folds(output: Path) -> None:
    task = TASKS[BEFORE]
    for name, cases in choices(output / TABLE).items():
        command = ["nnunet-ssl", "split", "-d", task.dataset, "-f", task.fold, "--new-fold", "--add", *cases]
        subprocess.run([str(word) for word in command], check=True)
        dataset = maybe_convert_to_dataset_name(task.dataset)
        folds = json.loads((Path(nnUNet_preprocessed) / dataset / "splits_final.json").read_text())
        if len(folds) - 1 != TASKS[name].fold:
            raise SystemExit(f"{dataset} has {len(folds)} folds: tasks.py expects the one of {name} to be the last.")


def table() -> str:
    """Dice of seed 0, as it is and of the largest component."""
    lines = ["| trained on | Dice | largest component |", "|---|---|---|"]
    for name in (BEFORE, *ANNOTATED):
        scores = read(name, "test")[ROW]
        dice, largest = (scores.dice([0], metric).mean() for metric in ("dice", "dice_largest"))
        lines.append(f"| {name} | {dice:.2f} | {largest:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("folds").add_argument("output", type=Path, help="folder of nnunet-ssl rank")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "folds":
        add_folds(args.output)
    else:
        print(table())


if __name__ == "__main__":
    main()
