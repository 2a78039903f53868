"""Faults of a tiny training, and what has to hold after each: used by test_faults.py and benchmarks/faults.py.

Every training is a process of its own, forked from this one so that nothing is imported again, and the leader of a
process group, so that whatever it leaves behind is found in /proc.
"""

import csv
import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnunet_ssl.trainer import SemiSupervisedTrainer

TRAINER = "nnUNetTrainerM3"
EPOCHS = 4
SETTINGS = {"num_epochs": EPOCHS, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 1, "save_every": 1}
PATIENCE = 200  # seconds for a training of some seconds on a busy machine


@dataclass
class Fault:
    """What happens to a training, and what it has to say.

    Attributes:
        name: of the moment.
        inside: called in the training's process with the trainer before it starts; may arm the fault.
        outside: called in this process with the training's process and its fold folder, while it runs.
        after: called with the fold and dataset folder when it has ended: damage to what it left.
        repair: called with the two folders before the training is continued.
        workers: nnUNet_n_proc_DA.
        ends_by: signal that the training dies of; None: it ends by itself.
        says: text that its output, or that of the continued training, must have.
    """

    name: str
    inside: Callable | None = None
    outside: Callable | None = None
    after: Callable | None = None
    repair: Callable | None = None
    workers: int = 0
    ends_by: int | None = signal.SIGKILL
    says: str = ""


# ---- the training ----


def train(dataset: Path, results: Path, continued: bool, workers: int, inside: Callable | None, log: Path) -> None:
    """What nnUNetv2_train does, without its last step: the validation of whole scans, in slow spawned processes."""
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {
        "nnUNet_results": str(results),
        "nnUNet_preprocessed": str(dataset.parent),
        "nnUNet_n_proc_DA": str(workers),
    }
    torch.set_num_threads(1)
    for name, value in SETTINGS.items():
        setattr(SemiSupervisedTrainer, name, value)
    try:
        trainer = get_trainer_from_args(
            dataset.name, "3d_fullres", 0, TRAINER, continue_training=continued, device=torch.device("cpu")
        )
        trainer.supervised_part = 0.0  # every step is the method's
        if inside is not None:
            inside(trainer)
        maybe_load_checkpoint(trainer, continued, False)
        trainer.run_training()
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def start(dataset: Path, results: Path, continued: bool = False, workers: int = 0, inside: Callable | None = None):
    """A training in a process of its own; its output goes to a file beside `results`."""
    log = results.with_name(f"{results.name}_{'continued' if continued else 'first'}.txt")
    log.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=train, args=(dataset, results, continued, workers, inside, log))
    process.start()
    process.log = log
    return process


def fold_folder(dataset: Path, results: Path) -> Path:
    return results / dataset.name / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"


def wait_for(condition: Callable, process, seconds: float = PATIENCE) -> bool:
    """Whether the condition came true while the process was running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if not process.is_alive():
            return bool(condition())
        time.sleep(0.01)
    return False


def finish(process) -> int | None:
    process.join(PATIENCE)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


def group(leader: int) -> list[int]:
    """Processes of a process group that are running."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                state, _, number = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                continue
            if int(number) == leader and state != "Z":
                found.append(int(folder.name))
    return found


# ---- what has to hold ----


def epochs_of(folder: Path) -> list[int]:
    """The complete rows of losses.csv."""
    path = folder / "losses.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as f:
        header, *rows = list(csv.reader(f)) or [[]]
    return [int(row[0]) for row in rows if len(row) == len(header)]


def check(fault: Fault, dataset: Path, results: Path) -> tuple[str, list[str]]:
    """Trains with the fault, continues, and lists what is not as it should be, after a word on where it was."""
    folder, problems = fold_folder(dataset, results), []
    process = start(dataset, results, workers=fault.workers, inside=fault.inside)
    if fault.outside is not None:
        fault.outside(process, folder)
    code = finish(process)
    expected = -fault.ends_by if fault.ends_by else 1
    if code != expected and not (fault.after and code == 0) and not (code == 0 and fault.name.startswith("SIGKILL at")):
        problems.append(f"exit code {code}, expected {expected}")
    if not wait_for(lambda: not group(process.pid), multiprocessing.current_process(), 20):
        problems.append(f"orphans {group(process.pid)}")
        os.killpg(process.pid, signal.SIGKILL)

    epochs, checkpoints = epochs_of(folder), {}
    for file in sorted(folder.glob("checkpoint_*.pth")):
        try:
            checkpoints[file.name] = torch.load(file, map_location="cpu", weights_only=False)["current_epoch"]
        except Exception as error:  # torch raises anything for a damaged file
            problems.append(f"{file.name} is damaged: {error}")
    if len(epochs) > 1 and max(checkpoints.values(), default=0) < epochs[-1]:
        problems.append(f"losses of epoch {epochs[-1]}, but checkpoints {checkpoints}")
    where = f"epoch {len(epochs)}, {max(checkpoints.values(), default=0)} saved"

    if fault.after is not None:
        fault.after(folder, dataset)
    if fault.repair is not None:
        fault.repair(folder, dataset)
    continued = start(dataset, results, continued=True, workers=fault.workers)
    if finish(continued) != 0:
        problems.append(f"the continued training failed: {continued.log.read_text(encoding='utf-8')[-300:]}")
    text = process.log.read_text(encoding="utf-8") + continued.log.read_text(encoding="utf-8")
    if fault.says not in text:
        problems.append(f"nobody said {fault.says!r}")
    if group(continued.pid):
        problems.append(f"orphans of the continued training {group(continued.pid)}")
    if epochs_of(folder) != list(range(EPOCHS)):
        problems.append(f"losses of epochs {epochs_of(folder)}")
    final = folder / "checkpoint_final.pth"
    if not final.is_file() or torch.load(final, map_location="cpu", weights_only=False)["current_epoch"] != EPOCHS:
        problems.append("no final checkpoint")
    hidden = [file.name for file in folder.rglob(".*")]
    if hidden:
        problems.append(f"temporary files {hidden}")
    return where, problems


# ---- the faults ----


def signalled(number: int, when: Callable) -> Callable:
    """A signal from outside as soon as `when(folder)` is true."""

    def outside(process, folder):
        wait_for(lambda: when(folder), process)
        if process.is_alive():
            os.kill(process.pid, number)

    return outside


def after_seconds(seconds: float) -> Callable:
    def outside(process, folder):
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)

    return outside


def in_epoch(number: int) -> Callable:
    return lambda folder: len(epochs_of(folder)) > number


def kill_while_writing(number: int, share: float) -> Callable:
    """Kills the process when this part of its `number`-th checkpoint is written."""

    def inside(trainer):
        original, written = torch.save, []

        def save(state, file):
            original(state, file)
            if not hasattr(file, "getvalue"):
                written.append(file)
                if len(written) == number:
                    data = Path(file).read_bytes()
                    Path(file).write_bytes(data[: int(share * len(data))])
                    os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save

    return inside


def kill_while_plotting(epoch: int, share: float) -> Callable:
    """Kills the process when this part of progress.png is written."""

    def inside(trainer):
        original = matplotlib.figure.Figure.savefig

        def savefig(figure, file, *args, **kwargs):
            original(figure, file, *args, **kwargs)
            if trainer.current_epoch == epoch:
                data = Path(file).read_bytes()
                Path(file).write_bytes(data[: int(share * len(data))])
                os.kill(os.getpid(), signal.SIGKILL)

        matplotlib.figure.Figure.savefig = savefig

    return inside


def kill_while_workers_start(number: int) -> Callable:
    """Kills the process when `number` of its workers are started."""

    def inside(trainer):
        original, started = multiprocessing.Process.start, []

        def start(process):
            original(process)
            started.append(process)
            if len(started) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        multiprocessing.Process.start = start

    return inside


def no_space_left(epoch: int) -> Callable:
    """The disk is full from this epoch on: no file may become longer than half a checkpoint."""
    import resource  # not on Windows

    def inside(trainer):
        original = trainer.on_epoch_end

        def on_epoch_end():
            if trainer.current_epoch == epoch:
                sys.dont_write_bytecode = True  # Python cuts it off without an error
                size = (Path(trainer.output_folder) / "checkpoint_latest.pth").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
            original()

        trainer.on_epoch_end = on_epoch_end

    return inside


def no_space_in_torch(epoch: int) -> Callable:
    """Every write of torch raises ENOSPC from this epoch on."""

    def inside(trainer):
        original = torch.save

        def save(state, file):
            if trainer.current_epoch >= epoch and not hasattr(file, "getvalue"):
                Path(file).write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            original(state, file)

        torch.save = save

    return inside


def kill_a_worker(epoch: int) -> Callable:
    def inside(trainer):
        original = trainer.on_epoch_end

        def on_epoch_end():
            original()
            loader = getattr(trainer.dataloader_train, "loader", None)
            if trainer.current_epoch == epoch and isinstance(loader, NonDetMultiThreadedAugmenter):
                os.kill(trainer.dataloader_train._processes[0].pid, signal.SIGKILL)
                trainer.dataloader_train.abort_event.wait(PATIENCE)  # else the batches in store may last to the end

        trainer.on_epoch_end = on_epoch_end

    return inside


def harm_in_epoch(epoch: int, harm: Callable) -> Callable:
    """Calls `harm(dataset)` in the training's process at the end of an epoch."""

    def inside(trainer):
        original = trainer.on_epoch_end

        def on_epoch_end():
            original()
            if trainer.current_epoch == epoch:
                harm(Path(trainer.preprocessed_dataset_folder_base))

        trainer.on_epoch_end = on_epoch_end

    return inside


def truncated(file: Path, share: float = 0.5) -> None:
    """Puts the first part of the file in its place: whoever has the old one mapped keeps it."""
    data = file.read_bytes()
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(data[: int(share * len(data))])
    os.replace(new, file)


def data_fault(name: str, file: str, harm: Callable, says: str, repaired: bool = True, workers: int = 0) -> Fault:
    """Harm to a file of the preprocessed dataset in epoch 2, restored before the training continues."""
    kept: dict[str, bytes] = {}

    def inside(trainer):
        trainer.num_iterations_per_epoch = 16  # enough that the file is read, whatever workers have read ahead
        harm_in_epoch(2, lambda dataset: harm(dataset / file))(trainer)

    def repair(folder, dataset):
        if repaired:
            (dataset / file).write_bytes(kept["data"])

    fault = Fault(name, inside, repair=repair, workers=workers, ends_by=None, says=says)
    fault.remember = lambda dataset: kept.update(data=(dataset / file).read_bytes())
    return fault


def cut_latest(folder: Path, dataset: Path) -> None:
    truncated(folder / "checkpoint_latest.pth")


def empty_latest(folder: Path, dataset: Path) -> None:
    (folder / "checkpoint_latest.pth").write_bytes(b"")


IMAGES, OWN = "nnUNetPlans_3d_fullres", "nnUNetPlans_3d_fullres_unlabeled"


def other_faults() -> list[Fault]:
    """Everything but SIGKILL of the training."""
    faults = []
    for workers in (0, 2):
        end = f", {workers} workers"
        faults += [
            Fault(
                f"SIGTERM{end}", None, signalled(signal.SIGTERM, in_epoch(1)), workers=workers, ends_by=signal.SIGTERM
            ),
            Fault(
                f"Ctrl-C{end}",
                harm_in_epoch(2, lambda dataset: os.kill(os.getpid(), signal.SIGINT)),
                workers=workers,
                ends_by=None,
                says="KeyboardInterrupt",
            ),
            data_fault(
                f"an unlabeled image is cut off while training{end}",
                f"{OWN}/unlabeled_000.b2nd",
                truncated,
                "unlabeled_000.b2nd is missing or damaged",
                workers=workers,
            ),
        ]
    return [
        *faults,
        Fault("disk full (RLIMIT_FSIZE) in a checkpoint", no_space_left(2), ends_by=None, says="could not be written"),
        Fault("disk full (ENOSPC) in a checkpoint", no_space_in_torch(2), ends_by=None, says="No space left on device"),
        Fault("a data worker is killed", kill_a_worker(2), workers=2, ends_by=None, says="workers are no longer alive"),
        Fault(
            "SIGKILL, then checkpoint_latest is cut off",
            None,
            signalled(signal.SIGKILL, in_epoch(2)),
            cut_latest,
            says="cut off or damaged",
        ),
        Fault(
            "SIGKILL, then checkpoint_latest is empty",
            None,
            signalled(signal.SIGKILL, in_epoch(2)),
            empty_latest,
            says="cut off or damaged",
        ),
        data_fault(
            "a labeled image is cut off while training",
            f"{IMAGES}/case_000.b2nd",
            truncated,
            "Files of case_000 in",
        ),
        data_fault(
            "a labeled case loses its _seg.b2nd while training",
            f"{IMAGES}/case_001_seg.b2nd",
            Path.unlink,
            "Files of case_001 in",
        ),
        data_fault(
            "an unlabeled case is deleted while training, and stays so",
            f"{OWN}/unlabeled_001.b2nd",
            Path.unlink,
            "unlabeled_001.b2nd is missing or damaged",
            repaired=False,
        ),
    ]


def kills(count: int, seconds: float, seed: int = 0) -> list[Fault]:
    """SIGKILLs: three fifths at random moments of a training of so many seconds, the others aimed."""
    rng = random.Random(seed)
    aimed = []
    for number in range(count * 2 // 5):
        kind, turn = number % 4, number // 4
        if kind == 0:
            nth, share = turn % 5 + 1, rng.random()
            aimed.append(
                Fault(f"SIGKILL in checkpoint write {nth}, {share:.0%} written", kill_while_writing(nth, share))
            )
        elif kind == 1:
            epoch, share = turn % EPOCHS, rng.random()
            name = f"SIGKILL while progress.png is plotted, epoch {epoch}, {share:.0%} written"
            aimed.append(Fault(name, kill_while_plotting(epoch, share)))
        elif kind == 2:
            nth = turn % 3 + 1
            name = f"SIGKILL while workers start, {nth} of 3 started"
            aimed.append(Fault(name, kill_while_workers_start(nth), workers=2))
        else:
            nth, share = turn % 5 + 1, rng.random()
            name = f"SIGKILL in checkpoint write {nth}, {share:.0%} written, 2 workers"
            aimed.append(Fault(name, kill_while_writing(nth, share), workers=2))
    anywhen = []
    for number in range(count - len(aimed)):
        moment, workers = rng.uniform(0, seconds), 2 * (number % 2)
        name = f"SIGKILL at {moment:.2f} s, {workers} workers"
        anywhen.append(Fault(name, None, after_seconds(moment), workers=workers))
    return [*anywhen, *aimed]


def run(fault: Fault, dataset: Path, scratch: Path) -> tuple[str, list[str]]:
    """`check` with a copy of the dataset (where the fault harms it) and a results folder of its own."""
    results = scratch / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    if not hasattr(fault, "remember"):
        return check(fault, dataset, results)
    copy = scratch / "preprocessed" / dataset.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(dataset, copy)
    fault.remember(copy)
    return check(fault, copy, results)
