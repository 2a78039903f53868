"""How well `nnunet-ssl rank` finds bad predictions, where the labels of the ranked scans are known after all.

    nnunet-ssl rank -d 501 -c 3d_fullres -f 0 -tr nnUNetTrainerM3HL -o OUT
    python benchmarks/ranking.py OUT $nnUNet_raw/Dataset501_LA/labelsTr -o ranking.png

The error of a scan is 1 - Dice of OUT/labels, the mean over the classes or regions that the reference or the
prediction has; voxels whose reference value is of no class (nnU-Net's ignore label) do not count. Printed are
Spearman's correlation with it, of the score, of every column of rank.csv, and of volume alone, with an interval that
holds 95 % of the bootstrap samples of scans; how many of the worst scans are among as many first ones, and how many
would be by chance. Labels serve for this check only: the score has no weight that was fitted.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk
from scipy.stats import spearmanr
from tqdm import tqdm

from nnunet_ssl.commands.ranking_files import LABELS, TABLE, read_ranking_settings
from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.files import replacing

RESAMPLES = 2000


def error(prediction: np.ndarray, reference: np.ndarray, classes: dict[str, Sequence[int]]) -> float:
    """1 - mean Dice of the classes that one of two label maps has, in [0, 1]; NaN where none has any."""
    known = np.isin(reference, [0, *(value for values in classes.values() for value in values)])
    dice = []
    for values in classes.values():
        own, true = np.isin(prediction, values) & known, np.isin(reference, values) & known
        if total := np.count_nonzero(own) + np.count_nonzero(true):
            dice.append(2 * np.count_nonzero(own & true) / total)
    return 1 - float(np.mean(dice)) if dice else np.nan


def read_columns(output: Path, labels: Path) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Names of the scans that have a label, their errors, and what may predict them: higher is meant to be worse."""
    settings = read_ranking_settings(output)
    with (output / TABLE).open(newline="") as f:
        rows = list(csv.DictReader(f))
    ending, errors = settings["file_ending"], {}
    for row in tqdm(rows, "Reading labels", unit="scan"):
        files = [folder / f"{row['case']}{ending}" for folder in (output / LABELS, labels)]
        if files[1].is_file():
            maps = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files]
            if maps[0].shape != maps[1].shape:
                raise ValueError(f"{files[1]} has another shape than {files[0]}: is it of the same scan?")
            errors[row["case"]] = error(*maps, settings["classes"])
    rows = [row for row in rows if not np.isnan(errors.get(row["case"], np.nan))]
    if len(rows) < 3:
        raise ValueError(f"{labels} has the labels of {len(rows)} scans of {output}: at least 3 are needed.")
    columns = {}
    for name in rows[0]:
        if name in ("case", "missing") or not any(row[name] for row in rows):
            continue
        columns[name] = np.array([float(row[name] or "nan") for row in rows])
    columns["missing"] = np.array([len(row["missing"].split()) for row in rows], dtype=float)
    columns["small volume"] = -sum(columns[f"volume_ml_{name}"] for name in settings["classes"])
    return [row["case"] for row in rows], np.array([errors[row["case"]] for row in rows]), columns


def correlation(values: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation of scans that have a value, and the ends of its bootstrap interval; NaN of constants."""
    known = ~np.isnan(values)
    values, errors = values[known], errors[known]
    if len(values) < 3 or np.ptp(values) == 0:
        return np.nan, np.nan, np.nan
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(values), size=len(values)) for _ in range(RESAMPLES))
    samples = [spearmanr(values[i], errors[i])[0] for i in drawn if np.ptp(values[i]) > 0 and np.ptp(errors[i]) > 0]
    return float(spearmanr(values, errors)[0]), *map(float, np.percentile(samples, [2.5, 97.5]))


def found_among_first(values: np.ndarray, errors: np.ndarray, number: int) -> int:
    """How many of the scans with the largest errors are among as many with the largest values; NaN counts as least."""
    first = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:number]
    return len(set(first) & set(np.argsort(-errors, kind="stable")[:number]))


def report(errors: np.ndarray, columns: dict[str, np.ndarray], worst: int) -> str:
    """Markdown table with a row per column."""
    lines = [
        f"| column | Spearman with 1 - Dice (95 %) | of the worst {worst} among the first {worst} |",
        "|---|---|---|",
    ]
    for name, values in columns.items():
        rho, low, high = correlation(values, errors)
        if np.isnan(rho):
            lines.append(f"| {name} | the same for all scans | |")
            continue
        found = found_among_first(values, errors, worst)
        lines.append(f"| {name} | {rho:.2f} ({low:.2f} to {high:.2f}) | {found} |")
    chance = worst**2 / len(errors)
    lines.append(f"| chance | 0 | {chance:.1f} |")
    dice = 100 * (1 - errors)
    lines.append(
        f"\n{len(errors)} scans, mean Dice {dice.mean():.1f} %, worst {dice.min():.1f} %; the first {worst} by score "
        f"have {dice[np.argsort(-columns['score'], kind='stable')[:worst]].mean():.1f} %"
    )
    return "\n".join(lines)


def draw(cases: Sequence[str], errors: np.ndarray, score: np.ndarray, worst: int, file: Path, title: str) -> None:
    """Writes a picture of score and error of every scan, the worst ones in another colour and shape."""
    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    is_worst = np.isin(np.arange(len(errors)), np.argsort(-errors, kind="stable")[:worst])
    for chosen, colour, marker, label in (
        (~is_worst, COLOURS[0], "o", "other scans"),
        (is_worst, COLOURS[5], "D", f"the {worst} scans with the lowest Dice"),
    ):
        axis.scatter(
            score[chosen], 100 * errors[chosen], s=34, color=colour, marker=marker, edgecolor="white", label=label
        )
    limit = np.sort(score)[::-1][worst - 1 : worst + 1].mean()
    axis.axvline(limit, color="0.45", linestyle="dashed", linewidth=1)
    found = found_among_first(score, errors, worst)
    axis.set_title(f"{title}{len(errors)} scans, Spearman {correlation(score, errors)[0]:.2f}", fontsize=11)
    text = f"right of the dashed line: the first {worst} of rank.csv, with {found} of the worst {worst}"
    axis.set_xlabel(f"score of nnunet-ssl rank, made without labels (higher: expected worse)\n{text}", fontsize=9)
    axis.set_ylabel("error of the prediction: 1 - Dice (%)")
    for index in np.argsort(-errors, kind="stable")[:1]:  # more names would lie on each other
        at = (score[index], 100 * errors[index])
        right = score[index] > np.mean([score.min(), score.max()])
        axis.annotate(
            cases[index], at, xytext=(-7 if right else 7, 0), textcoords="offset points", fontsize=8,
            ha="right" if right else "left", va="center",
        )  # fmt: skip
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False)
    axis.set_ylim(0, 100 * errors.max() * 1.22)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of nnunet-ssl rank")
    parser.add_argument("labels", type=Path, help="folder with the label files of the same scans")
    parser.add_argument("-o", dest="picture", type=Path, help="picture (default: OUT/ranking.png)")
    parser.add_argument("--worst", type=int, default=10, help="scans that shall be found (default: 10)")
    parser.add_argument("--title", default="", help="of the picture, as 'Left atrium, 8 labels'")
    options = parser.parse_args()
    cases, errors, columns = read_columns(options.output, options.labels)
    worst = min(options.worst, len(cases) - 1)
    print(report(errors, columns, worst))
    title = f"{options.title}: " if options.title else ""
    draw(cases, errors, columns["score"], worst, options.picture or options.output / "ranking.png", title)


if __name__ == "__main__":
    main()
