"""Files and folders that are either whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target`, on disk, when the block ends well, and is gone when it does not.

    Where the process was killed meanwhile, the next one that makes `target` removes what it left beside it.

    Raises:
        ConfigurationError: `target` is there already and not an empty folder, or it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"{target} exists and is not empty; choose another folder")
    where = target.absolute()
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        for path in where.parent.glob(f".{glob.escape(where.name)}.*.tmp"):
            with contextlib.suppress(OSError), _locked(path):
                shutil.rmtree(path)
        building = Path(tempfile.mkdtemp(prefix=f".{where.name}.", suffix=".tmp", dir=where.parent))
    except OSError as error:
        raise ConfigurationError(f"{where.parent} cannot be written: {error.strerror}") from error
    try:
        building.chmod(0o755)
        with _locked(building):
            yield building
            for path in [*building.rglob("*"), building]:
                _sync(path)
            building.rename(where)
        _sync(where.parent)
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be written: {error.strerror}. Free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A folder that nobody else is filling. Raises `OSError` where somebody is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
