"""A disk that is full: blosc2 and others say that something went wrong, but not what."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK = bytes(2**20)


class FullDisk(OSError):
    """A folder has no room, in words."""


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk, a quota or the size of a file is at its limit: no other case need be tried."""
    return isinstance(error, FullDisk) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def say_full_disk(folder: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Whatever fails in the block because `folder` has no room fails with a sentence that says so.

    Whether there is room is tried, with as many bytes as are needed: a quota is not in what the disk has free.

    Args:
        folder: that the block writes to.
        needed: gives the bytes that it writes at most; is called when it has failed.

    Raises:
        FullDisk: the block has failed, and the bytes cannot be written.
    """
    try:
        yield
    except Exception as error:  # of whatever kind: libraries in C have their own
        size = needed()
        reason = why_not_written(folder, size)
        if reason is None:
            raise
        free = shutil.disk_usage(folder).free
        raise FullDisk(
            f"{folder} has no room ({reason}): {in_units(free)} are free on its disk, up to {in_units(size)} are "
            f"needed for this case alone. Make room, or raise your quota, and run the same command again: finished "
            f"cases are kept."
        ) from error


def why_not_written(folder: Path, size: int) -> str | None:
    """What the system says to a new file of `size` bytes in a folder; None where it can be written. It is removed."""
    file = folder / f".room.{os.getpid()}.tmp"
    try:
        with file.open("wb") as stream:
            for begin in range(0, size, len(BLOCK)):
                stream.write(BLOCK[: size - begin])
            stream.flush()
            os.fsync(stream.fileno())  # on a network file system, only now does the server say
    except OSError as error:
        return error.strerror
    finally:
        file.unlink(missing_ok=True)
    return None


def in_units(size: int) -> str:
    """A number of bytes for people, as 1.5 GB."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
