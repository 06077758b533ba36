"""Children of the coordinator: started again when they crash, gone when it is done with them."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from swarm_coordinator import supervisor

PATIENCE_S = 20.0


def written(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


async def lines(path: Path, count: int) -> list[str]:
    """The first lines of a file, once they are there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await asyncio.to_thread(written, path)
            if len(found) >= count:
                return found
            await asyncio.sleep(0.02)


async def cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_child_that_crashes_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    script = f"import os; open({str(tmp_path / 'starts')!r}, 'a').write(f'{{os.getpid()}}\\n'); raise SystemExit(3)"

    async def run() -> None:
        task = asyncio.create_task(supervisor.supervise("worker", [sys.executable, "-c", script]))
        assert len(set(await lines(tmp_path / "starts", 3))) >= 3
        await cancel(task)

    asyncio.run(run())


def test_a_child_that_ignores_being_asked_is_gone_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 0.1)
    script = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
    )

    async def run() -> None:
        task = asyncio.create_task(supervisor.supervise("worker", [sys.executable, "-c", script]))
        (pid,) = await lines(tmp_path / "pid", 1)
        await cancel(task)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)

    asyncio.run(run())


def test_a_child_that_has_done_its_work_is_not_started_again(tmp_path: Path) -> None:
    script = f"open({str(tmp_path / 'starts')!r}, 'a').write('once\\n')"
    asyncio.run(supervisor.supervise("export", [sys.executable, "-c", script], once=True))
    assert written(tmp_path / "starts") == ["once"]


def test_all_children_can_be_ended_at_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
    )

    async def run() -> None:
        task = asyncio.create_task(supervisor.supervise("worker", [sys.executable, "-c", script], once=True))
        await lines(tmp_path / "pid", 1)
        supervisor.kill_all()
        (process,) = supervisor._running
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == -9
        await cancel(task)

    asyncio.run(run())
