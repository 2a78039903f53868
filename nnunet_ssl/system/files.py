"""Writing files so that nothing on disk is ever lost or half-written, and reading those that others wrote."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` in one step, only when the block has succeeded.

    The folder of `path` must exist. When the block raises, the temporary file is removed and `path` stays as it was.
    """
    # not the process id: two containers that share a disk may have the same
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises: OSError; ValueError that names the file where its bytes are no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error}). Write it again.") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises: OSError; ValueError that names the file where it is empty, cut off or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut off or not JSON ({error}). Write it again, or restore a backup.") from error
