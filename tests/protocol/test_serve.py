"""Making a run and serving it, with the real command in real processes."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_coordinator.config import CoordinatorConfig
from swarm_coordinator.init import Options, initialise
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.server import Part, serve
from swarm_coordinator.store import Store
from swarm_protocol.chunks import StateManifest
from swarm_protocol.draw import chain_end
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.identity import Identity
from swarm_protocol.spec import RunConfig

COMMAND = [sys.executable, "-m", "swarm_coordinator"]
TOML = """
name = "tiny"
[model]
hidden_size = 8
intermediate_size = 8
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
max_position_embeddings = 8
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("All that is gold does not glitter.\n" * 400)
    return path


def test_a_new_run_is_sealed_with_everything_that_serving_it_takes(tmp_path: Path, corpus: Path) -> None:
    home = RunDirectory(tmp_path / "runs" / "tiny")
    config = RunConfig.from_toml(TOML)
    spec = initialise(Options(home.root, config, [corpus], token="sesame", auditors=3))
    assert home.spec() == spec
    assert spec.exchange.parts == 8
    assert Identity.load(home.coordinator_key).public_key.hex() == spec.coordinator
    assert chain_end(home.beacon_seed(), spec.rounds.count).hex() == spec.beacon
    assert home.token() == "sesame"
    assert len({Identity.load(path).public_key for path in [home.worker_key, *home.auditor_keys()]}) == 4
    assert all(path.stat().st_mode & 0o077 == 0 for path in (home.beacon_seed_file, home.token_file))
    store = Store(home.objects)
    manifest = StateManifest.decode(
        store.get_checkpoint(bytes.fromhex(spec.checkpoint)) or b"", max_size_bytes=8 * spec.model.num_parameters
    )
    assert all(store.exists(digest) for digest in [*manifest.hashes, bytes.fromhex(spec.data.root)])


def test_a_directory_in_use_is_left_alone(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        initialise(Options(tmp_path / "run", RunConfig.from_toml(TOML), [corpus]))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_run_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path, corpus: Path) -> None:
    corpus.write_text("short")
    with pytest.raises(ConfigurationError):
        initialise(Options(tmp_path / "run", RunConfig.from_toml(TOML), [corpus]))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_run_is_served_until_it_is_asked_to_stop_and_by_one_coordinator_only(make_cast: Callable[..., Any]) -> None:
    cast = make_cast()
    command = [*COMMAND, "serve", str(cast.home.root), "--no-workers", "--port"]
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = re.fullmatch(rf"serving run test {cast.run.hex()} at (http://127\.0\.0\.1:\d+)\n", line)
            assert url is not None
            with urllib.request.urlopen(f"{url[1]}/v1/runs", timeout=10) as response:
                assert json.load(response)[0]["run_id"] == cast.run.hex()
            second = subprocess.run([*command, "0"], capture_output=True, text=True, check=False, timeout=60)
            assert (second.returncode, "another coordinator" in second.stderr) == (2, True)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_port_in_use_is_said_clearly(make_cast: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*COMMAND, "serve", str(make_cast().home.root), "--no-workers", "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert f"port {port}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_run_that_several_processes_serve_needs_postgresql(make_cast: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"run: several processes need PostgreSQL; set database\.url"):
        asyncio.run(serve([make_cast().home.root], CoordinatorConfig(), Part(workers=False, one_of_several=True)))


def test_a_directory_without_a_run_is_said_clearly(tmp_path: Path) -> None:
    result = subprocess.run([*COMMAND, "serve", str(tmp_path)], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert "swarm-coordinator init" in result.stderr
