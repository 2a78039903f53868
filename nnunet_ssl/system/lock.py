"""One run at a time: a lock file that says who holds it, and that does not outlive its holder.

O_EXCL and a note of host, process id and start of the process, rather than the package filelock. Its native locks are
the kernel's: a network file system forwards them to the server, refuses them or keeps them to one computer, as it is
mounted, and nobody can read from them who holds them. Its SoftFileLock is much like this one, but tells others neither
host nor time, and with torch come versions of it in which the lock of a killed run stays for ever. Creation with O_EXCL
is atomic on NFS since version 3, on SMB and on Lustre.
"""

import json
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

HEARTBEAT = 60.0  # seconds between two signs of life of a holder
LOST = 300.0  # seconds without one, after which a holder on another computer counts as gone
UNWRITTEN = 2.0  # seconds after which a lock file without content is of a process that was killed while it wrote


@contextmanager
def locked(file: Path, doing: str) -> Iterator[None]:
    """In the block, no other process holds the lock `file`, on this computer or any other one with the same disk.

    A lock whose holder was killed is taken over: at once where that is known, of a process on another computer
    after five minutes without a sign of life. They are waited for: a job on a cluster may follow one that was killed.

    Args:
        file: appears for the time of the block; its folder must exist.
        doing: what the block does, for the others: "training in FOLDER".

    Raises:
        RuntimeError: another run holds the lock; the sentence says which process on which computer, and since when.
        OSError: the file cannot be written.
    """
    own = json.dumps(identity() | {"since": datetime.now().astimezone().isoformat(" ", "seconds"), "doing": doing})
    while not created(file, own):
        wait_for_life(file)
        refuse_if_held(file)
    ended = threading.Event()
    threading.Thread(target=show_life, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if content(file) == own:  # else somebody has removed it by hand, and it is another run's now
            file.unlink()


def check_part(part_id: int, num_parts: int) -> None:
    """Raises ValueError where there is no such part of the work."""
    if not 0 <= part_id < num_parts:
        raise ValueError(f"-part_id must be from 0 to {num_parts - 1} where -num_parts is {num_parts}, not {part_id}.")


def part_suffix(part_id: int, num_parts: int) -> str:
    """What tells the files of a part from those of others; nothing where there is one part."""
    return f".{part_id}of{num_parts}" if num_parts > 1 else ""


@contextmanager
def locked_part(target: Path, part_id: int, num_parts: int, doing: str) -> Iterator[None]:
    """No other run works at `target` during the block, but those that have other parts of as many; see `locked`."""
    file = target.with_name(f".{target.name}{part_suffix(part_id, num_parts)}.lock")
    with locked(file, doing):
        for other in target.parent.glob(f".{target.name}.*lock"):
            if other.name != file.name and (num_parts == 1 or not other.name.endswith(f"of{num_parts}.lock")):
                refuse_if_held(other)
        yield


def refuse_if_held(file: Path) -> None:
    """Raises RuntimeError, as `locked`, where another run holds the lock; removes a lock whose holder is gone."""
    noted = content(file)
    deadline = time.monotonic() + UNWRITTEN
    while noted == "" and time.monotonic() < deadline:  # its holder is about to write it
        time.sleep(0.05)
        noted = content(file)
    if noted is None:
        return
    holder = parsed(noted)
    if holder is not None and not is_gone(holder, file):
        raise RuntimeError(
            f"Process {holder['pid']} on {holder['host']} has been {holder['doing']} since {holder['since']}. Wait for "
            f"it, or end it, and run this again. If you know that it has ended already, remove {file}."
        )
    remove(file, noted)


def wait_for_life(file: Path) -> None:
    """Waits, where this computer cannot tell whether the holder of a lock lives, for the next sign that it does.

    Without one for too long the lock is removed.

    Raises: RuntimeError where the holder has ended meanwhile: what it did was not there when this run began.
    """
    noted = content(file) or ""
    holder, begin = parsed(noted), time_of(file)
    if holder is None or has_ended(holder) is not None:
        return
    seconds = min(LOST, LOST - (now(file.parent) - begin))  # where a client sets times, its clock may be ahead
    who = f"process {holder['pid']} on {holder['host']}, {holder['doing']} since {holder['since']}"
    print(f"Waiting for a sign of life of {who}: for {max(0, seconds):.0f} seconds at most.", flush=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if content(file) != noted:
            raise RuntimeError(f"It has just ended: {who}. Run this again, to begin with what it has left.")
        if time_of(file) != begin:
            return
        time.sleep(min(1.0, HEARTBEAT / 10))
    remove(file, noted)


def time_of(file: Path) -> float:
    """When a file was changed; 0 where it is gone."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def now(folder: Path) -> float:
    """The time by the clock of a folder's disk: a file server's may be minutes from this computer's."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock") as file:
            os.utime(file.name)
            return time_of(Path(file.name))
    except OSError:  # another user's folder, or a full disk
        return time.time()


def identity() -> dict[str, str | int | None]:
    """This process, in words that no other one has, before or after it, here or on another computer."""
    namespace = Path("/proc/self/ns/pid")  # process ids of two containers of one name do not mean the same
    return {
        "host": platform.node(),
        "namespace": namespace.stat().st_ino if namespace.exists() else None,
        "pid": os.getpid(),
        "start": start_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
    }


def start_of(pid: int) -> str | None:
    """When a process began, as boot and clock ticks; "ended" for a zombie, None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux, another user's process that is hidden from us, or gone meanwhile
        return start_by_ps(pid)
    return "ended" if fields[0] in "ZX" else f"{boot} {fields[19]}"


def start_by_ps(pid: int) -> str | None:
    """When a process began, as macOS tells it: to the second; None where there is no such process, or no ps."""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C", "TZ": "UTC"})
    except OSError:
        return None
    return found.stdout.strip() or None


def is_gone(holder: dict, file: Path) -> bool:
    """Whether the holder of a lock has ended; where nobody here can know that, whether it was silent for too long."""
    ended = has_ended(holder)
    return now(file.parent) - time_of(file) > LOST if ended is None else ended


def has_ended(holder: dict) -> bool | None:
    """Whether a process that held a lock has ended; None where this computer cannot tell, but signs of life do."""
    own = identity()
    if (holder["host"], holder["namespace"]) != (own["host"], own["namespace"]):
        requeued = holder["job"] is not None and holder["job"] == own["job"] and holder["restart"] != own["restart"]
        return True if requeued else None
    if os.name == "nt":  # there, what asks for a process here would end it
        return None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, another user's
        pass
    start = start_of(holder["pid"])
    return None not in (start, holder["start"]) and start != holder["start"]


def created(file: Path, text: str) -> bool:
    """Writes a new file; False where it is there already."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        file.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error  # the system names no file
    finally:
        os.close(descriptor)
    return True


def content(file: Path) -> str | None:
    """Text of a lock file; None where it is gone."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def parsed(noted: str) -> dict | None:
    """What a holder has noted of itself; None where that is cut off, so by a holder that was killed."""
    try:
        holder = json.loads(noted)
    except ValueError:
        return None
    keys = {"host", "namespace", "pid", "start", "job", "restart", "since", "doing"}
    return holder if isinstance(holder, dict) and keys <= holder.keys() and isinstance(holder["pid"], int) else None


def remove(file: Path, noted: str) -> None:
    """Removes a lock with this text, and no other one: another run may have taken it over since it was read."""
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        os.rename(file, aside)  # of several runs, one succeeds
    except FileNotFoundError:
        return
    if content(aside) == noted:
        aside.unlink()
    else:
        os.rename(aside, file)


def show_life(file: Path, ended: threading.Event) -> None:
    """Renews the file's time of change until `ended` is set, or until the file is gone."""
    while not ended.wait(HEARTBEAT):
        try:
            os.utime(file)
        except FileNotFoundError:  # removed by hand; what holds it goes on
            return
        except OSError:  # a network drive that is away for a moment
            continue
