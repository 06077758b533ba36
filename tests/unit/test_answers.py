"""However many wait for an answer, the question is asked once; a failure is not an answer."""

from __future__ import annotations

import asyncio

import pytest

from swarm_coordinator.answers import Answers
from swarm_coordinator.topics import Event


class Archive:
    """Counts how often it is asked."""

    def __init__(self, *answers: bytes | Exception | None) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def __call__(self) -> bytes | None:
        self.asked += 1
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_many_who_ask_at_once_cost_one_question() -> None:
    async def script() -> None:
        answers, archive, event = Answers(), Archive(b"plan"), Event()
        assert set(await asyncio.gather(*(answers.ask("plan", event, archive) for _ in range(100)))) == {b"plan"}
        assert (archive.asked, answers.get("plan")) == (1, b"plan")

    asyncio.run(script())


def test_what_is_not_there_is_asked_for_again_after_the_next_event_alone() -> None:
    async def script() -> None:
        answers, archive, first = Answers(), Archive(None, b"plan"), Event()
        assert [await answers.ask("plan", first, archive) for _ in range(3)] == [None] * 3
        assert archive.asked == 1
        assert await answers.ask("plan", Event(), archive) == b"plan"

    asyncio.run(script())


def test_a_question_that_failed_is_asked_again() -> None:
    async def script() -> None:
        answers, archive, event = Answers(), Archive(OSError("away"), b"plan"), Event()
        with pytest.raises(OSError, match="away"):
            await answers.ask("plan", event, archive)
        assert await answers.ask("plan", event, archive) == b"plan"

    asyncio.run(script())
