"""The thread that ends what socket timeouts do not."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, cast

from clipshim.registry import watchdog as module
from clipshim.registry.watchdog import Watchdog

if TYPE_CHECKING:
    import pytest

PATIENCE_S = 120.0


class Connection:
    """Something with a socket that is not open."""

    sock = None


def watch(dog: Watchdog, seconds: float) -> Any:
    return dog.watching(cast("Any", Connection()), seconds)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_what_takes_too_long_is_over_and_the_rest_is_not() -> None:
    dog = Watchdog()
    with watch(dog, 1000) as long, watch(dog, 0.05) as short, watch(dog, 0.02) as shorter:
        wait_until(lambda: short.over and shorter.over)
        assert not long.over
    with watch(dog, 0.05) as later:
        wait_until(lambda: later.over)
    with watch(dog, 1000) as left:
        pass
    assert not left.over


def test_its_thread_ends_when_there_is_nothing_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.02)
    dog = Watchdog()
    for _ in range(3):
        with watch(dog, 1000):
            assert dog._running
        with watch(dog, 0.001) as short:
            wait_until(lambda short=short: short.over)
        wait_until(lambda: not dog._running)


def test_many_threads_share_it() -> None:
    dog = Watchdog()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            with watch(dog, 1000) as quick:
                pass
            if quick.over:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)
    assert len(dog._heap) <= module.MANY + 4 * 9
