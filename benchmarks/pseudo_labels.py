"""What the labels that a training learns are worth: Dice of the unlabeled scans before and after, scan by scan.

    python benchmarks/methods.py run LA-4 supervised --alone --on unlabeled
    python benchmarks/methods.py run LA-4 nnUNetTrainerM3HL --set num_epochs=64 --on unlabeled
    python benchmarks/methods.py run ACDC-3 supervised --alone --on unlabeled
    python benchmarks/methods.py run ACDC-3 nnUNetTrainerM3HL --set num_epochs=40 --on unlabeled
    python benchmarks/pseudo_labels.py

Before: predictions of the supervised training from which M3HL starts, which are the labels that self-training learns.
After: M3HL's own, at the end of its longer second phase. Their labels are known after all; no training saw them.
Writes docs/pseudo_labels.png, and prints the means.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tasks import METRICS, RUN, SECONDS, SUPERVISED, read_rows

from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.files import replacing

PICTURE = Path(__file__).parents[1] / "docs" / "pseudo_labels.png"
BEFORE = f"{SUPERVISED}, alone"
AFTER = {"LA-4": "nnUNetTrainerM3HL, num_epochs=64", "ACDC-3": "nnUNetTrainerM3HL, num_epochs=40"}
TITLES = {"LA-4": "Left atrium, 4 labeled scans", "ACDC-3": "ACDC, 3 labeled patients"}
HARD = 10  # scans


def read_dice(task: str, row: str) -> dict[str, float]:
    """Dice in percent of every unlabeled scan that a row of seed 0 was measured on."""
    case, dice = len(RUN) + len(SECONDS), len(RUN) + len(SECONDS) + 1 + METRICS.index("dice")
    return {cells[case]: float(cells[dice]) for cells in read_rows(task, "unlabeled") if cells[:2] == [row, "0"]}


def main() -> None:
    figure, axes = plt.subplots(1, len(AFTER), figsize=(9, 5), sharey=True, layout="constrained")
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
        axis.plot([0, 100], [0, 100], color="0.45", linestyle="dashed", linewidth=1)
        axis.text(52, 48, "as before", rotation=45, rotation_mode="anchor", va="top", color="0.35", fontsize=9)
        axis.scatter(x, y, s=34, color=COLOURS[0], edgecolor="white")
        axis.set_title(f"{TITLES[task]}\n{len(x)} unlabeled scans, mean {x.mean():.1f} to {y.mean():.1f}", fontsize=11)
        axis.set_xlabel("Dice of the labels that self-training learns (%)")
        axis.set_aspect("equal")
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Dice of M3HL at its end (%)")
    with replacing(PICTURE) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


if __name__ == "__main__":
    main()
