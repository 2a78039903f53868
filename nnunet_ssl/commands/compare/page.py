"""The page of a comparison: its table, its figure and the Dice of every case, in one file of HTML."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from nnunet_ssl.commands.compare.table import Row, cells, heads
from nnunet_ssl.commands.pictures import compare_cases
from nnunet_ssl.commands.report.page import Picture, Table, as_uri, in_both_looks, write_page


def write_comparison(
    output: Path, name: str, rows: Sequence[Row], caption: str, dice: dict[str, dict[str, float]], models: int
) -> None:
    """Writes the page, in one step.

    Args:
        output: of the page.
        name: of the dataset.
        rows: of the table.
        caption: what the numbers are.
        dice: per trainer that has not failed the Dice in [0, 1] of its cases.
        models: of a trainer; the value of a case is the mean over them.
    """
    width = len(heads(rows))
    table = Table(
        heads(rows), [[row.trainer, "failed"] + [""] * (width - 2) if row.failure else cells(row) for row in rows]
    )
    write_page(
        "comparison.html.j2",
        output,
        name=name,
        table_of_means=table,
        caption=caption,
        failures=[(row.trainer, row.failure) for row in rows if row.failure],
        figure=draw_cases(dice, models) if dice else None,
        cases=case_table(dice) if dice else None,
    )


def draw_cases(dice: dict[str, dict[str, float]], models: int) -> Picture:
    """The figure of `compare_cases`."""

    def draw(look: str) -> str:
        with TemporaryDirectory(prefix="nnunet_ssl_compare_") as folder:
            compare_cases(dice, file := Path(folder, "figure.png"), models)
            return as_uri(file.read_bytes(), "png")

    light, dark = in_both_looks(draw)
    medians = {t: np.nanmedian([*cases.values()]) for t, cases in dice.items() if np.isfinite([*cases.values()]).any()}
    alt = "Dice of every test case by trainer. Medians: "
    alt += ", ".join(f"{trainer} {100 * median:.1f} %" for trainer, median in medians.items())
    advice = (
        "Do all cases gain, or a few that were bad? Lines that fall are cases on which a trainer is worse. A point far "
        "below the others is worth a look at its scan."
    )
    return Picture(light, f"{alt}.", advice, dark=dark)


def case_table(dice: dict[str, dict[str, float]]) -> Table:
    """The Dice of every case in percent, that with the lowest mean first."""
    cases = sorted(set().union(*dice.values()))
    values = np.array([[of_trainer.get(case, np.nan) for of_trainer in dice.values()] for case in cases])
    known = np.isfinite(values)
    means = np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1)
    means[~known.any(1)] = np.inf
    rows = [
        [cases[i], *("" if np.isnan(value) else f"{100 * value:.1f}" for value in values[i])]
        for i in np.argsort(means, kind="stable")
    ]
    return Table(("test case", *(f"{trainer} (%)" for trainer in dice)), rows)
