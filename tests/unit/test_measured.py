"""What a node says of its exchange: latencies, counts, and bytes by plane and by peer."""

from __future__ import annotations

import contextlib
import json

import pytest

from swarm_node import measured
from swarm_node.measured import Measured
from swarm_protocol.calls import Traffic
from swarm_protocol.identity import peer_id

ALICE, BOB = bytes([1]) * 32, bytes([2]) * 32


def test_bytes_are_counted_by_plane_and_by_peer() -> None:
    traffic, control = Traffic(), Traffic(sent=5, received=6)
    traffic.note(ALICE, "daemon", sent=1)
    traffic.note(ALICE, "direct", sent=10, received=20)
    traffic.note(BOB, "direct", sent=100)
    said = json.loads(json.dumps(Measured().describe(traffic, control)))
    assert said["bytes"] == {
        "daemon": {"sent": 1, "received": 0},
        "direct": {"sent": 110, "received": 20},
        "control": {"sent": 5, "received": 6},
    }
    assert said["bytes_by_peer"] == {
        peer_id(ALICE): {"daemon": {"sent": 1, "received": 0}, "direct": {"sent": 10, "received": 20}},
        peer_id(BOB): {"direct": {"sent": 100, "received": 0}},
    }


def test_an_upload_is_measured_while_any_part_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(measured.time, "monotonic", lambda: now[0])
    found = Measured()
    assert found.upload_bytes_per_s == 0
    with found.uploading(100):
        now[0] = 11.0
        with found.uploading(300):
            now[0] = 14.0
    now[0] = 100.0
    assert found.upload_bytes_per_s == 100
    assert (found.delivery.count, found.delivery.longest_s) == (2, 4.0)
    with contextlib.suppress(ConnectionError), found.uploading(1000):
        now[0] = 104.0
        raise ConnectionError
    assert found.upload_bytes_per_s == 50
    assert found.delivery.count == 2
