"""A download on disk: it survives a crash at any point, says in time that there is no room, and repairs what is damaged."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from swarm_protocol.chunks import CHUNK_BYTES, manifest_of
from swarm_protocol.download import Download, Partial
from swarm_protocol.errors import ConfigurationError

from .conftest import Twin


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def fetch(state: bytes, path: Path) -> list[int]:
    """Download the state into `path`; returns the chunks that were fetched."""
    manifest, source = manifest_of(state), Twin(state)
    partial = asyncio.run(
        Download(
            manifest.root, manifest.size_bytes, [source], lambda found: Partial(found, path.with_suffix(".part"))
        ).run()
    )
    partial.finish(path)
    partial.close()
    assert path.read_bytes() == state
    return sorted(source.asked)


def test_a_download_that_is_whole_has_its_name_and_nothing_else_is_left(state: bytes, tmp_path: Path) -> None:
    assert fetch(state, tmp_path / "state") == list(range(11))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_only_what_is_not_there_yet_is_fetched(state: bytes, tmp_path: Path) -> None:
    manifest, path = manifest_of(state), tmp_path / "state.part"
    begun = Partial(manifest, path)
    for index in (2, 10):
        begun.write(index, memoryview(state)[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
    assert sorted(begun.have.nonzero()[0]) == [2, 10]
    begun.close()
    assert fetch(state, tmp_path / "state") == [index for index in range(11) if index not in (2, 10)]


@pytest.mark.parametrize("size", [0, 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7, 20 * CHUNK_BYTES])
def test_a_file_of_any_length_is_repaired(state: bytes, tmp_path: Path, size: int) -> None:
    (tmp_path / "state.part").write_bytes((state + bytes(20 * CHUNK_BYTES))[:size])
    assert fetch(state, tmp_path / "state") == list(range(min(11, size // CHUNK_BYTES), 11))


def test_damaged_chunks_are_fetched_again_and_no_others(state: bytes, tmp_path: Path) -> None:
    damaged = bytearray(state)
    damaged[0] ^= 1
    damaged[5 * CHUNK_BYTES + 17] ^= 0x80
    (tmp_path / "state.part").write_bytes(damaged)
    assert fetch(state, tmp_path / "state") == [0, 5]


def test_chunks_of_zeros_need_not_be_fetched(state: bytes, tmp_path: Path) -> None:
    half_zero = state[: 4 * CHUNK_BYTES] + bytes(3 * CHUNK_BYTES + 5)
    assert fetch(half_zero, tmp_path / "state") == [0, 1, 2, 3]


def test_what_is_there_can_be_read_while_the_rest_comes(state: bytes, tmp_path: Path) -> None:
    partial = Partial(manifest_of(state), tmp_path / "state.part")
    partial.write(3, memoryview(state)[3 * CHUNK_BYTES : 4 * CHUNK_BYTES])
    assert partial.view(3, 1) == state[3 * CHUNK_BYTES : 4 * CHUNK_BYTES]
    partial.close()
    partial.write(4, memoryview(state)[4 * CHUNK_BYTES : 5 * CHUNK_BYTES])
    assert not partial.have[4], "a thread that comes too late writes into no other file"
    assert partial.view(3, 1) == state[3 * CHUNK_BYTES : 4 * CHUNK_BYTES]


def test_a_download_that_is_not_whole_gets_no_name(state: bytes, tmp_path: Path) -> None:
    partial = Partial(manifest_of(state), tmp_path / "state.part")
    with pytest.raises(ValueError, match="not whole"):
        partial.finish(tmp_path / "state")
    partial.close()
    assert not (tmp_path / "state").exists()


def test_a_disk_without_room_says_how_much_is_missing(
    state: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 4_000_000))
    with pytest.raises(
        ConfigurationError, match=r"^7 MB are missing on the disk of .* for 11 MB of checkpoint; make room"
    ):
        Partial(manifest_of(state), tmp_path / "state.part")
    assert (tmp_path / "state.part").stat().st_size == 0


def test_what_is_there_already_needs_no_room(state: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.part").write_bytes(state[: 9 * CHUNK_BYTES])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 2 * CHUNK_BYTES))
    Partial(manifest_of(state), tmp_path / "state.part").close()


def test_a_disk_that_refuses_the_size_is_an_error_that_says_what_to_do(state: bytes, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * CHUNK_BYTES, hard))
    try:
        with pytest.raises(ConfigurationError, match=r"File too large\. Free some space, or choose another disk"):
            Partial(manifest_of(state), tmp_path / "state.part")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_file_is_on_disk_before_it_has_its_name_and_the_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, synced = b"some" * 1000, []
    partial = Partial(manifest_of(content), tmp_path / "state.part")
    partial.write(0, memoryview(content))
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (tmp_path / "state").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    partial.finish(tmp_path / "state")
    partial.close()
    assert synced == [(tmp_path / "state.part", False), (tmp_path, True)]


CRASH_EVERYWHERE = """
import asyncio, os, signal, sys
from pathlib import Path
import numpy as np
from swarm_protocol.chunks import CHUNK_BYTES, manifest_of
from swarm_protocol.download import Download, Partial
from swarm_protocol.download.sources import checked_manifest

state = np.random.default_rng(4).bytes(5 * CHUNK_BYTES + 99)
manifest = manifest_of(state)

class Source:
    key, name, reserve, max_calls, max_run = b"one", "one", False, 1, 1
    def __init__(self):
        self.asked = 0
    async def manifest(self, root, size):
        return manifest
    async def held(self, found):
        return None
    async def chunks(self, found, first, count):
        self.asked += 1
        return state[first * CHUNK_BYTES : (first + 1) * CHUNK_BYTES]

def fetch(folder):
    source = Source()
    download = Download(manifest.root, manifest.size_bytes, [source], lambda found: Partial(found, folder / "part"))
    partial = asyncio.run(download.run())
    partial.finish(folder / "state")
    return source.asked

def dying(folder, step):
    # kill -9 before the step-th call that changes the disk
    left = [step]
    def watched(call):
        def before(*arguments):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)
        return before
    for name in ("open", "posix_fallocate", "pwrite", "fsync"):
        setattr(os, name, watched(getattr(os, name)))
    Path.replace = watched(Path.replace)
    fetch(folder)

step, fetched = 0, []
while True:
    folder = Path(sys.argv[1]) / str(step)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        dying(folder, step)
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if (folder / "state").exists():
        assert (folder / "state").read_bytes() == state, step
    else:
        fetched.append(fetch(folder))
        assert (folder / "state").read_bytes() == state, step
    if not died:
        break
    step += 1
print(step, *fetched)
"""


def test_a_crash_at_any_point_loses_nothing_that_was_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASH_EVERYWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps, *fetched = map(int, done.stdout.split())
    assert steps > 10, "opening, claiming room, six chunks, fsync, rename, fsync of the folder"
    assert fetched == sorted(fetched, reverse=True)
    assert {0, 1, 2, 3, 4, 5, 6} == set(fetched), "each chunk that was written need not be fetched again"
