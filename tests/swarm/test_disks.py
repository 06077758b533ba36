"""Disks that are damaged, or full: a volunteer ends at the right root, or with an error that says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.swarm.conftest import Run

pytestmark = pytest.mark.swarm

DISK_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        assert not os.environ.get("CI"), "mounting a file system takes root"
        pytest.skip("mounting a file system takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_truncated_checkpoint_is_repaired_and_a_disk_that_is_too_small_is_said(
    start_run: Callable[..., Run], small_disk: Path
) -> None:
    run = start_run(rounds=4, min_nodes=1, max_nodes=2)
    run.serve()
    first = run.join("damaged")
    run.reaches(2)
    first.signal(signal.SIGKILL)
    first.wait(10)
    folder = next((run.folder / "damaged" / "runs").iterdir())
    for path in folder.glob("checkpoint-*"):
        os.truncate(path, path.stat().st_size // 2)

    cramped = run.join("cramped", "--data-dir", str(small_disk / "data"))
    assert cramped.wait(60) == 2
    assert "--data-dir" in cramped.last_lines(1)

    run.join("damaged")
    final = run.ends()
    assert run.roots("damaged") == {final["checkpoint"]["root"]}
