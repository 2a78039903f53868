"""The table of a comparison of trainers: means over cases, a test against the first trainer, three formats."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from nnunet_ssl.commands.evaluate import METRICS, statistics_of

# of evaluation.csv, with the head and the factor for the table
COLUMNS = {
    "Dice": ("Dice (%)", 100),
    "Jaccard": ("Jaccard (%)", 100),
    "HD95_mm": ("HD95 (mm)", 1),
    "ASD_mm": ("ASD (mm)", 1),
}
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "<": r"$<$",
    }
)


class Row(NamedTuple):
    """One trainer of the table.

    Attributes:
        failure: why there are no numbers; empty where there are.
        cases: how many there are.
        statistics: per metric its mean, sd (n - 1) and number of undefined cases, see `statistics_of`.
        p: of the test against the first trainer; None where there is no such test.
        each: mean Dice in [0, 1] of every training, where there are several, None where no case has one.
    """

    trainer: str
    failure: str
    cases: int = 0
    statistics: dict[str, dict[str, float | None]] = {}
    p: float | None = None
    each: Sequence[float | None] = ()


def case_values(files: Sequence[Path]) -> dict[str, dict[str, float]]:
    """METRICS per case: the mean over the labels of each file, then over the files.

    A label that is neither in the reference nor in the prediction does not count (its Dice is NaN), as in nnU-Net.
    Where one of the two is empty there is no distance, and then the case has none.

    Args:
        files: evaluation.csv of every fold, and of every training, of one trainer.
    """
    folds: dict[str, list[np.ndarray]] = {}
    for file in files:
        labels: dict[str, list[list[float]]] = {}
        with file.open(newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                labels.setdefault(row["case"], []).append([float(row[name]) for name in METRICS])
        for case, values in labels.items():
            folds.setdefault(case, []).append(mean_of_counted(values))
    return {
        case: dict(zip(METRICS, mean_of_counted(values).tolist(), strict=True))
        for case, values in sorted(folds.items())
    }


def mean_of_counted(values: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean of the rows of METRICS whose Dice is a number; NaN where there is no such row."""
    values = np.array(values)
    counted = values[~np.isnan(values[:, METRICS.index("Dice")])]
    return counted.mean(0) if len(counted) else np.full(len(METRICS), np.nan)


def wilcoxon(cases: dict[str, dict[str, float]], reference: dict[str, dict[str, float]]) -> float | None:
    """Two-sided p value of the signed-rank test of the paired Dice; None below two cases that differ."""
    pairs = np.array([(cases[c]["Dice"], reference[c]["Dice"]) for c in sorted(cases.keys() & reference.keys())])
    pairs = pairs.reshape(-1, 2)
    pairs = pairs[~np.isnan(pairs).any(1)]
    if np.count_nonzero(pairs[:, 0] != pairs[:, 1]) < 2:
        return None
    return float(stats.wilcoxon(pairs[:, 0], pairs[:, 1]).pvalue)


def make_rows(
    values: dict[str, dict[str, dict[str, float]]],
    failures: dict[str, str],
    each: dict[str, list[dict[str, dict[str, float]]]] | None = None,
) -> list[Row]:
    """The rows, in the order of `values`.

    Args:
        values: per trainer its `case_values`; the first one is what the others are tested against.
        failures: reason per trainer that has no values; every one of them is in `values` as well, with an empty dict.
        each: per trainer the `case_values` of its trainings, where there are several.
    """
    first = next(iter(values))
    return [
        Row(trainer, failures[trainer])
        if trainer in failures
        else Row(
            trainer,
            "",
            len(cases),
            statistics_of(list(cases.values())),
            None if trainer == first else wilcoxon(cases, values[first]),
            [statistics_of(list(own.values()))["Dice"]["mean"] for own in (each or {}).get(trainer, [])],
        )
        for trainer, cases in values.items()
    ]


def cells(row: Row) -> list[str]:
    """What the table shows of a row that has not failed, as plain text; the last one where there are trainings."""
    figures = [figure(row.statistics[name], factor) for name, (_, factor) in COLUMNS.items()]
    undefined = str(row.statistics["HD95_mm"]["undefined"])
    p = "" if row.p is None else "< 0.0001" if row.p < 0.0001 else f"{row.p:.4f}"
    each = ["" if dice is None else f"{100 * dice:.2f}" for dice in row.each]
    return [row.trainer, *figures, str(row.cases), undefined, p, *([", ".join(each)] if each else [])]


def figure(statistics: dict[str, float | None], factor: float) -> str:
    """Mean and standard deviation; empty where no case has a value."""
    if statistics["mean"] is None:
        return ""
    return f"{factor * statistics['mean']:.2f} ± {factor * statistics['sd']:.2f}"


def heads(rows: Sequence[Row]) -> list[str]:
    """The heads of the columns, as plain text; the last one where there are several trainings."""
    several = any(row.each for row in rows)
    each = ["Dice of each training (%)"] if several else []
    return ["trainer", *(head for head, _ in COLUMNS.values()), "cases", "no distance", "p", *each]


def markdown(rows: Sequence[Row], caption: str) -> str:
    """Table for the console and for README files; a failed row has its reason in place of the numbers."""
    width = len(heads(rows))
    lines = [f"| {' | '.join(heads(rows))} |", "|---" * width + "|"]
    for row in rows:
        # a vertical bar would end the cell
        failed = [row.trainer, "failed: " + row.failure.replace("|", "\\|"), *[""] * (width - 2)]
        lines.append(f"| {' | '.join(failed if row.failure else cells(row))} |")
    return "\n".join([*lines, "", caption, ""])


def latex(rows: Sequence[Row], caption: str) -> str:
    """Table for a paper, with booktabs."""
    width = len(heads(rows))
    lines = [" & ".join(head.translate(LATEX) for head in heads(rows)) + r" \\", r"\midrule"]
    for row in rows:
        if row.failure:
            failed = rf"\multicolumn{{{width - 1}}}{{l}}{{failed: {row.failure.translate(LATEX)}}}"
            lines.append(rf"{row.trainer.translate(LATEX)} & {failed} \\")
        else:
            lines.append(" & ".join(cell.translate(LATEX) for cell in cells(row)) + r" \\")
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption.translate(LATEX)}}}",
            rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(rows: Sequence[Row]) -> str:
    """The numbers with all digits, in the units of the table; empty cells where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [name.replace("Dice", "Dice_percent").replace("Jaccard", "Jaccard_percent") for name in COLUMNS]
    columns = [f"{name}_{what}" for name in names for what in ("mean", "sd")]
    trainings = [f"Dice_percent_training_{i + 1}" for i in range(max((len(row.each) for row in rows), default=0))]
    writer.writerow(["trainer", *columns, "cases", "no_distance", "wilcoxon_p", "failure", *trainings])
    for row in rows:
        if row.failure:
            writer.writerow([row.trainer, *[""] * (len(columns) + 3), row.failure, *[""] * len(trainings)])
            continue
        found = [(row.statistics[name][w], factor) for name, (_, factor) in COLUMNS.items() for w in ("mean", "sd")]
        numbers = ["" if value is None else repr(factor * value) for value, factor in found]
        undefined = row.statistics["HD95_mm"]["undefined"]
        each = ["" if dice is None else repr(100 * dice) for dice in row.each]
        writer.writerow([row.trainer, *numbers, row.cases, undefined, "" if row.p is None else repr(row.p), "", *each])
    return stream.getvalue()
