"""A PostgreSQL server for tests: the system's own, in a temporary folder, on a Unix socket, gone with the session."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest


def programs() -> Path | None:
    """The folder of initdb and pg_ctl, if PostgreSQL is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found += [Path(folder) for folder in os.environ.get("PATH", "").split(":") if folder]
    return next((folder for folder in found if (folder / "initdb").exists()), None)


class Postgres:
    """A running server; `database()` is the URL of a new, empty database on it."""

    def __init__(self, bin: Path, socket: Path, prefix: list[str]) -> None:
        self._bin = bin
        self._socket = socket
        self._prefix = prefix

    def database(self) -> str:
        name = f"test_{uuid4().hex}"
        self.run("createdb", "-h", str(self._socket), "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self._socket}"

    def run(self, program: str, *arguments: str) -> None:
        command = [*self._prefix, str(self._bin / program), *arguments]
        # The server holds what it inherits open, so that a pipe would never end.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(command, stdout=output, stderr=output, cwd="/", timeout=60)
            output.seek(0)
            assert done.returncode == 0, output.read().decode()


@contextmanager
def server() -> Iterator[Postgres]:
    """Start a server and stop it. Skips where PostgreSQL is not installed."""
    bin = programs()
    if bin is None:
        assert not os.environ.get("CI"), "PostgreSQL is not installed: apt-get install postgresql"
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="swarm-pg-"))
    try:
        prefix: list[str] = []
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(folder, "postgres")
            prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        postgres = Postgres(bin, folder, prefix)
        data = folder / "data"
        postgres.run("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
        settings = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off -c max_connections=200"
        postgres.run("pg_ctl", "-D", str(data), "-w", "-t", "30", "-l", str(folder / "log"), "-o", settings, "start")
        try:
            yield postgres
        finally:
            postgres.run("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
