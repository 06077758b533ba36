"""The commands answer at once: what is slow to import is imported when it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swarm_protocol import PROTOCOL_VERSION, __version__
from swarm_protocol.identity import Identity

SLOW = ("torch", "hivemind", "libp2p")


def run(*arguments: str) -> str:
    answer = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize(
    "module",
    [
        "swarm_node.cli",
        "swarm_coordinator.cli",
        "swarm_protocol",
        "swarm_protocol.records",
        "swarm_protocol.log",
        "swarm_protocol.spec",
        "swarm_protocol.signing",
        "swarm_protocol.client",
        "swarm_node.joining",
        "swarm_node.cheats",
        "swarm_protocol.tolerances",
        "swarm_protocol.history",
        "swarm_node.verifying_draws",
        "swarm_node.observing",
        "swarm_protocol.gossip.supervisor",
    ],
)
def test_importing_it_loads_nothing_slow(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({set(SLOW)!r} & set(sys.modules)))"
    assert run("-c", script).split() == []


@pytest.mark.parametrize("package", ["swarm_node", "swarm_coordinator"])
def test_help_is_there_and_loads_nothing_slow(package: str) -> None:
    script = (
        "import atexit, sys; atexit.register(lambda: print('SLOW', *sorted("
        f"{set(SLOW)!r} & set(sys.modules)))); from {package}.cli import main; sys.argv[1:] = ['--help']; main()"
    )
    shown = run("-c", script)
    assert "Usage" in shown
    assert shown.split("SLOW")[1].split() == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("swarm_node", "--help"), ("join", "demo", "export", "sample", "version")),
        (("swarm_node", "join", "--help"), ("--data-dir", "--name", "--token", "--trust", "--device")),
        (("swarm_node", "observe", "--help"), ("--json", "--rounds", "--run", "--listen")),
        (("swarm_node", "demo", "--help"), ("--nodes", "--rounds", "--cheaters", "--corpus", "--json")),
        (("swarm_coordinator", "--help"), ("init", "serve", "calibrate")),
        (("swarm_node", "export", "--help"), ("--format", "--round", "--shard-size", "--merged")),
        (("swarm_node", "sample", "--help"), ("--prompt", "--temperature", "--top-p", "--seed", "--json")),
        (("swarm_coordinator", "init", "--help"), ("--corpus", "--spec", "--tolerances", "--from-hf", "--parent")),
        (("swarm_coordinator", "calibrate", "--help"), ("--out", "--quick")),
        (("swarm_coordinator", "serve", "--help"), ("--host", "--port")),
    ],
    ids=" ".join,
)
def test_help_names_the_commands_and_options(command: tuple[str, ...], words: tuple[str, ...]) -> None:
    shown = run("-m", *command)
    assert [word for word in words if word not in shown] == []


def test_help_does_not_show_how_to_cheat() -> None:
    assert "--cheat " not in run("-m", "swarm_node", "join", "--help")


def test_the_version_names_software_and_protocol() -> None:
    assert run("-m", "swarm_node", "version").strip() == f"swarm-node {__version__}, protocol {PROTOCOL_VERSION}"


def test_a_mistake_is_one_sentence_and_an_exit_code(tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "identity")
    (tmp_path / "identity").chmod(0o644)
    answer = subprocess.run(
        [sys.executable, "-m", "swarm_node", "join", "http://127.0.0.1:1", "--data-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("swarm-node: the identity file ")
    assert f"chmod 600 {tmp_path}" in answer.stderr
    assert "Traceback" not in answer.stderr
