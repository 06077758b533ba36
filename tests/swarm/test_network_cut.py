"""The network between two halves of the nodes is cut and healed, with real packets: Linux network namespaces.

    half "left":  a, b ----- coordinator, checkpoint worker, auditors ----- half "right": c, d
             +----------------- a cable that can be cut -----------------+

Everybody reaches the coordinator at all times. A cut drops packets without a word, as networks do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.alone, pytest.mark.timeout(900)]

Start = Callable[..., Any]

HALVES = {"left": f"198.18.{os.getpid() % 250}", "right": f"198.19.{os.getpid() % 250}"}
"""Networks that nobody has in the wild (RFC 2544); the last number is 1 at the coordinator and 2 in the half."""


class Halves:
    """Two namespaces, each with a cable to this one and both on one bridge, in a third."""

    def __init__(self) -> None:
        self._names = {name: f"swarm-{os.getpid()}-{name}" for name in (*HALVES, "middle")}
        for name in self._names:
            ip("netns", "add", self[name])
        ip("-n", self["middle"], "link", "add", "bridge", "type", "bridge")
        ip("-n", self["middle"], "link", "set", "bridge", "up")
        for name, network in HALVES.items():
            here = self._here(name)
            ip("link", "add", here, "type", "veth", "peer", "name", "home", "netns", self[name])
            ip("addr", "add", f"{network}.1/24", "dev", here)
            ip("link", "set", here, "up")
            ip("-n", self[name], "addr", "add", f"{network}.2/24", "dev", "home")
            ip("-n", self[name], "link", "add", "cable", "type", "veth", "peer", "name", name, "netns", self["middle"])
            for device in ("lo", "home", "cable"):
                ip("-n", self[name], "link", "set", device, "up")
            ip("-n", self["middle"], "link", "set", name, "up")
            # The checkpoint worker says that it is at this machine's own address, whatever that is.
            ip("-n", self[name], "route", "add", "default", "via", f"{network}.1")
        for name, other in (("left", "right"), ("right", "left")):
            ip("-n", self[name], "route", "add", f"{HALVES[other]}.2/32", "dev", "cable")
        self.heal()

    def __getitem__(self, name: str) -> str:
        """The name of a half's namespace."""
        return self._names[name]

    def heal(self) -> None:
        for name in HALVES:
            ip("-n", self["middle"], "link", "set", name, "master", "bridge")

    def cut(self) -> None:
        for name in HALVES:
            ip("-n", self["middle"], "link", "set", name, "nomaster")

    def remove(self) -> None:
        # A namespace lives on while a process is in it: the cables to this one go by themselves.
        for command in [
            *(("link", "del", self._here(name)) for name in HALVES),
            *(("netns", "del", self[n]) for n in self._names),
        ]:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(*command)

    def _here(self, name: str) -> str:
        """This machine's end of the cable to a half."""
        return f"sw{os.getpid()}{name[0]}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def halves() -> Iterator[Halves]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("network namespaces need the command ip (iproute2), which CI installs")
    try:
        made = Halves()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.remove()


def test_a_round_across_a_cut_network_seals_and_after_healing_rounds_are_whole(
    halves: Halves, start_run: Start
) -> None:
    run = start_run(
        rounds=4, min_nodes=4, max_nodes=4, parts=8, assemble_s=60.0, train_s=60.0, exchange_s=20.0, evidence_s=5.0
    )
    run.serve("0.0.0.0")
    for name, half in {"a": "left", "b": "left", "c": "right", "d": "right"}.items():
        address = HALVES[half]
        run.join(name, "--listen", f"{address}.2", namespace=halves[half], host=f"{address}.1")
    run.reaches(1, "training", timeout_s=300)
    halves.cut()
    run.reaches(2, timeout_s=200)
    halves.heal()
    status = run.ends(timeout_s=400)
    assert run.roots("a", "b", "c", "d") == {status["checkpoint"]["root"]}
    assert not status["rejected"]
    assert [entry["missing_parts"] for entry in status["history"]] == [0] * 4

    whole, cut, *healed = (run.round(number) for number in range(4))
    assert all(len(slots) == 4 for slots in whole["parts"])
    # Who committed and is missing is written per part: nobody's average can have both halves in it.
    left, right = ({cut["slots"][name] for name in names} for names in ("ab", "cd"))
    assert all(set(slots) in (left, right) for slots in cut["parts"])
    assert all(len(slots) == 4 for slots in healed[-1]["parts"])
