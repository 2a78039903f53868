"""Comparing trainers on the same folds: train, predict the test scans, evaluate; one table and one figure."""

import contextlib
import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from nnunetv2 import paths
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from tqdm import tqdm

from nnunet_ssl.commands.compare.job import PROTOCOL, Job, finished, run_safely, trained
from nnunet_ssl.commands.compare.table import case_values, comma_separated, latex, make_rows, markdown
from nnunet_ssl.data.dataset_json import channel_names, read_dataset_json
from nnunet_ssl.data.preprocessed import load_plans
from nnunet_ssl.data.scans import find_scans
from nnunet_ssl.data.splits import check_fold, labels_learnt, read_fold, require_hidden
from nnunet_ssl.system.cluster import make_executor, run_jobs
from nnunet_ssl.system.device import require_device
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.lock import locked
from nnunet_ssl.system.quiet import quiet
from nnunet_ssl.system.wording import counted
from nnunet_ssl.training.random_state import SEED

TABLE, FIGURE = "comparison", "comparison.png"  # the table's name, without its endings
# a training of nnU-Net's 1000 epochs takes one to two days
SLURM = {"name": "nnunet-ssl", "timeout_min": 2880}


def compare(
    dataset: str,
    configuration: str,
    folds: Sequence[int | str],
    trainers: Sequence[str],
    plans_identifier: str = "nnUNetPlans",
    output: Path | None = None,
    train: bool = False,
    launcher: str = "local",
    slurm: dict[str, str | int] | None = None,
    device: str = "cuda",
    num_processes: int = 3,
    mirroring: bool = True,
    results: Sequence[Path] = (),
) -> tuple[str, dict[str, str]]:
    """Predicts imagesTs with every trainer and fold, evaluates against labelsTs; writes a table, a figure and a page.

    What is finished stays: an interrupted comparison goes on with the job that it was at. A trainer that fails has the
    reason in its row, the others go on.

    Args:
        dataset: id or name.
        configuration: of the models.
        folds: numbers or "all".
        trainers: the others are tested against the first one.
        plans_identifier: of the models.
        output: folder for table, figure, page, predictions and logs; default: a folder in nnUNet_results/DATASET.
            Predictions and logs stay in `results`, where these are given.
        train: train what is not trained yet, and go on with what is half trained.
        launcher: "local", one job after the other, or "slurm", a job of the cluster for every trainer and fold.
        slurm: settings of the cluster's jobs, see `make_executor`.
        device: "cuda", "cpu" or "mps".
        num_processes: for preprocessing, export and evaluation.
        mirroring: average predictions over mirrored images, nnU-Net's default; takes up to 8 times as long.
        results: folders in place of nnUNet_results, each with a training of every trainer, as of several seeds: the
            value of a case is the mean over them.

    Returns:
        The table in Markdown, and per trainer that failed the reason.

    Raises:
        FileNotFoundError: no dataset, test scans or trained model; the message has the fix.
        ValueError: no such configuration, fold, trainer or device, scans and labels that are not of the same cases, or
            several trainings with one seed.
        NotImplementedError: a cascade.
        ImportError: the launcher is "slurm" and submitit is not installed.
        RuntimeError: another comparison writes into the same folder.
    """
    name = str(maybe_convert_to_dataset_name(dataset))
    folds, trainers = list(dict.fromkeys(folds)), list(dict.fromkeys(trainers))  # each once
    results = list(dict.fromkeys(Path(folder).resolve() for folder in results)) or [None]
    usual = [
        Path(folder or paths.nnUNet_results, name, f"comparison_{plans_identifier}_{configuration}").absolute()
        for folder in results
    ]
    output = Path(output or usual[0]).absolute()
    shared = (train, device, max(1, num_processes), mirroring)
    jobs = [
        Job(name, configuration, plans_identifier, trainer, fold, own if folder else output, *shared, folder)
        for trainer in trainers
        for folder, own in zip(results, usual, strict=True)
        for fold in folds
    ]
    check_dataset(name, configuration, plans_identifier, folds)
    check_trainers(trainers)
    executor = None
    if launcher == "slurm":
        gpus = {"gpus_per_node": 1} if device == "cuda" else {}
        executor = make_executor(output / "jobs", SLURM | gpus | (slurm or {}))
    else:
        require_device(device)
    if not train:
        check_trained(jobs)
    elif len(results) > 1 and SEED in os.environ and not all(map(trained, jobs)):
        raise ValueError(
            f"{SEED} is set: all trainings of a trainer of ours would begin with the same weights. Unset it, or train "
            f"for one folder of results after the other."
        )
    check_labels(jobs)
    say_unequal(Path(paths.nnUNet_preprocessed, name, "splits_final.json"), folds)

    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys([output, *(job.output for job in jobs)]):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".compare.lock", f"comparing into {folder}"))
        return report(jobs, run_unfinished(jobs, executor), output)


def check_dataset(name: str, configuration: str, plans_identifier: str, folds: Sequence[int | str]) -> None:
    """Raises where the dataset, its plans, one of the folds or the test scans with their labels are missing."""
    raw, preprocessed = Path(paths.nnUNet_raw, name), Path(paths.nnUNet_preprocessed, name)
    if not (raw / "dataset.json").is_file():
        raise FileNotFoundError(f"{raw / 'dataset.json'} is missing. Give the id or name of a dataset in nnUNet_raw.")
    plans = load_plans(preprocessed, plans_identifier, [configuration])
    if plans.get_configuration(configuration).previous_stage_name is not None:
        raise NotImplementedError(f"{configuration} is a cascade. Compare 2d, 3d_lowres or 3d_fullres.")
    splits = preprocessed / "splits_final.json"
    for fold in [fold for fold in folds if fold != "all"]:
        check_fold(splits, fold)

    description = read_dataset_json(raw / "dataset.json", "channel_names", "labels", "file_ending")
    ending = description["file_ending"]
    scans, labeled = (find_scans(raw / folder, ending)[0] for folder in ("imagesTs", "imagesTr"))
    # colors are channels in one file
    number = len(next(iter(labeled.values()), channel_names(description)))
    labels = {file.name.removesuffix(ending) for file in (raw / "labelsTs").glob(f"*{ending}")}
    for folder, found in ((raw / "imagesTs", scans), (raw / "labelsTs", labels)):
        if not found:
            raise FileNotFoundError(f"{folder} has no file *{ending}. Put the test scans, or their labels, there.")
    problems = [f"{case}: no label in {raw / 'labelsTs'}" for case in sorted(scans.keys() - labels)]
    problems += [f"{case}: no scan in {raw / 'imagesTs'}" for case in sorted(labels - scans.keys())]
    counts = {case: len(files) for case, files in scans.items()}
    problems += [f"{case}: {counted(count, 'file')}, not {number}" for case, count in counts.items() if count != number]
    if problems:
        raise ValueError("Test scans and their labels have to be of the same cases:\n  " + "\n  ".join(problems))


def check_trainers(trainers: Sequence[str]) -> None:
    """Raises where nnU-Net's own finder does not find a trainer."""
    missing = []
    for trainer in trainers:
        try:
            with quiet():  # the finder names every file that it opens
                recursive_find_trainer_class_by_name(trainer)
        except Exception as error:  # the finder imports every trainer that it passes: anything can come out of one
            missing.append(f"{trainer}: {type(error).__name__}: {textwrap.shorten(str(error), 120)}")
    if missing:
        raise ValueError(
            "nnU-Net does not find every trainer. Correct -tr, or see: nnunet-ssl doctor\n  " + "\n  ".join(missing)
        )


def check_trained(jobs: Sequence[Job]) -> None:
    """Raises where a trained model is missing, with the command that trains it."""
    missing = [job for job in jobs if not trained(job)]
    if missing:
        commands = (
            ("" if job.results is None else f"nnUNet_results={shlex.quote(str(job.results))} ")
            + shlex.join([*job.training(), "-device", job.device])
            for job in missing
        )
        raise FileNotFoundError(
            f"Not trained: {len(missing)} of {counted(len(jobs), 'model')}. Add --train, or train them first:\n  "
            + "\n  ".join(commands)
        )


def check_labels(jobs: Sequence[Job]) -> None:
    """Raises ValueError where a model, finished or not, has learnt labels that its fold hides, or more than others.

    Their logs tell how many labels they have learnt.
    """
    learnt = {}
    for job in jobs:
        splits = Path(paths.nnUNet_preprocessed, job.dataset, "splits_final.json")
        require_hidden(splits, job.fold, job.model / "checkpoint_final.pth")
        if (number := labels_learnt(job.model)) is None:
            continue
        first, other = learnt.setdefault(job.fold, (job.model, number))
        if number != other:
            raise ValueError(
                f"{job.model} was trained with {counted(number, 'labeled case')}, {first} with {other}: the split has "
                f"changed between them. Move the older one away, and train it again."
            )


def say_unequal(splits: Path, folds: Sequence[int | str]) -> None:
    """Warns where folds have different numbers of labels, as `nnunet-ssl split --labeled 8 16` makes them."""
    if splits.is_file():
        labels = [len(read_fold(splits, fold)["train"]) for fold in folds if fold != "all"]
        if labels and max(labels) - min(labels) > 1:  # those of a cross-validation differ by one case
            print(
                f"WARNING: the folds have {min(labels)} to {max(labels)} labeled cases, and the table has the mean of "
                f"all folds. Compare them one by one, each with its own -o."
            )


def run_unfinished(jobs: Sequence[Job], executor) -> dict[str, str]:
    """Runs the jobs that are not finished, here or by the cluster's `executor`; why jobs failed, by their names."""
    for folder in {folder for job in jobs for folder in (job.log.parent, job.predictions.parent)}:
        folder.mkdir(exist_ok=True)
    todo = [job for job in jobs if not finished(job, job.predictions)]
    logs = ", ".join(dict.fromkeys(str(job.log.parent) for job in jobs))
    print(f"Finished before: {len(jobs) - len(todo)} of {counted(len(jobs), 'job')}. Logs: {logs}")
    by_name = {job.name: job for job in todo}
    failures = run_here(todo) if executor is None else run_jobs(executor, run_safely, by_name)
    # what another computer has written may not be seen here; or the model was trained anew meanwhile
    lost = [job for job in todo if job.name not in failures and not finished(job, job.predictions)]
    return failures | {
        job.name: f"{job.predictions} is missing or old, run the command again; log: {job.log}" for job in lost
    }


def run_here(jobs: Sequence[Job]) -> dict[str, str]:
    """Runs one job after the other behind a progress bar; why jobs failed, by their names."""
    failures, shown = {}, set()
    with tqdm(jobs, unit="job", disable=None) as bar:  # None: no bar in files and pipes
        for job in bar:
            reason = run_safely(job, lambda step, job=job: show(bar, job, step, shown))
            bar.write(f"{job.name}: {'finished' if reason is None else f'failed: {reason}'}")
            if reason is not None:
                failures[job.name] = reason
    return failures


def show(bar: tqdm, job: Job, step: str, shown: set[str]) -> None:
    """Shows how far a job is: in the bar or, where there is none, in a line for every step that begins.

    Args:
        bar: of all jobs; disabled where the output goes into a file.
        job: the present one.
        step: its step and, in brackets, how far that is.
        shown: the steps that have a line; the present one is added.
    """
    text = f"{job.trainer}, {place(job)}: {step}"
    name = text.partition(" (")[0]
    if bar.disable and name not in shown:
        print(name, flush=True)
    shown.add(name)
    bar.set_description(text)


def place(job: Job) -> str:
    """Which training of its trainer a job is of."""
    return f"fold {job.fold}" if job.results is None else f"fold {job.fold} in {job.results}"


def report(jobs: Sequence[Job], failures: dict[str, str], output: Path) -> tuple[str, dict[str, str]]:
    """Writes table, figure and page; what `compare` returns.

    Args:
        failures: reasons by the names of the jobs.
        output: folder of the three.
    """
    by_trainer: dict[str, list[Job]] = {}
    for job in jobs:
        by_trainer.setdefault(job.trainer, []).append(job)
    failed = {
        trainer: "; ".join(f"{place(job)}: {failures[job.name]}" for job in own if job.name in failures)
        for trainer, own in by_trainer.items()
    }
    failed = {trainer: reason for trainer, reason in failed.items() if reason}
    values = {trainer: {} if trainer in failed else cases_of(own) for trainer, own in by_trainer.items()}
    folders = list(dict.fromkeys(job.results for job in jobs))
    each = {
        trainer: [cases_of([job for job in own if job.results == folder]) for folder in folders]
        for trainer, own in by_trainer.items()
        if trainer not in failed and len(folders) > 1
    }
    rows, text, models = make_rows(values, failed, each), caption(jobs), len(jobs) // len(by_trainer)
    contents = {".md": markdown(rows, text), ".csv": comma_separated(rows), ".tex": latex(rows, text)}
    for ending, content in contents.items():
        with replacing(output / f"{TABLE}{ending}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    dice = {t: {case: metrics["Dice"] for case, metrics in cases.items()} for t, cases in values.items() if cases}
    (output / FIGURE).unlink(missing_ok=True)  # it would be of other numbers than the table
    if dice:
        from nnunet_ssl.commands.pictures import compare_cases  # imports matplotlib

        compare_cases(dice, output / FIGURE, models)
    from nnunet_ssl.commands.compare.page import write_comparison  # imports matplotlib

    write_comparison(output / f"{TABLE}.html", jobs[0].dataset, rows, text, dice, models)
    return contents[".md"], failed


def cases_of(jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    """What `case_values` gives for these jobs."""
    return case_values([job.predictions / "evaluation.csv" for job in jobs])


def caption(jobs: Sequence[Job]) -> str:
    """What the numbers are."""
    job, folds = jobs[0], list(dict.fromkeys(str(job.fold) for job in jobs))
    mirrored = "with" if job.mirroring else "without"
    number = len({job.results for job in jobs})
    means, differ = "the folds", " It does not tell how much two trainings of the same trainer differ."
    if number > 1:
        means, differ = f"the folds and {number} trainings", ""
    return (
        f"{job.dataset}, {job.configuration}, {job.plans}, fold {', '.join(folds)}; final checkpoint, {mirrored} "
        f"mirroring at prediction. Mean ± standard deviation over the test cases. The value of a case is its mean over "
        f"the labels and then over {means}. All voxels of a prediction count (protocol {PROTOCOL} of nnunet-ssl "
        f"evaluate). HD95 is the 95 % Hausdorff distance, ASD the average surface distance from prediction to "
        f"reference, both in mm. 'No distance' counts the cases in which one of the two masks is empty; they are left "
        f"out of HD95 and ASD. p is from a two-sided Wilcoxon signed-rank test of the Dice against {job.trainer}, "
        f"paired by case and not corrected for the number of comparisons.{differ}"
    )
