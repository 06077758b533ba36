"""A download on disk that a crash at any point does not undo, and its twin in memory.

The file has its full size from the start, so that a disk that is too small says so before anything is fetched. There is no
second file that says which chunks are there: whoever opens it again hashes them all. It gets its name when it is whole and
on disk.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, content_hash
from swarm_protocol.errors import ConfigurationError, HashMismatchError
from swarm_protocol.files import sync_directory

Flags = npt.NDArray[np.bool_]


class Sink(Protocol):
    """Where verified chunks go. `have` says which are there."""

    manifest: StateManifest
    have: Flags

    def write(self, index: int, data: memoryview) -> None:
        """Keep a chunk that was verified. Blocking; several threads may write at once, each another chunk."""


class InMemory:
    """A download without a file."""

    def __init__(self, manifest: StateManifest) -> None:
        self.manifest = manifest
        self.have = np.zeros(len(manifest.hashes), np.bool_)
        self.data = bytearray(manifest.size_bytes)

    def write(self, index: int, data: memoryview) -> None:
        start = index * CHUNK_BYTES
        self.data[start : start + len(data)] = data
        self.have[index] = True


class Partial:
    """A download in the file `path`. Everything here blocks."""

    def __init__(self, manifest: StateManifest, path: Path) -> None:
        """Open the file, or make it; what is there already and right is kept, whatever the file was.

        Raises:
            ConfigurationError: there is not enough room, with what is missing; or the folder may not be written.
        """
        self.manifest = manifest
        self.path = path
        self.have = np.zeros(len(manifest.hashes), np.bool_)
        self._lock = threading.Lock()  # a descriptor that is closed may soon be another file's
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                old_bytes = self._claim_room()
                self.data = mapped(self._descriptor)
                self._verify(old_bytes)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, index: int, data: memoryview) -> None:
        with self._lock:
            if self._descriptor < 0:
                return
            try:
                _write_all(self._descriptor, data, index * CHUNK_BYTES)
            except OSError as error:
                raise self._unwritable(error) from error
            self.have[index] = True

    def view(self, first: int, count: int) -> memoryview:
        """The bytes of these chunks, in the file, as they are now."""
        return self.data[first * CHUNK_BYTES : (first + count) * CHUNK_BYTES]

    def finish(self, path: Path) -> None:
        """Have the whole state on disk under its final name.

        Raises:
            ConfigurationError: the disk does not take it.
        """
        if not self.have.all():
            raise ValueError("a download that is not whole has no final name")
        try:
            os.fsync(self._descriptor)
            self.path.replace(path)
            sync_directory(path.parent)
        except OSError as error:
            raise self._unwritable(error) from error
        self.path = path

    def close(self) -> None:
        """Let go of the file, which stays; `data` stays as well."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _claim_room(self) -> int:
        """Give the file its size, with blocks on disk for all of it; returns the size that it had."""
        size = self.manifest.size_bytes
        status = os.fstat(self._descriptor)
        missing = size - status.st_blocks * 512 - shutil.disk_usage(self.path.parent).free
        if missing > 0:
            raise ConfigurationError(
                f"{missing / 1e6:.0f} MB are missing on the disk of {self.path.parent} for {size / 1e6:.0f} MB of checkpoint;"
                " make room, or choose another disk with --data-dir"
            )
        if status.st_size > size:
            os.ftruncate(self._descriptor, size)
        if size:
            os.posix_fallocate(self._descriptor, 0, size)
        return status.st_size

    def _verify(self, old_bytes: int) -> None:
        """Find out which chunks are there."""
        zeros: dict[int, bytes] = {}
        for index, digest in enumerate(self.manifest.hashes):
            size = self.manifest.chunk_size(index)
            if index * CHUNK_BYTES >= old_bytes:  # nobody wrote there yet: zeros
                if size not in zeros:
                    zeros[size] = content_hash(bytes(size))
                self.have[index] = zeros[size] == digest
                continue
            with contextlib.suppress(HashMismatchError):
                self.manifest.verify_chunk(index, self.view(index, 1))
                self.have[index] = True

    def _unwritable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"{self.path} cannot be written: {error.strerror}. Free some space, or choose another disk with --data-dir;"
            " what was downloaded is kept"
        )


def mapped(descriptor: int) -> memoryview:
    """A file's bytes, mapped into memory, read-only; they stay when the file is closed or deleted.

    Raises:
        OSError
    """
    size = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)) if size else memoryview(b"")


def _write_all(descriptor: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
