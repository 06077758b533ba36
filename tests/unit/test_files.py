"""A file or a folder is whole or not there."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swarm_protocol.errors import ConfigurationError
from swarm_protocol.files import new_folder, newest, remove_leftovers, write_atomic


def test_the_buffers_are_written_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file"
    write_atomic(path, b"one", bytearray(b"two"), memoryview(b"three"), np.array([1.0], "<f4"))
    assert path.read_bytes() == b"onetwothree" + np.float32(1.0).tobytes()
    write_atomic(path)
    assert path.read_bytes() == b""


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"long content", b"short"):
        write_atomic(path, content, durable=False)
        assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_the_one_asked_for(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o022)
    try:
        write_atomic(tmp_path / "file", b"", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_durable_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    write_atomic(path, b"content", durable=False)
    assert synced == []
    path.unlink()
    write_atomic(path, b"content")
    assert synced == [False, True], "the file, then the folder that has its name"


def test_a_write_that_fails_leaves_the_old_content_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match=r"No space left on device\. Free some space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path):
        with pytest.raises(ConfigurationError, match=f"{path} cannot be written"):
            write_atomic(path, b"content")


REWRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from swarm_protocol.files import write_atomic
path = Path(sys.argv[1])
for number in itertools.count():
    write_atomic(path, *[bytes([number % 251])] * 5000, durable=False)
    if number == 3:
        print("going", flush=True)
"""


def test_a_kill_leaves_the_file_whole_and_scraps_that_the_next_start_removes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", REWRITE_FOR_EVER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert content == content[:1] * 5000
    (tmp_path / ".file.123.tmp").touch()
    remove_leftovers(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ([], []),
        (["round-2", "round-10", "round-0"], [10, 2, 0]),
        (["round-", "round-x", "round--1", "around-1", "round-1.tmp", "3"], []),
    ],
)
def test_numbered_names_come_newest_first(names: list[Any], numbers: list[int]) -> None:
    assert newest(names, "round-") == numbers


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with new_folder(target) as building:
        (building / "inner").mkdir()
        (building / "inner" / "file").write_bytes(b"content")
        assert not target.exists()
    assert (target / "inner" / "file").read_bytes() == b"content"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    with pytest.raises(ConfigurationError, match="not empty"), new_folder(target):
        pass


def test_nothing_is_left_of_a_folder_that_is_broken_off(tmp_path: Path) -> None:
    def break_off() -> None:
        with new_folder(tmp_path / "folder") as building:
            (building / "file").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(ConfigurationError, match="No space left"):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_the_next_time_and_what_another_one_fills_stays(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from swarm_protocol.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as building:\n"
        "    (building / 'file').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path / "folder")], timeout=60)
    assert died.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".folder.")
    late = pytest.raises(ConfigurationError, match="not empty")
    with late, new_folder(tmp_path / "folder") as one, new_folder(tmp_path / "folder") as other:
        assert one.is_dir()
        assert other.is_dir()
        assert not left.exists()
        (other / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
