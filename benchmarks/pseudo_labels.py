"""How good predictions of the unlabeled scans are before M3HL learns from them and after, scan by scan.

    python benchmarks/methods.py run LA-4 supervised --alone --on unlabeled
    python benchmarks/methods.py run LA-4 nnUNetTrainerM3HL --set num_epochs=64 --on unlabeled
    python benchmarks/methods.py run ACDC-3 supervised --alone --on unlabeled
    python benchmarks/methods.py run ACDC-3 nnUNetTrainerM3HL --set num_epochs=40 --on unlabeled
    python benchmarks/pseudo_labels.py

Before: those of the supervised training from which M3HL starts. After: those of its student, at the end of the longer
second phase. Without mirroring; the labels are known after all, and neither training saw them (22 of LA-4's 48 scans
also serve for development). Writes docs/pseudo_labels.png, and prints the means.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tasks import METRICS, RUN, SECONDS, STEPS_PER_EPOCH, SUPERVISED, TASKS, read_rows

from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.files import replacing

PICTURE = Path(__file__).parents[1] / "docs" / "pseudo_labels.png"
BEFORE = f"{SUPERVISED}, alone"
AFTER = {"LA-4": "nnUNetTrainerM3HL, num_epochs=64", "ACDC-3": "nnUNetTrainerM3HL, num_epochs=40"}
TITLES = {"LA-4": "Left atrium, 4 labeled scans", "ACDC-3": "ACDC, 3 labeled patients"}
HARD = 10  # scans
LOWEST = 50  # percent from which on Dice after is shown, if no scan has less


def read_dice(task: str, row: str) -> dict[str, float]:
    """Dice in percent of every unlabeled scan that a row of seed 0 was measured on."""
    case, dice = len(RUN) + len(SECONDS), len(RUN) + len(SECONDS) + 1 + METRICS.index("dice")
    return {cells[case]: float(cells[dice]) for cells in read_rows(task, "unlabeled") if cells[:2] == [row, "0"]}


def main() -> None:
    figure, axes = plt.subplots(1, len(AFTER), figsize=(9, 4.2), layout="constrained")
    for (task, row), axis in zip(AFTER.items(), axes, strict=True):
        before, after = read_dice(task, BEFORE), read_dice(task, row)
        if not before or before.keys() != after.keys():
            raise SystemExit(f"{task}: the unlabeled scans of {BEFORE!r} and {row!r} are not measured yet.")
        x, y = (np.array([dice[case] for case in sorted(before)]) for dice in (before, after))
        hard = np.argsort(x, kind="stable")[:HARD]
        print(
            f"{task}: {len(x)} scans, Dice {x.mean():.1f} before, {y.mean():.1f} after, better on {(y > x).sum()}; "
            f"the {HARD} worst before {x[hard].mean():.1f}, after {y[hard].mean():.1f}"
        )
        axis.plot([LOWEST, 100], [LOWEST, 100], color="0.45", linestyle="dashed", linewidth=1)
        axis.text(
            76,
            73,
            "no change",
            rotation=45,
            rotation_mode="anchor",
            va="top",
            transform_rotates_text=True,
            color="0.35",
            fontsize=9,
        )
        axis.scatter(x, y, s=26, color=COLOURS[0], alpha=0.6, linewidth=0)
        axis.set_title(f"{TITLES[task]}\n{len(x)} unlabeled scans, mean {x.mean():.1f} to {y.mean():.1f}", fontsize=11)
        steps = int(row.rpartition("=")[2]) * STEPS_PER_EPOCH
        axis.set_xlabel(f"Dice before: {TASKS[task].steps:,} supervised steps (%)")
        axis.set_ylabel(f"Dice after {steps:,} steps of M3HL (%)")
        axis.set_xlim(-2, 100)
        axis.set_ylim(min(LOWEST, y.min() - 2), 100)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(PICTURE) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


if __name__ == "__main__":
    main()
