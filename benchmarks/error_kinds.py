"""What kinds of errors the predictions of methods.py have, as parts of the reference's foreground.

    python benchmarks/error_kinds.py "LA-4, supervised" "LA-4, nnUNetTrainerM3HL" "LA-60, supervised" [--on test]

Reads what methods.py has predicted into nnUNet_results/TASK/seed_N/ROW, all seeds that are there, and writes
results/error_kinds.md. Every voxel that is wrong is of one kind:

- *elsewhere*: foreground in a piece that touches the reference nowhere; nnU-Net's postprocessing can remove it;
- *edge*: within a voxel of the reference's boundary (in the slice, where the network is 2D);
- *missing*, *too much*: reference that is not found, and foreground that is none, farther from the boundary;
- *class*: foreground of the wrong class.

The percentages are means over the scans. A per cent of wrong voxels costs about half a per cent of Dice.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.paths import nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from scipy import ndimage
from tasks import RESULTS, TASKS

from nnunet_ssl.system.files import replacing

EVERYWHERE = np.ones((3, 3, 3), bool)
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


def of_row(task: str, row: str, on: str) -> tuple[int, list[dict[str, float]]]:
    """Number of seeds, and the kinds of every prediction of theirs."""
    folder = "labelsTs" if on == "test" else "labelsTr"
    references = Path(nnUNet_raw) / str(maybe_convert_to_dataset_name(TASKS[task].dataset)) / folder
    seeds = sorted((Path(nnUNet_results) / task).glob(f"seed_*/{row.replace(', ', '_')}/predicted_{on}"))
    if not seeds:
        raise SystemExit(f"{task} has no predictions of {row!r} ({on} scans) in {nnUNet_results}: run methods.py.")
    files = [file for seed in seeds for file in sorted(seed.glob("*.nii.gz"))]
    flat = TASKS[task].base == "2d"
    return len(seeds), [error_kinds(read(file), read(references / file.name), flat) for file in files]


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="task and row, as in the tables")
    parser.add_argument("--on", choices=["test", "development"], default="test")
    args = parser.parse_args()
    lines = [
        f"Wrong voxels in percent of the reference's foreground, means over the {args.on} scans. "
        "`benchmarks/error_kinds.py` explains the kinds.",
        "",
        f"| task, row | seeds | {' | '.join(KINDS)} | all |",
        f"|---|---|{'---|' * len(KINDS)}---|",
    ]
    for name in args.rows:
        seeds, found = of_row(*name.split(", ", 1), args.on)
        means = [statistics.mean(kinds[kind] for kinds in found) for kind in KINDS]
        lines.append(f"| {name} | {seeds} | {' | '.join(f'{mean:.1f}' for mean in [*means, sum(means)])} |")
        print(lines[-1], flush=True)
    with replacing(RESULTS / "error_kinds.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
