"""Bytes leave no faster than the limit, and what is urgent first."""

from __future__ import annotations

import asyncio
import random

import pytest

from swarm_protocol.throttle import TokenBucket


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_after_a_pause_a_burst_goes_at_once_and_the_rest_at_the_rate(clock: Clock) -> None:
    bucket = TokenBucket(100.0, 50, clock=clock)
    assert [bucket.reserve(25) for _ in range(5)] == pytest.approx([0.0, 0.0, 0.0, 0.25, 0.5])
    clock.now = 100.0
    assert [bucket.reserve(25) for _ in range(4)] == pytest.approx([0.0, 0.0, 0.0, 0.25]), (
        "no more than one burst is saved"
    )


def test_a_message_goes_whole_and_the_next_one_pays_for_it(clock: Clock) -> None:
    bucket = TokenBucket(100.0, 0, clock=clock)
    assert bucket.reserve(1000) == 0.0
    assert bucket.reserve(1) == pytest.approx(10.0)


def test_what_is_urgent_does_not_wait_for_what_is_not(clock: Clock) -> None:
    bucket = TokenBucket(100.0, 0, clock=clock)
    bucket.reserve(1000, urgent=False)
    assert bucket.reserve(500) == 0.0
    assert bucket.reserve(500) == pytest.approx(5.0)
    assert bucket.backlog_s() == pytest.approx(20.0)
    assert bucket.reserve(1, urgent=False) == pytest.approx(20.0), "and what is not waits for everything"


@pytest.mark.parametrize("urgent_share", [0.0, 0.3, 1.0])
def test_over_any_time_no_more_than_the_limit_goes(clock: Clock, urgent_share: float) -> None:
    rate, burst, largest = 1000.0, 300, 200
    rng, bucket = random.Random(7), TokenBucket(rate, burst, clock=clock)
    sent: list[tuple[float, int]] = []
    for _ in range(2000):
        if bucket.backlog_s() > 1.0 or rng.random() < 0.2:
            clock.now += rng.expovariate(5.0)
        size = rng.randrange(1, largest)
        sent.append((clock.now + bucket.reserve(size, urgent=rng.random() < urgent_share), size))
    sent.sort()
    # What was promised to others before urgent bytes came goes as well: one second of backlog at most here.
    promised = 0.0 if urgent_share in (0.0, 1.0) else rate + largest
    for start in range(0, len(sent), 97):
        total = 0
        for at, size in sent[start:]:
            total += size
            assert total <= rate * (at - sent[start][0]) + burst + largest + promised + 1e-6


def test_waiting_takes_as_long_as_the_rate_says() -> None:
    async def take() -> float:
        loop = asyncio.get_running_loop()
        bucket, start = TokenBucket(10_000.0, 0), loop.time()
        await asyncio.gather(*(bucket.wait(100, urgent=False) for _ in range(6)))
        return loop.time() - start

    assert asyncio.run(take()) >= 0.05


def test_no_rate_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        TokenBucket(0.0)
