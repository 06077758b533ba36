"""A node's data directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from swarm_node.folder import RunFolder
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.exact.segment import self_test_spec


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_run_whose_evidence_does_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path, self_test_spec())
    folder.require_room(1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10**6))
    with pytest.raises(ConfigurationError, match=r"0\.0 GB are free; make room"):
        folder.require_room(1 << 20)


def test_what_is_already_there_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, self_test_spec())
    (folder.work(0) / "state-0").write_bytes(bytes(20 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10**6))
    folder.require_room(1 << 20)
