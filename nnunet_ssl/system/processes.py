"""Console commands as child processes that never outlive this one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Between this process and a command: ends the command and all that it started when this process is gone, even killed.
# A training that went on alone would write beside the one that a restart begins.
SUPERVISOR = """
import os, signal, subprocess, sys, threading

def end_with_parent():
    os.read(0, 1)  # the parent holds the other end and never writes: this returns when it is gone
    if os.name == "nt":
        process.kill()
        os._exit(1)
    os.killpg(0, signal.SIGKILL)

process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=end_with_parent, daemon=True).start()
code = process.wait()
if code < 0:  # the same end for those who look at our exit code
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def find_program(name: str) -> str:
    """Path of a console command: in this Python's folder of scripts, or else on PATH.

    Raises: FileNotFoundError with advice where there is none.
    """
    scripts = str(Path(sys.executable).parent)  # a virtual environment need not be on PATH
    program = shutil.which(name, path=scripts) or shutil.which(name)
    if program is None:
        raise FileNotFoundError(
            f"{name} is neither in {scripts} nor on PATH. Fix: {sys.executable} -m pip install nnunet-ssl"
        )
    return program


def execute(
    program: str,
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> int:
    """Runs a console command to its end, without a shell, and returns its exit code, -N where signal N killed it.

    Args:
        program: name of the command, as nnUNetv2_train.
        arguments: of the command.
        log: what it prints is appended to this file; its folder must exist.
        environment: all variables of the command; default: those of this process.
        tick: is called twice a second.

    Raises:
        FileNotFoundError: there is no such program.
    """
    command = [sys.executable, "-S", "-c", SUPERVISOR, find_program(program), *arguments]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of processes that can be ended together
        )
        try:
            while process.poll() is None:
                tick()
                time.sleep(0.5)
        finally:
            if process.poll() is None:  # this process is interrupted
                process.kill() if os.name == "nt" else os.killpg(process.pid, signal.SIGKILL)
            process.stdin.close()
            process.wait()
    return process.returncode
