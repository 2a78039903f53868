"""One job of a comparison: train a trainer on a fold where that is missing, predict the test scans, evaluate."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import textwrap
import traceback
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2 import paths
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_ssl.commands.evaluate import evaluate
from nnunet_ssl.system.lock import locked
from nnunet_ssl.system.processes import execute

PROTOCOL = "strict"


@dataclass(frozen=True)
class Job:
    """One trainer on one fold, with all that another computer of a cluster has to know; folders as in `compare`.

    Attributes:
        output: folder of the predictions and the log.
        results: folder of the model in place of nnUNet_results, or None.
    """

    dataset: str
    configuration: str
    plans: str
    trainer: str
    fold: int | str
    output: Path
    train: bool
    device: str
    num_processes: int
    mirroring: bool
    results: Path | None = None

    @property
    def name(self) -> str:
        """What no other job of a comparison is called."""
        return self.stem if self.results is None else f"{self.stem} in {self.results}"

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.trainer}_fold_{self.fold}"

    @property
    def predictions(self) -> Path:
        return self.output / "predictions" / self.stem

    @property
    def log(self) -> Path:
        return self.output / "logs" / f"{self.stem}.log"

    @property
    def model(self) -> Path:
        folder = get_output_folder(self.dataset, self.trainer, self.plans, self.configuration, self.fold)
        return Path(self.results or paths.nnUNet_results, Path(folder).relative_to(paths.nnUNet_results))

    @property
    def raw(self) -> Path:
        return Path(paths.nnUNet_raw, self.dataset)

    def training(self) -> tuple[str, ...]:
        """The command that trains it, without the device."""
        model = (self.dataset[7:10], self.configuration, str(self.fold))
        return ("nnUNetv2_train", *model, "-tr", self.trainer, "-p", self.plans)


def is_complete(checkpoint: Path) -> bool:
    """Whether there is a complete checkpoint; PyTorch's are zip files, whose directory is written last."""
    return checkpoint.is_file() and zipfile.is_zipfile(checkpoint)


def trained(job: Job) -> bool:
    """Whether the training has ended and its last checkpoint is complete."""
    return is_complete(job.model / "checkpoint_final.pth")


def settings(job: Job) -> dict:
    """All that predictions and their evaluation depend on, as JSON has it."""
    data = [file for kind in ("images", "labels") for file in (job.raw / f"{kind}Ts").iterdir()]
    return {
        "dataset": job.dataset,
        "configuration": job.configuration,
        "plans": job.plans,
        "trainer": job.trainer,
        "fold": job.fold,
        "mirroring": job.mirroring,
        "protocol": PROTOCOL,
        "checkpoint": (job.model / "checkpoint_final.pth").stat().st_mtime_ns,
        "test data": [len(data), max(file.stat().st_mtime_ns for file in data)],
    }


def finished(job: Job, folder: Path) -> bool:
    """Whether the folder has all that the job makes, with the job's settings, of the present checkpoint."""
    complete = trained(job) and all((folder / name).is_file() for name in ("evaluation.json", "settings.json"))
    return complete and json.loads((folder / "settings.json").read_text()) == settings(job)


def run_safely(job: Job, tell: Callable[[str], object] = lambda step: None) -> str | None:
    """Runs the job; in one line why it failed and where its log is, None where it did not."""
    try:
        run_job(job, tell)
    except Exception as error:
        with job.log.open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        return f"{textwrap.shorten(f'{type(error).__name__}: {error}', 300)}; log: {job.log}"
    return None


def run_job(job: Job, tell: Callable[[str], object]) -> None:
    """Trains where that is missing, predicts imagesTs and evaluates; the folder of both appears when it is complete.

    Args:
        tell: is called with the name of the step, again and again while it runs.
    """
    if not trained(job):
        if not job.train:  # gone since it was looked for
            raise FileNotFoundError(f"{job.model / 'checkpoint_final.pth'} is missing.")
        unfinished = [job.model / f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best")]
        for checkpoint in unfinished:  # nnU-Net was ended while it wrote: it would stumble over this file
            if checkpoint.is_file() and not is_complete(checkpoint):
                os.replace(checkpoint, checkpoint.with_suffix(".incomplete"))
        resume = ["--c"] if any(map(is_complete, unfinished)) else []
        # comparisons with other output folders train the same models, and stock trainers have no lock of their own
        job.model.parent.mkdir(parents=True, exist_ok=True)
        with locked(job.model.with_name(f".{job.model.name}.lock"), f"training {job.name} for {job.output}"):
            call(job, [*job.training(), "-device", job.device, *resume], lambda: tell(f"training{epoch(job.log)}"))
    temporary = job.predictions.with_name(f".{job.stem}.tmp")
    if not finished(job, temporary):  # it may have been ended just before the last step
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "settings.json").write_text(json.dumps(settings(job), indent=1))
        model = ["-d", job.dataset, "-c", job.configuration, "-p", job.plans, "-tr", job.trainer, "-f", str(job.fold)]
        data = ["-i", str(job.raw / "imagesTs"), "-o", str(temporary), "-chk", "checkpoint_final.pth"]
        workers = str(job.num_processes if job.num_processes > 1 else 0)  # 0: all in the one process
        how = ["-device", job.device, "-npp", workers, "-nps", workers]
        how += ["--disable_progress_bar"] + ["--disable_tta"] * (not job.mirroring)
        scans = len(list((job.raw / "labelsTs").iterdir()))

        def progress() -> str:
            done = len([file for file in temporary.iterdir() if file.suffix != ".json"])
            return f"prediction ({done} of {scans})"

        call(job, ["nnUNetv2_predict", *model, *data, *how], lambda: tell(progress()))
        tell("evaluation")
        with (
            job.log.open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            evaluate(job.raw / "labelsTs", temporary, num_processes=job.num_processes, protocol=PROTOCOL)
    if job.predictions.exists():
        shutil.rmtree(job.predictions)
    os.replace(temporary, job.predictions)


def epoch(log: Path) -> str:
    """The epoch that a training is at, in brackets, from the end of its log; empty where that has none."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = re.findall(r"^\S+ \S+: Epoch (\d+) *$", file.read().decode(errors="replace"), re.MULTILINE)
    return f" (epoch {found[-1]})" if found else ""


def call(job: Job, command: Sequence[str], tick: Callable[[], object]) -> None:
    """Runs a command of nnU-Net with its output in the job's log; RuntimeError where it fails."""
    with job.log.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
    environment = os.environ | ({} if job.results is None else {"nnUNet_results": str(job.results)})
    code = execute(command[0], command[1:], job.log, environment=environment, tick=tick)
    if code < 0:
        raise RuntimeError(f"{command[0]} was ended by {signal.Signals(-code).name}, often for want of memory")
    if code > 0:
        last = job.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{command[0]} ended with exit code {code}: {last}")
