"""Jobs on a Slurm cluster, through submitit."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.wording import one_line

# submitit's names of what every cluster has; all others are those of sbatch
SHARED = {"name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout"}
SECONDS = 1.0  # between two looks at the jobs; submitit asks Slurm itself less often


def make_executor(folder: Path, settings: dict[str, str | int], cluster: str = "slurm"):
    """What submits jobs, with its files in `folder`.

    Args:
        settings: names as in submitit or sbatch (timeout_min, partition, mem_gb, ...).
        cluster: "slurm", or "local" for child processes of this computer.

    Raises:
        ImportError: submitit is not installed.
        RuntimeError: this is no Slurm cluster.
        ValueError: a setting that there is not, or of a wrong type.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError("--launcher slurm needs submitit: pip install submitit") from error
    several = sorted({"nodes", "tasks_per_node", "ntasks_per_node", "map_count"} & settings.keys())
    if several:
        raise ValueError(f"--slurm {several[0]}: every job is one process on one node. Leave it out.")
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    try:
        executor.update_parameters(**{k if k in SHARED else f"slurm_{k}": v for k, v in settings.items()})
    except (NameError, AssertionError, TypeError, ValueError) as error:
        reason = one_line(error)
        raise ValueError(f"--slurm {' '.join(f'{k}={v}' for k, v in settings.items())}: {reason}") from error
    return executor


def run_jobs(executor, function: Callable[[object], str | None], jobs: dict[str, object]) -> dict[str, str]:
    """Submits `function(job)` for every job and waits until all are done.

    The ids of the jobs are kept in submitted.json in the executor's folder: what an earlier call has submitted and is
    still queued or running is waited for, not submitted again. An interruption leaves the jobs where they are.

    Args:
        executor: of `make_executor`.
        function: of a module that can be imported; what it returns is why the job failed, None where it did not.
        jobs: by their names.

    Returns:
        Why jobs failed, by their names.

    Raises:
        RuntimeError: a job is still queued or running that was submitted under this name with other settings.
    """
    import submitit

    classes = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}
    record = executor.folder / "submitted.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(record.read_text()) if record.is_file() else {}
    waiting = {}
    for name in [name for name in jobs if name in known]:
        earlier = classes[executor.cluster](executor.folder, known[name]["id"])
        if earlier.done(force_check=True):
            continue
        if known[name]["job"] != repr(jobs[name]):
            raise RuntimeError(
                f"Job {earlier.job_id} for {name} is still queued or running, with other settings. Wait for it, or end "
                f"it: scancel {earlier.job_id}"
            )
        waiting[name] = earlier
        print(
            f"{name} is job {earlier.job_id} already, {earlier.state.lower()}. Should Slurm know of no such job any "
            f"more, remove it from {record}."
        )
    for name in [name for name in jobs if name not in waiting]:
        waiting[name] = executor.submit(function, jobs[name])
        known[name] = {"id": waiting[name].job_id, "job": repr(jobs[name])}
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(known, indent=1))

    failures = {}
    with tqdm(total=len(waiting), unit="job", disable=None) as bar:
        while waiting:
            states = Counter(job.state.lower() for job in waiting.values())
            bar.set_description(", ".join(f"{number} {state}" for state, number in sorted(states.items())))
            for name in [name for name, job in waiting.items() if job.done()]:
                reason = outcome(waiting.pop(name))
                if reason is not None:
                    failures[name] = reason
                bar.write(f"{name}: {'finished' if reason is None else f'failed: {reason}'}")
                bar.update()
            if waiting:
                time.sleep(SECONDS)
    return failures


def outcome(job) -> str | None:
    """What a job that is done has returned, or in one line how it ended instead."""
    error = job.exception()
    if error is None:
        return job.result()
    if job.paths.result_pickle.is_file():  # our function has raised; the last line of the traceback says what
        reason = str(error).split("-" * 22)[1].strip().rpartition("\n")[2]
    else:
        reason = "ended without a result: killed, or out of time or memory"
    return f"job {job.job_id} ({job.state.lower()}): {reason}; log: {job.paths.stderr}"
