"""What kinds of errors the predictions of methods.py have, as parts of the reference's foreground.

    python benchmarks/error_kinds.py "LA-4, supervised" "LA-4, nnUNetTrainerM3HL" "LA-60, supervised"

Reads what methods.py has predicted for the test scans into nnUNet_results/TASK/seed_N/ROW, all seeds that are there,
and writes results/error_kinds.md and docs/error_kinds.png, of the rows named. One without predictions is taken from
the table as it was. Every voxel that is wrong is of one kind:

- *elsewhere*: foreground in a piece that overlaps the reference nowhere; nnU-Net's postprocessing can remove it;
- *edge*: within a voxel of the reference's boundary (in the slice, where the network is 2D);
- *missing*, *too much*: reference that is not found, and foreground that is none, farther from the boundary;
- *class*: foreground of the wrong class.

The percentages are means over the scans. A per cent of wrong voxels costs about half a per cent of Dice.
"""

import argparse
import re
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk
from nnunetv2.paths import nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from scipy import ndimage
from tasks import RESULTS, STEPS_PER_EPOCH, TASKS

from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.files import replacing

EVERYWHERE = np.ones((3, 3, 3), bool)
TABLE = RESULTS / "error_kinds.md"
PICTURE = Path(__file__).parents[1] / "docs" / "error_kinds.png"
KINDS = ("edge", "missing", "too much", "elsewhere", "class")


def error_kinds(prediction: np.ndarray, reference: np.ndarray, flat: bool) -> dict[str, float]:
    """Wrong voxels of every kind, in percent of the reference's foreground.

    Args:
        prediction: (Z, Y, X) integers, 0 is the background.
        reference: the same, with foreground.
        flat: whether the neighbours of a voxel are those in its slice.
    """
    ours, theirs = prediction > 0, reference > 0
    pieces, _ = ndimage.label(ours, EVERYWHERE)
    elsewhere = ours & ~np.isin(pieces, np.unique(pieces[ours & theirs]))
    neighbours = EVERYWHERE[:1] if flat else EVERYWHERE
    # a heart that goes on at the border of the image has no boundary there
    inside = ndimage.binary_erosion(theirs, neighbours, border_value=1)
    edge = ndimage.binary_dilation(theirs, neighbours) & ~inside
    found = {
        "edge": (ours != theirs) & edge & ~elsewhere,
        "missing": theirs & ~ours & ~edge,
        "too much": ours & ~theirs & ~edge & ~elsewhere,
        "elsewhere": elsewhere,
        "class": ours & theirs & (prediction != reference),
    }
    return {kind: 100 * found[kind].sum() / theirs.sum() for kind in KINDS}


def of_row(name: str, before: dict[str, list[float]]) -> list[float]:
    """Number of seeds, the means of the KINDS over all their predictions, and the sum of these.

    Args:
        name: of the row, with its task.
        before: the rows of the table, for those without predictions.
    """
    task, _, row = name.partition(", ")
    seeds = sorted((Path(nnUNet_results) / task).glob(f"seed_*/{row.replace(', ', '_')}/predicted_test"))
    if task not in TASKS or not seeds:
        if name in before:
            print(f"{name}: no predictions, taken from the table", flush=True)
            return before[name]
        raise SystemExit(f"Neither {nnUNet_results} nor {TABLE} has {name!r}: run methods.py.")
    references = Path(nnUNet_raw) / str(maybe_convert_to_dataset_name(TASKS[task].dataset)) / "labelsTs"
    files = [file for seed in seeds for file in sorted(seed.glob("*.nii.gz"))]
    flat = TASKS[task].base == "2d"
    found = [error_kinds(read(file), read(references / file.name), flat) for file in files]
    means = [statistics.mean(kinds[kind] for kinds in found) for kind in KINDS]
    return [len(seeds), *means, sum(means)]


def read_table() -> dict[str, list[float]]:
    """Rows of the table as it is, as of_row gives them."""
    cells = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines()] if TABLE.is_file() else []
    return {row[0]: [int(row[1]), *map(float, row[2:])] for row in cells if row[0].split(",")[0] in TASKS}


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def draw(rows: dict[str, list[float]], file: Path) -> None:
    """A bar per row, of the means of the KINDS; tasks apart."""
    tasks = [name.split("-")[0] for name in rows]
    heights = [i + 0.6 * len(set(tasks[: i + 1])) for i in range(len(rows))]
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.42 * len(rows)))
    left = np.zeros(len(rows))
    for kind, values, colour in zip(KINDS, np.transpose([*rows.values()]), COLOURS, strict=False):
        axis.barh(heights, values, 0.75, left, label=kind, color=colour)
        left += values
    axis.set_yticks(heights, [with_steps(name.replace("nnUNetTrainer", "")) for name in rows])
    axis.invert_yaxis()
    axis.set_xlabel("wrong voxels, % of the reference's foreground")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.4, 1))
    figure.tight_layout()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def with_steps(name: str) -> str:
    return re.sub(r"num_epochs=(\d+)", lambda found: f"{int(found[1]) * STEPS_PER_EPOCH:,} steps", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="task and row, as in the tables")
    args = parser.parse_args()
    before = read_table()
    lines = [
        "Wrong voxels in percent of the reference's foreground, means over the test scans. "
        "`benchmarks/error_kinds.py` explains the kinds.",
        "",
        f"| task, row | seeds | {' | '.join(KINDS)} | all |",
        f"|---|---|{'---|' * len(KINDS)}---|",
    ]
    drawn = {}
    for name in args.rows:
        seeds, *values = of_row(name, before)
        drawn[name] = values[:-1]
        lines.append(f"| {name} | {seeds} | {' | '.join(f'{value:.1f}' for value in values)} |")
        print(lines[-1], flush=True)
    with replacing(TABLE) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    draw(drawn, PICTURE)


if __name__ == "__main__":
    main()
