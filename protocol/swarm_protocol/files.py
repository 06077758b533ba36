"""Files that are either whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swarm_protocol.errors import ConfigurationError


def write_atomic(path: Path, *buffers: Any, mode: int = 0o644, durable: bool = True) -> None:
    """Write the buffers one after another to `path`: a temporary file, rename; with fsync of both unless it need not last.

    Raises:
        ConfigurationError: the disk is full, or the folder may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            for buffer in buffers:
                file.write(buffer)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}. Free some space or choose another folder"
        ) from error


def sync_directory(folder: Path) -> None:
    """Have the names in a folder on disk. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a crash left behind."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def newest(names: Iterable[str], prefix: str) -> list[int]:
    """The numbers of the names `prefix` + number, in falling order."""
    numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)
