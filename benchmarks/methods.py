"""Benchmark of methods on two real datasets: trains, predicts, and adds Dice and distances of every case to a table.

    nnunet-ssl convert la -i LA -d 501 --train-list la_train.list --test-list la_test.list
    nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -overwrite_target_spacing 2.5 2.5 2.5
    nnunet-ssl convert acdc -i ACDC -d 503 --test-list acdc_val.list
    nnUNetv2_plan_and_preprocess -d 503 -c 2d

    python benchmarks/methods.py run ACDC-3 supervised self-training nnUNetTrainerM3HL --seeds 0 1 2
    python benchmarks/methods.py run ACDC-3 nnUNetTrainerM3HL --set unmixed=0.4 --on development
    python benchmarks/methods.py run ACDC-3 nnUNetTrainerM3HL --alone       # one phase, from random weights
    python benchmarks/methods.py run ACDC-3 self-training --alone           # its student from random weights
    python benchmarks/methods.py run ACDC-3 nnUNetTrainerM3HL --seeds 0 1 2 --ensemble
    python benchmarks/methods.py run LA-4 self-training --labelers 0 1 2 --ignore-uncertain
    python benchmarks/methods.py queue benchmarks/queue.txt                 # lines like those above; one call per core
    python benchmarks/ruler.py                                              # the tables and the picture

The lists have a case on every line. Left atrium: the first 60 and the last 20 of TRAIN_CASES in
dataset_conversion/la.py; ACDC: patientNNN_frame01 and patientNNN_frame02 of VAL_PATIENTS in dataset_conversion/acdc.py.
So the test scans are not those of the published lists.

A path has two phases of the same number of steps, each with nnU-Net's own learning-rate decay. The first one is
`nnUNetTrainer` on the labeled scans and shared: every second phase of a task and seed starts from its weights,
segmentation heads included. The second phase of `supervised` is the same trainer again, that of `self-training` is the
same trainer on the labels that the first phase predicts for the unlabeled scans (with --alone too, where its own
weights are random), that of any other row is the trainer of that name. So all rows take the same number of steps on the
same plans. The final checkpoint of the second phase is used, its deployed network, nothing is selected; mirroring at
prediction is off, to save time.

Settings are chosen on the development scans, whose labels no model of the task saw; figures are reported on the test
scans. Those of LA-4 and LA-8 are in part unlabeled scans of the training. All unlabeled scans (`--on unlabeled`) show
what their pseudo labels are worth (pseudo_labels.py). In LA-60 and ACDC-60 all labels of the training scans are known:
`supervised` there is the reference of the tasks with few. Everything is kept in nnUNet_results/TASK/seed_N: what is
done is not done again, a training that was interrupted goes on from its last epoch, and several calls share the work
without doing it twice. On a processor that computes in bfloat16, `--bf16` takes a quarter to a third of the time; the
rows of a table should all have it, or none.
"""

import argparse
import csv
import fcntl
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_compile", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import SimpleITK as sitk
import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from phases import SECONDS_FILE, add_seconds, cpu_seconds, phase
from tasks import (
    METRICS,
    RESULTS,
    RUN,
    SECONDS,
    SELF_TRAINING,
    SUPERVISED,
    TASKS,
    Task,
    mean_of_present,
    read_rows,
    table_file,
)

from nnunet_ssl.cli import main as nnunet_ssl_command
from nnunet_ssl.commands.demo import small_configuration
from nnunet_ssl.commands.evaluate import case_metrics
from nnunet_ssl.data.preprocessed import PREDICTED_FOREGROUND
from nnunet_ssl.system.files import replacing

FIRST_PHASE = "first_phase"  # folder of the supervised training that every row starts from
LABELING_SECONDS = "labeling_seconds.json"  # processor time, in the folder of the labels
STOCK = "nnUNetTrainer"


@dataclass(frozen=True)
class Run:
    task: str
    method: str  # supervised, self-training or a trainer
    seed: int
    settings: tuple[str, ...] = ()  # NAME=VALUE
    alone: bool = False
    predicted_foreground: bool = False
    labelers: tuple[int, ...] = ()  # seeds whose first phases label together; none: the run's own
    ignore_uncertain: bool = False
    drop_worst: int = 0
    networks: tuple[str, ...] = ()  # of the checkpoint, which predict together; none: the deployed one
    ensemble: tuple[int, ...] = ()  # seeds whose models predict together; none: the run's own
    device: str = "cpu"
    bf16: bool = False

    @property
    def row(self) -> str:
        how = [
            *["predicted foreground"] * self.predicted_foreground,
            *[f"labels of {listed(self.labelers)}"] * bool(self.labelers),
            *["uncertain ignored"] * self.ignore_uncertain,
            *[f"without the worst {self.drop_worst}"] * bool(self.drop_worst),
            *["alone"] * self.alone,
            *[" + ".join(self.networks)] * bool(self.networks),
            *[f"ensemble of {listed(self.ensemble)}"] * bool(self.ensemble),
        ]
        return ", ".join([self.method, *self.settings, *how])

    @property
    def folder(self) -> Path:
        # a supervised training alone is the first phase of the others
        name = FIRST_PHASE if self.row == f"{SUPERVISED}, alone" else self.row.replace(", ", "_")
        return Path(nnUNet_results) / self.task / f"seed_{self.seed}" / name

    @property
    def trainer(self) -> str:
        return STOCK if self.method in (FIRST_PHASE, SUPERVISED, SELF_TRAINING) else self.method

    @property
    def members(self) -> list["Run"]:
        """The trainings whose models predict."""
        return [replace(self, seed=seed, networks=(), ensemble=()) for seed in self.ensemble or (self.seed,)]

    def first_phases(self) -> list["Run"]:
        """The run's own first, then those of the other labelers."""
        seeds = dict.fromkeys((self.seed, *self.labelers))
        return [Run(self.task, FIRST_PHASE, seed, device=self.device, bf16=self.bf16) for seed in seeds]


def listed(seeds: Sequence[int]) -> str:
    return f"seeds {' '.join(map(str, seeds))}"


@contextmanager
def locked(file: Path, wait: bool = False) -> Iterator[None]:
    """Holds a file's lock; raises BlockingIOError where another process has it, unless told to wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as f:
        os.set_inheritable(f.fileno(), True)  # a training that outlives this process keeps the lock
        fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def add_configuration(dataset: str, task: Task) -> str:
    """Adds the task's small network to the dataset's plans; returns the configuration's name."""
    path = Path(nnUNet_preprocessed) / dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configuration = small_configuration(plans, task.patch, task.features, task.batch_size, base=task.base)
    name = f"{task.base}_quick"
    if plans["configurations"].get(name) != configuration:
        plans["configurations"][name] = configuration
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(plans, indent=4))
    return name


def measured(run: Run, on: str) -> bool:
    return any(row[: len(RUN)] == [run.row, str(run.seed)] for row in read_rows(run.task, on))


def measure(run: Run, on: str) -> None:
    """Does what is missing of a run: first phase, labels, second phase, prediction; adds its cases to the table.

    Raises: BlockingIOError where another process is at work on a part of it.
    """
    dataset = str(maybe_convert_to_dataset_name(TASKS[run.task].dataset))
    scans(run, dataset, on)  # says what cannot be measured before anything is trained
    with ExitStack() as locks:
        for member in run.members:
            locks.enter_context(locked(member.folder / "lock"))
        models, seconds = zip(*(trained(member, dataset) for member in run.members), strict=True)
        metrics = predict(run, dataset, models, on)
        firsts, seconds, units = zip(*seconds, strict=True)
        record(run, on, [sum(firsts), sum(seconds), statistics.mean(units)], metrics)
    dice = statistics.mean(values[0] for values in metrics.values())
    print(f"{run.task}, {run.row}, seed {run.seed}, {on} scans: Dice {dice:.2f}", flush=True)


def trained(run: Run, dataset: str) -> tuple[Path, list[float]]:
    """The final checkpoint of a run, trained if it is missing, and its SECONDS."""
    seconds, start, trained_on, firsts = [0.0, 0.0], None, dataset, run.first_phases()
    for first in firsts:
        if first.folder != run.folder:  # whose lock this process holds
            with locked(first.folder / "lock"):
                train(first, dataset)
    labels = run.method == SELF_TRAINING or run.predicted_foreground
    if not run.alone:
        start = checkpoint(firsts[0], dataset)
    if labels or not run.alone:
        seconds[0] = sum(cpu_seconds(f.folder / SECONDS_FILE) for f in firsts)
    if labels:
        name, seconds[1] = label_scans(run, dataset)
        trained_on = name if run.method == SELF_TRAINING else dataset
    train(run, trained_on, start)
    seconds[1] += cpu_seconds(run.folder / SECONDS_FILE)
    return checkpoint(run, trained_on), [*seconds, cpu_seconds(firsts[0].folder / SECONDS_FILE)]


def checkpoint(run: Run, dataset: str) -> Path:
    task = TASKS[run.task]
    model = run.folder / dataset / f"{run.trainer}__nnUNetPlans__{task.base}_quick"
    # a dataset with predicted labels has one fold
    return model / f"fold_{0 if run.method == SELF_TRAINING else task.fold}" / "checkpoint_final.pth"


def call(run: Run, command: list[str], **options) -> None:
    """Runs a command with the run's folder as nnUNet_results."""
    # nnU-Net's predictor takes as many threads as there are cores: let them sleep, not spin, while they wait
    environment = {**os.environ, "nnUNet_results": str(run.folder), "OMP_WAIT_POLICY": "PASSIVE"}
    if run.predicted_foreground:
        environment[PREDICTED_FOREGROUND] = str(TASKS[run.task].first_pseudo_dataset + run.seed)
    subprocess.run([str(word) for word in command], check=True, env=environment, close_fds=False, **options)


def train(run: Run, dataset: str, start: Path | None = None) -> None:
    """Trains a phase in a process of its own unless it is done, or goes on with it."""
    add_configuration(dataset, TASKS[run.task])
    if checkpoint(run, dataset).is_file():
        return
    print(f"{run.task}, {run.row}, seed {run.seed}: training", flush=True)
    command = [sys.executable, __file__, "phase", run.task, run.method, "--seed", run.seed, "--device", run.device]
    command += ["--dataset", dataset, "--trainer", run.trainer]
    command += ["--start", start] if start else []
    command += ["--set", *run.settings] if run.settings else []
    command += ["--bf16"] * run.bf16
    with (run.folder / "training.log").open("a") as log:
        call(run, command, stdout=log, stderr=subprocess.STDOUT)


def label_scans(run: Run, dataset: str) -> tuple[str, float]:
    """The unlabeled scans with the labels that first phases predict, preprocessed.

    Returns: the dataset's name, and the processor seconds that it took.
    """
    task, firsts = TASKS[run.task], run.first_phases()
    labelers = [first for first in firsts if not run.labelers or first.seed in run.labelers]
    number, folder = task.first_pseudo_dataset + run.seed, firsts[0].folder
    if run.labelers:
        number = task.first_pseudo_dataset + 3 + run.ignore_uncertain + 2 * bool(run.drop_worst)
        folder = Path(nnUNet_results) / run.task / f"labels_{number}"
    name, done = f"Dataset{number}_{dataset[11:]}PseudoLabels", folder / LABELING_SECONDS
    with locked(folder / "lock"):
        by, of = folder / "labelers.json", [run.labelers, run.ignore_uncertain, run.drop_worst]
        if run.labelers and not by.is_file():
            by.write_text(json.dumps(of))
        known = not run.labelers or by.read_text() == json.dumps(of)
        labeled = folder / "labels_are_written"
        if not known or ((Path(nnUNet_raw) / name).is_dir() and not labeled.is_file()):
            raise RuntimeError(
                f"{Path(nnUNet_raw) / name} has other labels, see {folder}. Remove both, and {name} in "
                f"nnUNet_preprocessed."
            )
        if done.is_file():
            return name, cpu_seconds(done)
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = [sys.executable, __file__, "command"] if run.bf16 else ["nnunet-ssl"]
        label = [*ours, "pseudo-label", "-d", task.dataset, "-c", f"{task.base}_quick", "-f", task.fold, "-o", number]
        label += ["-np", 1, "-device", run.device]
        others = [checkpoint(other, dataset).parents[1] for other in labelers[1:]]
        label += ["--also", *others] if others else []
        label += ["--uncertain", "ignore"] if run.ignore_uncertain else []
        label += ["--drop-worst", run.drop_worst] if run.drop_worst else []
        commands = [] if labeled.is_file() else [label]
        commands.append(["nnUNetv2_extract_fingerprint", "-d", number, "-np", 1])
        commands.append(["nnUNetv2_preprocess", "-d", number, "-c", task.base, "-np", 1])
        print(f"{run.task}, {run.row}, seed {run.seed}: labeling", flush=True)
        with (folder / "labeling.log").open("w") as log:
            for command in commands:
                call(labelers[0], command, stdout=log, stderr=subprocess.STDOUT)
                labeled.touch()
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        add_seconds(done, {"labeling": end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime})
        return name, cpu_seconds(done)


def scans(run: Run, dataset: str, on: str) -> dict[Path, Path]:
    """Image to reference label of the scans on which a model is measured."""
    task, raw = TASKS[run.task], Path(nnUNet_raw) / dataset
    if on == "test":
        labels = sorted((raw / "labelsTs").iterdir())
        return {raw / "imagesTs" / file.name.replace(".nii.gz", "_0000.nii.gz"): file for file in labels}
    split = json.loads((Path(nnUNet_preprocessed) / dataset / "splits_final.json").read_text())[task.fold]
    cases, unlabeled = split["val"], split.get("unlabeled", [])
    cases = unlabeled if on == "unlabeled" else cases + unlabeled[: task.hidden]
    if not cases or set(cases) & set(split["train"]):
        raise SystemExit(f"{run.task} has no {on} scans: it is trained on them.")
    return {raw / "imagesTr" / f"{case}_0000.nii.gz": raw / "labelsTr" / f"{case}.nii.gz" for case in cases}


def predict(run: Run, dataset: str, models: Sequence[Path], on: str) -> dict[str, list[float]]:
    """Predicts the scans with nnUNetv2_predict_from_modelfolder; the METRICS of every case."""
    task, references = TASKS[run.task], scans(run, dataset, on)
    output, source = run.folder / f"predicted_{on}", run.folder / f"images_{on}"
    source.mkdir(exist_ok=True, parents=True)
    for image in references:
        link = source / image.name
        if not link.is_symlink():
            link.symlink_to(image)
    folder, folds = models[0].parents[1], [models[0].parent.name.removeprefix("fold_")]
    if run.networks or run.ensemble:
        folder = run.folder / "model"
        folds = joined(run, dataset, models, folder)
    command = ["nnUNetv2_predict_from_modelfolder", "-m", folder, "-f", *folds, "-npp", 1, "-nps", 1]
    command += ["-device", run.device, "--disable_tta", "--disable_progress_bar", "-i", source, "-o", output]
    call(run, command, stdout=subprocess.DEVNULL)
    values = json.loads((Path(nnUNet_raw) / dataset / "dataset.json").read_text())["labels"].values()
    labels = [value for value in values if value != 0]
    files = references.values()
    return {file.name.split(".")[0]: case_means(output / file.name, file, labels, task.unit) for file in files}


def joined(run: Run, dataset: str, models: Sequence[Path], folder: Path) -> list[str]:
    """Makes a model folder whose folds are all models, with networks each of them; returns the folds."""
    folds = []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for member, model in zip(run.members, models, strict=True):
        if run.networks:
            exported, fold = folder / f"seed_{member.seed}", model.parent.name.removeprefix("fold_")
            command = ["nnunet-ssl", "export", "-d", dataset, "-c", f"{TASKS[run.task].base}_quick", "-f", fold]
            call(member, [*command, "-tr", run.trainer, "--network", *run.networks, "-o", exported])
            folds += sorted(exported.glob("fold_*"))
        else:
            folds.append(model.parent)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(models[0].parents[1] / name, folder)
    for number, fold in enumerate(folds):
        (folder / f"fold_{number}").symlink_to(fold)
    return [str(number) for number in range(len(folds))]


def case_means(prediction: Path, reference: Path, labels: list[int], unit: str) -> list[float]:
    """The METRICS of two label files, means over the classes.

    A class that only the reference has counts as a Dice of 0 and has no distance; one that neither has does not count.
    The last Dice is that of nnU-Net's postprocessing which keeps the largest component of the foreground.
    """
    images = [sitk.ReadImage(str(file)) for file in (prediction, reference)]
    ours, theirs = map(sitk.GetArrayFromImage, images)
    spacing = images[1].GetSpacing()[::-1]
    classes = [case_metrics(ours == label, theirs == label, spacing) for label in labels]
    names = ("Dice", f"HD95_{unit}", f"ASD_{unit}")
    dice, *distances = (mean_of_present([metrics[name] for metrics in classes]) for name in names)
    kept = remove_all_but_largest_component_from_segmentation(ours, labels)
    cleaned = [case_metrics(kept == label, theirs == label, spacing)["Dice"] for label in labels]
    return [100 * dice, *distances, 100 * mean_of_present(cleaned)]


def record(run: Run, on: str, seconds: list[float], metrics: dict[str, list[float]]) -> None:
    """Replaces the run's rows in its task's table of cases."""
    key = [run.row, str(run.seed)]
    with locked(Path(nnUNet_results) / "table.lock", wait=True):
        rows = [row for row in read_rows(run.task, on) if row[: len(RUN)] != key]
        spent = [f"{value:.0f}" for value in seconds]
        rows += [[*key, *spent, case, *(f"{v:.2f}" for v in values)] for case, values in sorted(metrics.items())]
        RESULTS.mkdir(exist_ok=True)
        with replacing(table_file(run.task, on)) as temporary, temporary.open("w", newline="") as f:
            csv.writer(f).writerows([[*RUN, *SECONDS, "case", *METRICS], *rows])


def runs_of(args) -> list[Run]:
    if (args.ignore_uncertain or args.drop_worst) and len(args.labelers) < 2:
        raise SystemExit("One model does not disagree with itself: give --labelers, as 0 1 2.")
    if args.labelers and (args.predicted_foreground or set(args.methods) != {SELF_TRAINING}):
        raise SystemExit("--labelers is for self-training alone.")
    if not {*args.seeds, *args.labelers} <= {0, 1, 2} and {SELF_TRAINING} & set(args.methods):
        raise SystemExit("Predicted labels have dataset ids for the seeds 0, 1 and 2.")
    options = {
        "settings": tuple(args.settings),
        "alone": args.alone,
        "predicted_foreground": args.predicted_foreground,
        "labelers": tuple(args.labelers),
        "ignore_uncertain": args.ignore_uncertain,
        "drop_worst": args.drop_worst,
        "networks": tuple(args.networks),
        "ensemble": tuple(args.seeds) if args.ensemble else (),
        "device": args.device,
        "bf16": args.bf16,
    }
    seeds = args.seeds[:1] if args.ensemble else args.seeds
    return [Run(args.task, method, seed, **options) for seed in seeds for method in args.methods]


def runs_in(queue: Path, bf16: bool, parser: argparse.ArgumentParser) -> list[tuple[Run, str]]:
    """The runs of a queue's lines, each with the scans that it is measured on."""
    found = []
    for line in queue.read_text(encoding="utf-8").splitlines():
        words = shlex.split(line, comments=True)
        try:
            args = parser.parse_args(["run", *words, *["--bf16"] * bf16]) if words else None
        except SystemExit:  # argparse has said why; the line may be half-typed
            continue
        found += [(run, args.on) for run in runs_of(args)] if args else []
    return found


def work_through(queue: Path, bf16: bool, parser: argparse.ArgumentParser) -> None:
    """Does the lines of a queue from the top, and looks at them anew after every run: they may change meanwhile.

    What is measured, or being done by another call, is passed over. What fails, or is no line of arguments, is said and
    left for the next call.
    """
    failed = set()
    while True:
        for run, on in runs_in(queue, bf16, parser):
            if (run, on) in failed or measured(run, on):
                continue
            try:
                measure(run, on)
            except BlockingIOError:
                continue
            except (Exception, SystemExit) as error:  # the other lines shall have their turn
                print(f"{run.task}, {run.row}, seed {run.seed} failed, see {run.folder.parent}: {error}", flush=True)
                failed.add((run, on))
            break
        else:
            raise SystemExit(1 if failed else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure methods on a task")
    run.add_argument("task", choices=TASKS)
    run.add_argument("methods", nargs="+", help="supervised, self-training, or trainers' names")
    run.add_argument("--seeds", type=int, nargs="+", default=[0])
    on = ("development", "test", "unlabeled")
    run.add_argument("--on", choices=on, default="test", help="the scans to measure on")
    run.add_argument("--alone", action="store_true", help="without the first phase: the method from random weights")
    run.add_argument(
        "--predicted-foreground",
        action="store_true",
        help="unlabeled patches on foreground that the first phase predicts",
    )
    run.add_argument("--labelers", type=int, nargs="+", default=[], help="seeds whose first phases label together")
    run.add_argument("--ignore-uncertain", action="store_true", help="where the labelers disagree, nothing is learned")
    run.add_argument("--drop-worst", type=int, default=0, help="leave out so many scans on which they disagree most")
    run.add_argument("--networks", nargs="+", default=[], help="of every checkpoint, as student teacher: an ensemble")
    run.add_argument("--ensemble", action="store_true", help="the models of all seeds predict together")
    queue = commands.add_parser("queue", help="work through a file with arguments of `run`, one run after the other")
    queue.add_argument("file", type=Path)
    other = commands.add_parser("command", help="used by `run`: a command of nnunet-ssl whose networks run in bfloat16")
    other.add_argument("arguments", nargs=argparse.REMAINDER)
    one = commands.add_parser("phase", help="used by `run`: one training in this process")
    one.add_argument("task")
    one.add_argument("method")
    for name in ("--dataset", "--trainer", "--start"):
        one.add_argument(name)
    one.add_argument("--seed", type=int)
    for command in (run, one):
        command.add_argument(
            "--set", dest="settings", nargs="*", default=[], metavar="NAME=VALUE", help="trainer attributes"
        )
        command.add_argument("--device", default="cpu")
    for command in (run, queue, one):
        command.add_argument("--bf16", action="store_true", help="train in bfloat16; for CPUs with avx512_bf16 or AMX")
    args = parser.parse_args()
    if getattr(args, "bf16", False) and torch.backends.cpu.get_cpu_capability() == "AVX2":
        raise SystemExit("Leave out --bf16: this processor has no bfloat16 and would take ten times as long.")
    if args.command == "queue":
        work_through(args.file, args.bf16, parser)
    elif args.command == "command":
        with torch.autocast("cpu", torch.bfloat16):
            raise SystemExit(nnunet_ssl_command(args.arguments))
    elif args.command == "phase":
        torch.set_num_threads(1)
        phase(args)
    else:
        for one_run in runs_of(args):
            try:
                if not measured(one_run, args.on):
                    measure(one_run, args.on)
            except BlockingIOError:
                raise SystemExit(f"Another call is at work on seed {one_run.seed} of {one_run.task}.") from None


if __name__ == "__main__":
    main()
