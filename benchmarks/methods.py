"""Benchmark of methods on two real datasets: trains, predicts, and adds Dice and distances of every case to a table.

    nnunet-ssl convert la -i LA -d 501 --train-list la_dev_train.list --test-list la_dev_test.list
    nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -overwrite_target_spacing 2.5 2.5 2.5
    nnunet-ssl convert acdc -i ACDC -d 503 --test-list acdc_val.list
    nnUNetv2_plan_and_preprocess -d 503 -c 2d

    python benchmarks/methods.py run ACDC-3 supervised self-training nnUNetTrainerM3HL --seeds 0 1 2
    python benchmarks/methods.py run ACDC-3 nnUNetTrainerM3HL --set unmixed=0.4 --on development
    python benchmarks/methods.py run ACDC-3 nnUNetTrainerM3HL --alone       # one phase, from random weights
    python benchmarks/methods.py queue benchmarks/queue.txt                 # lines like those above; one call per core
    python benchmarks/ruler.py                                              # the tables and the picture

A path has two phases of the same number of steps, each with nnU-Net's own learning-rate decay. The first one is
`nnUNetTrainer` on the labeled scans and shared: every second phase of a task and seed starts from its weights,
segmentation heads included. The second phase of `supervised` is the same trainer again, that of `self-training` is
the same trainer on the labels that the first phase predicts for the unlabeled scans, that of any other row is the
trainer of that name. So all rows take the same number of steps on the same plans. The final checkpoint of the second
phase is used, its deployed network, nothing is selected; mirroring at prediction is off, to save time.

Settings are chosen on the development scans, whose labels no model of the task saw; figures are reported on the test
scans. In LA-60 and ACDC-60 all labels of the training scans are known: `supervised` there is the reference of the
tasks with few. Everything is kept in nnUNet_results/TASK/seed_N: what is done is not done again, a training that was
interrupted goes on from its last epoch, and several calls share the work without doing it twice. On a processor that
computes in bfloat16, `--bf16` takes a quarter to a third of the time; the rows of a table should all have it, or none.
"""

import argparse
import ast
import csv
import fcntl
import json
import os
import random
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_compile", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
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
SECONDS_FILE, LABELING_SECONDS = "seconds.json", "labeling_seconds.json"  # processor time, in a run's folder
STEPS_PER_EPOCH = 250


@dataclass(frozen=True)
class Run:
    task: str
    method: str  # supervised, self-training or a trainer
    seed: int
    settings: tuple[str, ...] = ()  # NAME=VALUE
    alone: bool = False
    predicted_foreground: bool = False
    device: str = "cpu"
    bf16: bool = False

    @property
    def row(self) -> str:
        how = ["predicted foreground"] * self.predicted_foreground + ["alone"] * self.alone
        return ", ".join([self.method, *self.settings, *how])

    @property
    def folder(self) -> Path:
        return Path(nnUNet_results) / self.task / f"seed_{self.seed}" / self.row.replace(", ", "_")


@contextmanager
def locked(file: Path, wait: bool = False) -> Iterator[None]:
    """Holds a file's lock; raises BlockingIOError where another process has it, unless told to wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as f:
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
    task = TASKS[run.task]
    dataset = str(maybe_convert_to_dataset_name(task.dataset))
    scans(run, dataset, on)  # says what cannot be measured before anything is trained
    with locked(run.folder / "lock"):
        first = Run(run.task, FIRST_PHASE, run.seed, device=run.device, bf16=run.bf16)
        if not run.alone:
            with locked(first.folder / "lock"):
                train(first, dataset, "nnUNetTrainer")
        labels = run.method == SELF_TRAINING or run.predicted_foreground
        if labels:
            with locked(first.folder / "lock"):
                predicted = label_scans(first, dataset)
        trained_on = predicted if run.method == SELF_TRAINING else dataset
        trainer = "nnUNetTrainer" if run.method in (SUPERVISED, SELF_TRAINING) else run.method
        train(run, trained_on, trainer, None if run.alone else checkpoint(first, dataset, "nnUNetTrainer"))
        metrics = predict(run, dataset, trained_on, trainer, on)
        seconds = [0 if run.alone else cpu_seconds(first.folder / SECONDS_FILE), cpu_seconds(run.folder / SECONDS_FILE)]
        seconds[1] += cpu_seconds(first.folder / LABELING_SECONDS) if labels else 0
        record(run, on, seconds, metrics)
    dice = statistics.mean(values[0] for values in metrics.values())
    print(f"{run.task}, {run.row}, seed {run.seed}, {on} scans: Dice {dice:.2f}", flush=True)


def checkpoint(run: Run, dataset: str, trainer: str) -> Path:
    task = TASKS[run.task]
    model = run.folder / dataset / f"{trainer}__nnUNetPlans__{task.base}_quick"
    # a dataset with predicted labels has one fold
    return model / f"fold_{0 if run.method == SELF_TRAINING else task.fold}" / "checkpoint_final.pth"


def call(run: Run, command: list[str], **options) -> None:
    """Runs a command with the run's folder as nnUNet_results."""
    # nnU-Net's predictor takes as many threads as there are cores: let them sleep, not spin, while they wait
    environment = {**os.environ, "nnUNet_results": str(run.folder), "OMP_WAIT_POLICY": "PASSIVE"}
    if run.predicted_foreground:
        environment[PREDICTED_FOREGROUND] = str(TASKS[run.task].first_pseudo_dataset + run.seed)
    subprocess.run([str(word) for word in command], check=True, env=environment, close_fds=False, **options)


def train(run: Run, dataset: str, trainer: str, start: Path | None = None) -> None:
    """Trains a phase in a process of its own unless it is done, or goes on with it."""
    add_configuration(dataset, TASKS[run.task])
    if checkpoint(run, dataset, trainer).is_file():
        return
    print(f"{run.task}, {run.row}, seed {run.seed}: training", flush=True)
    command = [sys.executable, __file__, "phase", run.task, run.method, "--seed", run.seed, "--device", run.device]
    command += ["--dataset", dataset, "--trainer", trainer]
    command += ["--start", start] if start else []
    command += ["--set", *run.settings] if run.settings else []
    command += ["--bf16"] * run.bf16
    with (run.folder / "training.log").open("a") as log:
        call(run, command, stdout=log, stderr=subprocess.STDOUT)


def phase(args) -> None:
    """A phase in this process: stock nnU-Net's training loop with a fixed number of steps."""
    task = TASKS[args.task]
    fold = 0 if args.method == SELF_TRAINING else task.fold
    seed_all(args.seed, 0)
    device = torch.device(args.device)
    trainer = get_trainer_from_args(args.dataset, f"{task.base}_quick", fold, args.trainer, device=device)
    trainer.num_iterations_per_epoch, trainer.num_epochs = STEPS_PER_EPOCH, task.steps // STEPS_PER_EPOCH
    trainer.num_val_iterations_per_epoch = 5  # monitoring only
    trainer.save_every = 1
    for setting in args.settings:
        name, value = setting.split("=", 1)
        if not hasattr(trainer, name):
            raise SystemExit(f"{args.trainer} has no setting {name}.")
        setattr(trainer, name, literal(value))
    if args.device == "cpu" and len(task.patch) == 3:
        use_channels_last(trainer)
    if args.bf16:
        use_bf16(trainer)
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    if latest.is_file():
        trainer.load_checkpoint(str(latest))
        if not hasattr(trainer, "companions"):  # ours go on with the random state of the checkpoint
            seed_all(args.seed, 2 + trainer.current_epoch)
    elif args.start:
        trainer.initialize()
        weights = torch.load(args.start, map_location=device, weights_only=False)["network_weights"]
        trainer.network.load_state_dict(weights)
        seed_all(args.seed, 1)  # other batches than those of the first phase
    if not hasattr(trainer, "companions"):
        write_checkpoints_at_once(trainer)
    count_seconds(trainer, Path(nnUNet_results) / SECONDS_FILE)
    trainer.run_training()


def seed_all(seed: int, stream: int) -> None:
    """Seeds what draws weights and batches; every stream of a seed has other numbers."""
    number = seed + 1000 * stream
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(number)


def write_checkpoints_at_once(trainer) -> None:
    """A stock checkpoint appears when it is complete, as ours do: a half-written one would count as finished."""
    save = trainer.save_checkpoint

    def save_checkpoint(filename):
        with replacing(Path(filename)) as temporary:
            save(str(temporary))

    trainer.save_checkpoint = save_checkpoint


def count_seconds(trainer, file: Path) -> None:
    """After every epoch, adds its seconds of processor time to the file; other processes do not disturb them."""
    end, begin = trainer.on_epoch_end, time.process_time()

    def on_epoch_end():
        nonlocal begin
        epoch = trainer.current_epoch
        end()
        add_seconds(file, {str(epoch): time.process_time() - begin})
        begin = time.process_time()

    trainer.on_epoch_end = on_epoch_end


def add_seconds(file: Path, seconds: dict[str, float]) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(known | seconds))


def cpu_seconds(file: Path) -> float:
    return sum(json.loads(file.read_text()).values())


def use_channels_last(trainer) -> None:
    """3D weights in the format whose convolutions are a quarter faster on a CPU (in 2D they are slower).

    Results differ by rounding.
    """
    initialize = trainer.initialize

    def initialize_channels_last():
        initialize()
        for network in (trainer.network, *vars(getattr(trainer, "companions", SimpleNamespace())).values()):
            network.to(memory_format=torch.channels_last_3d)

    trainer.initialize = initialize_channels_last


def use_bf16(trainer) -> None:
    """Trains in bfloat16 autocast on a CPU, as nnU-Net trains in float16 on CUDA; losses in float32."""
    initialize, step = trainer.initialize, trainer.train_step

    def initialize_with_float_logits():
        initialize()
        for network in (trainer.network, *vars(getattr(trainer, "companions", SimpleNamespace())).values()):
            for layer in network.decoder.seg_layers:
                layer.register_forward_hook(lambda module, inputs, output: output.float())

    trainer.initialize = initialize_with_float_logits
    trainer.train_step = torch.autocast("cpu", torch.bfloat16)(step)


def label_scans(first: Run, dataset: str) -> str:
    """The unlabeled scans with the labels that a first phase predicts, preprocessed; returns the dataset's name."""
    task, done = TASKS[first.task], first.folder / LABELING_SECONDS
    number = task.first_pseudo_dataset + first.seed
    name = f"Dataset{number}_{dataset[11:]}PseudoLabels"
    if done.is_file():
        return name
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    commands = [
        f"nnUNetv2_extract_fingerprint -d {number} -np 1",
        f"nnUNetv2_preprocess -d {number} -c {task.base} -np 1",
    ]
    labeled = first.folder / "labels_are_written"
    if (Path(nnUNet_raw) / name).is_dir() and not labeled.is_file():
        raise RuntimeError(
            f"{Path(nnUNet_raw) / name} has labels of another model. Remove it, also in nnUNet_preprocessed."
        )
    if not labeled.is_file():
        ours = f"{sys.executable} {__file__} command" if first.bf16 else "nnunet-ssl"
        commands = [
            f"{ours} pseudo-label -d {task.dataset} -c {task.base}_quick -f {task.fold} -o {number} -np 1 "
            f"-device {first.device}",
            *commands,
        ]
    print(f"{first.task}, seed {first.seed}: labeling", flush=True)
    with (first.folder / "labeling.log").open("w") as log:
        for command in commands:
            call(first, command.split(), stdout=log, stderr=subprocess.STDOUT)
            labeled.touch()
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    add_seconds(done, {"labeling": end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime})
    return name


def scans(run: Run, dataset: str, on: str) -> dict[Path, Path]:
    """Image to reference label of the scans on which a model is measured."""
    task, raw = TASKS[run.task], Path(nnUNet_raw) / dataset
    if on == "test":
        labels = sorted((raw / "labelsTs").iterdir())
        return {raw / "imagesTs" / file.name.replace(".nii.gz", "_0000.nii.gz"): file for file in labels}
    split = json.loads((Path(nnUNet_preprocessed) / dataset / "splits_final.json").read_text())[task.fold]
    if set(split["val"]) & set(split["train"]):
        raise SystemExit(f"{run.task} has no development scans: it is trained on them.")
    cases = split["val"] + split.get("unlabeled", [])[: task.hidden]
    return {raw / "imagesTr" / f"{case}_0000.nii.gz": raw / "labelsTr" / f"{case}.nii.gz" for case in cases}


def predict(run: Run, dataset: str, trained_on: str, trainer: str, on: str) -> dict[str, list[float]]:
    """Predicts the scans with nnUNetv2_predict; the METRICS of every case."""
    task, references = TASKS[run.task], scans(run, dataset, on)
    output, source = run.folder / f"predicted_{on}", run.folder / f"images_{on}"
    source.mkdir(exist_ok=True)
    for image in references:
        link = source / image.name
        if not link.is_symlink():
            link.symlink_to(image)
    fold = checkpoint(run, trained_on, trainer).parent.name.removeprefix("fold_")
    command = f"nnUNetv2_predict -d {trained_on} -c {task.base}_quick -f {fold} -tr {trainer} -npp 1 -nps 1"
    command += f" -device {run.device} --disable_tta --disable_progress_bar"
    call(run, [*command.split(), "-i", source, "-o", output], stdout=subprocess.DEVNULL)
    values = json.loads((Path(nnUNet_raw) / dataset / "dataset.json").read_text())["labels"].values()
    labels = [value for value in values if value != 0]
    files = references.values()
    return {file.name.split(".")[0]: case_means(output / file.name, file, labels, task.unit) for file in files}


def case_means(prediction: Path, reference: Path, labels: list[int], unit: str) -> list[float]:
    """The METRICS of two label files, means over the classes.

    A class that only the reference has counts as a Dice of 0 and has no distance; one that neither has does not count.
    """
    images = [sitk.ReadImage(str(file)) for file in (prediction, reference)]
    ours, theirs = map(sitk.GetArrayFromImage, images)
    spacing = images[1].GetSpacing()[::-1]
    classes = [case_metrics(ours == label, theirs == label, spacing) for label in labels]
    names = ("Dice", f"HD95_{unit}", f"ASD_{unit}")
    dice, *distances = (mean_of_present([metrics[name] for metrics in classes]) for name in names)
    return [100 * dice, *distances]


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
    settings = tuple(args.settings)
    if args.alone and (SELF_TRAINING in args.methods or args.predicted_foreground):
        raise SystemExit("--alone has no first phase that could label the unlabeled scans.")
    return [
        Run(args.task, method, seed, settings, args.alone, args.predicted_foreground, args.device, args.bf16)
        for seed in args.seeds
        for method in args.methods
    ]


def runs_in(queue: Path, bf16: bool, parser: argparse.ArgumentParser) -> list[tuple[Run, str]]:
    """The runs of a queue's lines, each with the scans that it is measured on."""
    found = []
    for line in queue.read_text().splitlines():
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
    run.add_argument("--on", choices=("development", "test"), default="test", help="the scans to measure on")
    run.add_argument("--alone", action="store_true", help="without the first phase: the method from random weights")
    run.add_argument(
        "--predicted-foreground",
        action="store_true",
        help="unlabeled patches on foreground that the first phase predicts",
    )
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


def literal(value: str):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a plain word
        return value


if __name__ == "__main__":
    main()
