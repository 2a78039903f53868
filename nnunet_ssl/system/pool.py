"""Worker processes that end with their parent, and jobs behind a progress bar."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from nnunet_ssl.system.disk import is_full

SHOWN = 10  # failures whose reasons are said


@contextmanager
def worker_pool(num_processes: int) -> Iterator[Executor | None]:
    """Worker processes that end with this block and with this process; None, for in-process work, below 2."""
    if num_processes < 2:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=exit_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def exit_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever, or write beside a restarted run."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_all(
    pool: Executor | None, function: Callable, jobs: dict[str, tuple], description: str, unit: str = "case"
) -> dict[str, Any]:
    """Call `function` with every job's arguments, behind a progress bar of `unit`s; results under the jobs' names.

    A job that fails does not keep the others from being done, unless a disk is full.

    Raises: RuntimeError that names the jobs whose calls failed, when all are done, or says that a worker died.
    """
    results, reasons, first = {}, [], None  # texts: the tracebacks of errors keep the images of their cases
    with tqdm(total=len(jobs), desc=description, unit=unit, disable=not jobs) as bar:
        for name, result in calls(pool, function, jobs):
            try:
                results[name] = result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "A worker process died without an error, most likely because memory ran out. Run the same command "
                    "again with fewer processes (-np 1 needs the least): complete cases are kept."
                ) from error
            except Exception as error:
                reasons.append(f"{name}: {type(error).__name__}: {error}")
                first = first or error.with_traceback(None)
                if is_full(error):
                    break
            bar.update()
    if reasons:
        more = f"\n  and {len(reasons) - SHOWN} more" * (len(reasons) > SHOWN)
        text = f"{description} failed at " + "\n  ".join(reasons[:SHOWN]) + more
        raise RuntimeError(text) from first
    return results


def calls(pool: Executor | None, function: Callable, jobs: dict[str, tuple]) -> Iterator[tuple[str, Callable]]:
    """Names of the jobs, each with a function that gives its result, in the order in which they are done."""
    if pool is None:
        for name, arguments in jobs.items():
            yield name, lambda arguments=arguments: function(*arguments)
    else:
        futures = {pool.submit(function, *arguments): name for name, arguments in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result
