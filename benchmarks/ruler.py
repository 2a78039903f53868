"""How much of the gap that missing labels leave a method closes: a table per task of methods.py, and a picture of all.

    python benchmarks/ruler.py [--on development]

*Gap closed* is (method - supervised) / (reference - supervised), of the means over the seeds: `supervised` takes as
many steps as the method, on the labeled scans alone; the reference is `supervised` with all labels. The interval holds
95 % of the bootstrap samples, in each of which patients and seeds are drawn anew; the method and `supervised` are
compared on the same patients and seeds. The columns *largest component* are the same after nnU-Net's postprocessing
that keeps the largest component of the foreground, in all rows. With one seed only the patients are drawn. Seeds are
few: the interval is too narrow rather than too wide. The test against self-training is Wilcoxon's signed-rank test of
the patients' means over the seeds that both have, from two such seeds on: it knows of other patients, not of other
trainings. Two frames of one patient's heart are not independent, so ACDC's are averaged first.

Rows with a longer second phase (`num_epochs=N`) are compared with `supervised`, self-training and a reference of that
length, in a table of their own, as soon as `supervised` is measured at that length; before, with nothing. A row that
is trained alone is in the table whose two phases have as many epochs as it has, as `one training`.

Where a method has other seeds than `supervised` or self-training, the comparison is of the seeds that both have, the
column Dice of all. Other rows that are trained alone have another number of steps than `supervised`. The reference of
LA has learnt from all 60 scans, the methods saw 52 images: the other 8 are for development. A class that is not found
has no distance: how many cases lack one is said. An ensemble is compared with self-training's ensemble of the same
seeds; it closes no gap here, because there is no ensemble with all labels.
"""

import argparse
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from tasks import (
    METRICS,
    RESULTS,
    RUN,
    SECONDS,
    SELF_TRAINING,
    STEPS_PER_EPOCH,
    SUPERVISED,
    TASKS,
    mean_of_present,
    read_rows,
    table_file,
)

from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.files import replacing

REFERENCE = {"LA-8": "LA-60", "LA-4": "LA-60", "ACDC-7": "ACDC-60", "ACDC-3": "ACDC-60"}
PICTURE = Path(__file__).parents[1] / "docs" / "ruler.png"
PATIENTS_PICTURE = PICTURE.with_name("ruler_patients.png")
ONE_TRAINING = ", one training"  # of as many steps as both phases of the other rows
RECOMMENDED = f"nnUNetTrainerM3HL{ONE_TRAINING}"
RESAMPLES = 5000
PANELS = 4  # side by side
# the last: what M3HL was before
ONLY_IN_TABLES = r", alone\b|, ensemble of | \+ |M3HL.*, (rampup=0\.0|supervised_part)\b"
LONGER = rf"{SUPERVISED}, num_epochs=\d+"


class Scores:
    """What one row of a task reached: the METRICS per seed and patient, and the cost of the path."""

    def __init__(self, rows: list[list[str]]):
        values, seconds = {}, {}
        for row in rows:
            seed, case = int(row[1]), row[len(RUN) + len(SECONDS)]
            # both frames of a patient
            values.setdefault((seed, case.split("_frame")[0]), []).append([float(v) for v in row[-len(METRICS) :]])
            seconds[seed] = [float(v) for v in row[len(RUN) : len(RUN) + len(SECONDS)]]
        self.seeds = sorted(seconds)
        self.patients = sorted({patient for _, patient in values})
        # (seeds, patients, metrics); what was not found has no distance
        self.metrics = np.array(
            [[[*map(mean_of_present, zip(*values[s, p], strict=True))] for p in self.patients] for s in self.seeds]
        )
        # in first phases of the same day: a machine is not as fast on every day
        self.cost = np.mean([(first + second) / unit for first, second, unit in seconds.values()])

    def dice(self, seeds: list[int], metric: str = "dice") -> np.ndarray:
        """(seeds, patients), in percent."""
        return self.metrics[[self.seeds.index(seed) for seed in seeds], :, METRICS.index(metric)]


def read(task: str, on: str) -> dict[str, Scores]:
    rows = read_rows(task, on)
    return {name: Scores([row for row in rows if row[0] == name]) for name in dict.fromkeys(row[0] for row in rows)}


def by_length(task: str, on: str) -> dict[str, dict[str, Scores]]:
    """A task's rows apart by the length of their second phase, where `supervised` was measured at that length too.

    Returns: "" to those of the task's own length and the rest, "num_epochs=N" to rows whose names do not repeat that.
        Rows of as many epochs as both phases, trained alone, are beside them as `one training`.
    """
    rows = read(task, on)
    lengths = ["", *(name.removeprefix(f"{SUPERVISED}, ") for name in rows if re.fullmatch(LONGER, name))]
    found = {length: {} for length in lengths}
    for name, scores in rows.items():
        parts, of = name.split(", "), ""
        for length in lengths:
            both = f"num_epochs={epochs(task) + epochs(task, length)}"
            if "alone" in parts and both in parts:
                parts, of = ["one training" if part == "alone" else part for part in parts if part != both], length
            elif "alone" not in parts and length in parts:
                parts, of = [part for part in parts if part != length], length
        found[of][", ".join(parts)] = scores
    return found


def epochs(task: str, length: str = "") -> int:
    """Epochs of a second phase: the task's own, or of a `length` in by_length."""
    return int(length.removeprefix("num_epochs=") or TASKS[task].steps // STEPS_PER_EPOCH)


def partner(rows: dict[str, Scores], name: str, of: str) -> Scores | None:
    """Supervised training or self-training, `of`, that a row is compared with: of an ensemble their ensemble."""
    return rows.get(", ".join([of, *(part for part in name.split(", ") if part.startswith("ensemble of "))]))


def all_labels(task: str, on: str, length: str) -> Scores | None:
    return by_length(REFERENCE[task], on).get(length, {}).get(SUPERVISED)


def gap_closed(method: np.ndarray, supervised: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """The part of the gap that a method closes, and its 95 % bootstrap interval.

    Args:
        method: Dice, (seeds, patients).
        supervised: the same seeds and patients.
        reference: the same patients, any number of seeds.
    """

    def closed(patients, seeds, reference_seeds):
        lower, upper = supervised[np.ix_(seeds, patients)].mean(), reference[np.ix_(reference_seeds, patients)].mean()
        return (method[np.ix_(seeds, patients)].mean() - lower) / (upper - lower)

    drawn = [np.arange(n) for n in (method.shape[1], len(method), len(reference))]
    several = [len(indices) > 1 for indices in drawn]  # scipy draws from two or more

    def statistic(*samples):
        samples = iter(samples)
        return closed(*(next(samples) if s else indices for s, indices in zip(several, drawn, strict=True)))

    interval = stats.bootstrap(
        [indices for s, indices in zip(several, drawn, strict=True) if s],
        statistic,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=0,
    ).confidence_interval
    return closed(*drawn), interval.low, interval.high


def against(method: Scores, other: Scores) -> tuple[float, int, float]:
    """Difference of the means over the seeds that both have, on how many patients it is positive, and Wilcoxon's p.

    NaN and 0 where they share no seed; no p (NaN) where they share one.
    """
    seeds = [seed for seed in method.seeds if seed in other.seeds]
    if not seeds:
        return np.nan, 0, np.nan
    difference = (method.dice(seeds) - other.dice(seeds)).mean(0)
    p = stats.wilcoxon(difference).pvalue if len(seeds) > 1 else np.nan
    return difference.mean(), int((difference > 0).sum()), p


def pooled(tasks: dict[str, dict[str, Scores]], name: str) -> tuple[float, int, float]:
    """A row against self-training over all tasks that have both.

    A patient who is in several tasks counts once, with the mean of the differences.

    Returns: the mean of the patients' differences, their number, and the p of Wilcoxon's test over them.
    """
    of_patients = {}
    for task, rows in tasks.items():
        method, compared = rows.get(name), partner(rows, name, SELF_TRAINING)
        if not method or not compared:
            continue
        seeds = [seed for seed in method.seeds if seed in compared.seeds]
        if not seeds:
            continue
        difference = (method.dice(seeds) - compared.dice(seeds)).mean(0)
        for patient, value in zip(method.patients, difference, strict=True):
            of_patients.setdefault((TASKS[task].dataset, patient), []).append(value)
    differences = [np.mean(values) for values in of_patients.values()]
    if not differences:
        return np.nan, 0, np.nan
    return np.mean(differences), len(differences), stats.wilcoxon(differences).pvalue


def closed_by(scores: Scores, supervised: Scores, reference: Scores, metric: str) -> str:
    """The part of the gap in percent with its interval; nothing where there is no gap or no common seed."""
    seeds = [seed for seed in scores.seeds if seed in supervised.seeds]
    upper = reference.dice(reference.seeds, metric)
    if not seeds or upper.mean() <= supervised.dice(seeds, metric).mean():
        return ""
    part, low, high = gap_closed(scores.dice(seeds, metric), supervised.dice(seeds, metric), upper)
    return f"{100 * part:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def table(task: str, on: str, length: str = "") -> str:
    rows, unit = by_length(task, on)[length], TASKS[task].unit
    reference = all_labels(task, on, length)
    any_row = next(iter(rows.values()))
    lines = [
        f"{task}{length and f', {length}'}, {len(any_row.patients)} {on} patients. Dice in percent; HD95 and ASD in "
        f"{unit}; cost in supervised trainings of {TASKS[task].steps:,} steps. `benchmarks/ruler.py` says what the "
        f"columns are.",
        "",
        "| second phase | cost | Dice | of each seed | HD95 | ASD | gap closed (95 %) | against self-training "
        "| largest component: Dice | gap closed (95 %) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = sorted(rows.items(), key=lambda row: row[1].metrics[..., 0].mean())
    for name, scores in [*shown, *([("all labels", reference)] if reference else [])]:
        means = np.nanmean(scores.metrics, axis=(0, 1))
        seed_means = scores.dice(scores.seeds).mean(1)
        each = ", ".join(f"{mean:.2f} ({seed})" for seed, mean in zip(scores.seeds, seed_means, strict=True))
        closed, compared = {"dice": "", "dice_largest": ""}, ""
        supervised, self_training = partner(rows, name, SUPERVISED), partner(rows, name, SELF_TRAINING)
        same_length = "num_epochs=" not in name and name != "all labels"
        single = "ensemble of" not in name
        if supervised and reference and single and scores is not supervised and same_length:
            closed = {metric: closed_by(scores, supervised, reference, metric) for metric in closed}
        if self_training and scores is not self_training and same_length:
            difference, better, p = against(scores, self_training)
            if not np.isnan(difference):
                compared = f"{difference:+.2f}, better on {better}" + (f", p = {p:.3f}" if p >= 0 else "")
        figures = " | ".join(f"{value:.2f}" for value in means[1:3])
        missing = int(np.isnan(scores.metrics[..., 1]).sum())
        figures += f" ({missing} patients without)" if missing else ""
        lines.append(
            f"| {name} | {scores.cost:.2f} | {seed_means.mean():.2f} | {each} | {figures} | {closed['dice']} "
            f"| {compared} | {means[3]:.2f} | {closed['dice_largest']} |"
        )
    return "\n".join(lines) + "\n"


def draw(tasks: list[str], on: str, file: Path) -> None:
    """A panel per task and length: a point per row and seed, between the supervised line and that of all labels.

    Rows that are trained alone, with half of the steps, and ensembles are in the tables only.
    """
    results = {}
    for task in tasks:
        for length, rows in by_length(task, on).items():
            results[task, length] = {name: row for name, row in rows.items() if not re.search(ONLY_IN_TABLES, name)}
    shown = [name for rows in results.values() for name in rows]
    names = [name for name in dict.fromkeys((SUPERVISED, SELF_TRAINING, RECOMMENDED, *shown)) if name in shown]
    lines = -(-len(results) // PANELS)
    size = (3.2 * PANELS, 0.8 + lines * (1.2 + 0.38 * len(names)))
    figure, axes = plt.subplots(lines, PANELS, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, ((task, length), rows) in zip(axes.flat, results.items(), strict=False):
        reference = all_labels(task, on, length)
        for line, label, colour in ((rows.get(SUPERVISED), "supervised", "0.4"), (reference, "all labels", COLOURS[2])):
            if line is not None:
                axis.axvline(line.metrics[..., 0].mean(), color=colour, zorder=0, label=label)
        for name, scores in rows.items():
            dice, height = scores.metrics[..., 0].mean(1), [names.index(name)] * len(scores.seeds)
            axis.plot(dice, height, "o", color=COLOURS[0], alpha=0.6, markersize=6, markeredgewidth=0)
            axis.plot(dice.mean(), height[0], "|", color="black", markersize=16, markeredgewidth=2)
        labeled = task.split("-")[1]
        people = "patients" if task.startswith("ACDC") else "scans"
        steps = f"{(epochs(task) + epochs(task, length)) * STEPS_PER_EPOCH:,} steps"
        axis.set_title(f"{task}: {labeled} labeled {people}\n{steps}", fontsize=10)
        axis.set_xlabel(f"Dice, {on} scans (%)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(len(names) - 0.5, -0.7)
        axis.tick_params(labelsize=9)
    said = [f"{name}, from supervised weights" if name + ONE_TRAINING in names else name for name in names]
    short = [name.removesuffix(ONE_TRAINING).removeprefix("nnUNetTrainer").replace(", ", ",\n", 1) for name in said]
    axes[0][0].set_yticks(range(len(names)), short)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / size[1], 1, 1))
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def draw_patients(tasks: list[str], on: str, file: Path) -> None:
    """A column per patient: where the recommended trainer stands between few labels and all."""
    figure, axes = plt.subplots(len(tasks), 1, figsize=(10, 2.9 * len(tasks)), squeeze=False)
    for axis, task in zip(axes[:, 0], tasks, strict=True):
        rows, reference = by_length(task, on)[""], read(REFERENCE[task], on)[SUPERVISED]
        few, method = rows[SUPERVISED], rows[RECOMMENDED]
        order = np.argsort(few.dice(few.seeds).mean(0))
        places = np.arange(len(order))
        ours = RECOMMENDED.removeprefix("nnUNetTrainer").removesuffix(ONE_TRAINING)
        for scores, metric, label, marker, style in (
            (few, "dice", "supervised, few labels", "o", {"color": "0.5"}),
            (method, "dice", ours, "o", {"color": COLOURS[0]}),
            (method, "dice_largest", f"{ours}, largest component", "^", {"color": "black", "fillstyle": "none"}),
            (reference, "dice", "supervised, all labels", "_", {"color": COLOURS[2], "mew": 2.5}),
        ):
            dice, size = scores.dice(scores.seeds, metric).mean(0)[order], 16 if marker == "_" else 8
            axis.plot(places, dice, marker, markersize=size, label=label, **style)
        axis.set_xticks(places, [few.patients[index][:10] for index in order], rotation=45, ha="right", fontsize=8)
        axis.set_title(f"{task}: {on} patients, from hard to easy", fontsize=11, loc="left")
        axis.set_ylabel("Dice (%)")
        axis.grid(axis="x", color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("development", "test"), default="test")
    args = parser.parse_args()
    tasks = [task for task in REFERENCE if read(task, args.on)]
    for task in tasks:
        text = "\n".join(table(task, args.on, length) for length in by_length(task, args.on))
        with replacing(table_file(task, args.on).with_suffix(".md")) as temporary:
            temporary.write_text(text)
        print(text)
    results = {task: by_length(task, args.on)[""] for task in tasks}
    for name in dict.fromkeys(name for rows in results.values() for name in rows if name != SELF_TRAINING):
        difference, patients, p = pooled(results, name)
        if patients:
            print(f"{name} against self-training, all tasks: {difference:+.2f}, {patients} patients, p = {p:.4f}")
    picture = PICTURE if args.on == "test" else RESULTS / "development.png"
    if tasks:
        draw(tasks, args.on, picture)
    shown = [task for task in tasks if {SUPERVISED, RECOMMENDED} <= results[task].keys()]
    if shown and args.on == "test":
        draw_patients(shown, args.on, PATIENTS_PICTURE)


if __name__ == "__main__":
    main()
