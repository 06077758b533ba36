"""Fixtures that every test may use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

_GOLDEN = Path(__file__).parent / "fixtures" / "golden"

# Examples run beside other work on small machines, where a deadline per example says nothing about the code.
settings.register_profile("swarm", deadline=None)
settings.load_profile("swarm")


@pytest.fixture
def golden() -> Callable[[str, dict[str, object]], None]:
    """`golden(name, vectors)` asserts that `vectors` are those of fixtures/golden/<name>.json, and names any that differ.

    With SWARM_WRITE_GOLDEN=1 it merges them into the file instead, so that several tests may share one. A vector of the
    exact domain that changes is a new protocol version.
    """

    def check(name: str, vectors: dict[str, object]) -> None:
        found = json.loads(json.dumps(vectors))
        path = _GOLDEN / f"{name}.json"
        pinned = json.loads(path.read_text()) if path.exists() else {}
        if os.environ.get("SWARM_WRITE_GOLDEN") == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(pinned | found, indent=1, sort_keys=True) + "\n")
            return
        wrong = {key: value for key, value in found.items() if key not in pinned or pinned[key] != value}
        assert not wrong, f"{path.name}: these vectors changed (a new protocol version?) or were never pinned: {wrong}"

    return check
