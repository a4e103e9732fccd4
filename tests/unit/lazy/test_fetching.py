"""Pools with priorities, circuit breakers, the memory for spans without a place, the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from clipshim.errors import RegistryError
from clipshim.lazy import fetching
from clipshim.lazy.fetching import (
    AHEAD,
    DEMAND,
    OPEN_AFTER,
    PREFETCH,
    Breaker,
    Fetching,
    LimitedLog,
    PriorityPool,
    RecentSpans,
    Ticket,
)
from clipshim.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable


def run_with_clock(main: Callable[[], object]) -> None:
    """Waiting takes no time."""
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))  # type: ignore[arg-type]


def test_demand_overtakes_what_is_fetched_ahead() -> None:
    order: list[str] = []

    async def main() -> None:
        pool = PriorityPool(1)

        async def work(name: str, priority: int) -> None:
            async with pool.taken(1, Ticket(priority)):
                order.append(name)

        async with trio.open_nursery() as nursery, pool.taken(1, Ticket(DEMAND)):
            for name, priority in [("p", PREFETCH), ("a", AHEAD), ("d1", DEMAND), ("d2", DEMAND)]:
                nursery.start_soon(work, name, priority)
                await trio.testing.wait_all_tasks_blocked()
        assert pool.free == 1

    trio.run(main)
    assert order == ["d1", "d2", "a", "p"]


def test_a_ticket_may_rise_while_it_waits() -> None:
    order: list[str] = []

    async def main() -> None:
        pool = PriorityPool(1)
        rising = Ticket(PREFETCH)

        async def work(name: str, ticket: Ticket) -> None:
            async with pool.taken(1, ticket):
                order.append(name)

        async with trio.open_nursery() as nursery, pool.taken(1, Ticket(DEMAND)):
            nursery.start_soon(work, "ahead", Ticket(AHEAD))
            nursery.start_soon(work, "rising", rising)
            await trio.testing.wait_all_tasks_blocked()
            rising.priority = DEMAND
            pool.grant()

    trio.run(main)
    assert order == ["rising", "ahead"]


def test_something_is_kept_for_demand() -> None:
    async def main() -> None:
        pool = PriorityPool(2, kept=1)
        entered = []

        async def ahead() -> None:
            async with pool.taken(1, Ticket(AHEAD)):
                entered.append(1)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ahead)
            nursery.start_soon(ahead)
            await trio.testing.wait_all_tasks_blocked()
            assert len(entered) == 1
            async with pool.taken(1, Ticket(DEMAND)):
                assert pool.free == 0
            nursery.cancel_scope.cancel()
        assert pool.free == 2

    trio.run(main)


def test_more_than_there_is_means_all_and_cancelled_waiters_leave_nothing() -> None:
    async def main() -> None:
        pool = PriorityPool(10)
        async with pool.taken(1000, Ticket(DEMAND)):
            assert pool.free == 0
            with trio.CancelScope() as scope:
                scope.cancel()
                async with pool.taken(1, Ticket(DEMAND)):
                    pytest.fail("there was none left")
        assert pool.free == 10

    trio.run(main)


def test_a_breaker_opens_lets_one_try_and_closes() -> None:
    async def main() -> None:
        breaker = Breaker("registry.test")
        for _ in range(OPEN_AFTER):
            assert breaker.try_turn()
            breaker.failed("connection refused")
        assert breaker.is_open
        assert not breaker.try_turn()
        deadline = trio.current_time() + 60
        await breaker.wait_change(deadline)
        assert breaker.try_turn()
        assert not breaker.try_turn()
        breaker.failed("connection refused")
        before = trio.current_time()
        await breaker.wait_change(deadline)
        assert trio.current_time() - before > 0.4  # the pause has grown
        assert breaker.try_turn()
        breaker.succeeded()
        assert not breaker.is_open
        assert breaker.try_turn()

    run_with_clock(main)


def test_waiting_for_a_breaker_ends_at_the_deadline_with_the_cause() -> None:
    async def main() -> None:
        breaker = Breaker("registry.test")
        for _ in range(OPEN_AFTER):
            breaker.failed("connection refused")
        deadline = trio.current_time() + 0.1
        with pytest.raises(RegistryError, match=r"registry\.test.*connection refused"):
            await breaker.wait_change(deadline)

    run_with_clock(main)


def test_an_abandoned_probe_does_not_block_the_next() -> None:
    async def main() -> None:
        breaker = Breaker("registry.test")
        for _ in range(OPEN_AFTER):
            breaker.failed("no route")
        await breaker.wait_change(trio.current_time() + 60)
        assert breaker.try_turn()
        breaker.abandoned()
        assert breaker.try_turn()

    run_with_clock(main)


def test_recent_spans_are_bounded_and_the_oldest_go() -> None:
    recent = RecentSpans(10)
    recent.put("a", 1, b"12345")
    recent.put("a", 2, b"12345")
    assert recent.get("a", 1) == b"12345"
    recent.put("b", 1, b"123")
    assert recent.get("a", 2) is None
    assert recent.get("a", 1) == b"12345"
    recent.put("c", 0, bytes(11))
    assert recent.get("c", 0) is None
    recent.put("b", 1, b"1")
    assert recent.get("b", 1) == b"1"
    recent.clear()
    assert recent.get("b", 1) is None


def test_the_log_is_not_flooded_and_counts_what_it_held_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("clipshim.lazy.fetching.time.monotonic", lambda: now)
    limited = LimitedLog()
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            limited.error(("layer", "cause"), "dead")
        limited.error(("layer", "other"), "odd")
        now += 11
        limited.error(("layer", "cause"), "dead")
    assert [record.message for record in caplog.records] == [
        "dead",
        "odd",
        "dead (and 4 times before)",
    ]


def test_registries_that_nobody_asks_any_more_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "MAX_SERVICES", 5)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            shared = Fetching(nursery, Settings({}))
            dead, busy = shared.service("dead.test"), shared.service("busy.test")
            for _ in range(fetching.OPEN_AFTER):
                dead.breaker.failed("refused")
            async with busy.slots.taken(1, Ticket(DEMAND)):
                for number in range(50):
                    shared.service(f"r{number}.test")
                assert shared.service("dead.test") is dead
                assert shared.service("busy.test") is busy
            assert shared.open_breakers() == {"dead.test": "refused"}
            assert len(shared._services) <= 5

    trio.run(main)
