"""What all layer readers of a server share: slots, circuit breakers, memory, rate-limited log.

A *service* is what can be dead as a whole, a registry's host. Each has its own slots and breaker,
so that a dead one holds up nobody else. Not for the fetching itself (layer_reader.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import trio

from clipshim.errors import RegistryError
from clipshim.lazy.statistics import LayerStatistics
from clipshim.lazy.window_memory import WindowMemory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from clipshim.settings import Settings

log = logging.getLogger(__name__)

DEMAND, AHEAD, PREFETCH = 0, 1, 2  # priorities; lower goes first
LOG_EVERY_S = 10.0
OPEN_AFTER = 3  # failures in a row
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
DISK_THREADS = 16
FETCH_THREADS = 128
MAX_SERVICES = 1000  # indexes name registries, and they are hostile

# glibc keeps freed spans in the arenas of the threads that allocated them. After 200 MB had been
# fetched, 64 MB were resident; with two arenas and malloc_trim 38. musl has no such calls.
M_ARENA_MAX = -8  # malloc.h
ARENAS = 2
_libc = ctypes.CDLL(None)
_malloc_trim = getattr(_libc, "malloc_trim", None)


class Ticket:
    """A place in the queues of pools; its priority may rise while it waits."""

    __slots__ = ("priority", "progress")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.progress = 0.0  # trio time at which something of it was done last


class _Waiter:
    __slots__ = ("amount", "event", "granted", "ticket")

    def __init__(self, amount: int, ticket: Ticket) -> None:
        self.amount = amount
        self.ticket = ticket
        self.event = trio.Event()
        self.granted = False


class PriorityPool:
    """An amount of something that is handed out by priority, then in order.

    `kept` is left for DEMAND, so that what waits for a fetch ahead never waits long.
    """

    def __init__(self, total: int, *, kept: int = 0) -> None:
        self.total = total
        self.free = total
        self._kept = min(kept, total - 1)
        self._waiters: list[_Waiter] = []

    @contextlib.asynccontextmanager
    async def taken(self, amount: int, ticket: Ticket) -> AsyncIterator[None]:
        """Waits for `amount` (or all there is, if it is more) and holds it in the block."""
        limit = self.total if ticket.priority == DEMAND else self.total - self._kept
        waiter = _Waiter(min(amount, limit), ticket)
        self._waiters.append(waiter)
        self.grant()
        try:
            if not waiter.granted:
                await waiter.event.wait()
            yield
        finally:
            if waiter.granted:
                self.free += waiter.amount
            else:
                self._waiters.remove(waiter)
            self.grant()

    def grant(self) -> None:
        """Lets in whoever's turn it is; also to be called when a ticket's priority has risen."""
        while self._waiters:
            waiter = min(self._waiters, key=lambda waiter: waiter.ticket.priority)
            kept = 0 if waiter.ticket.priority == DEMAND else self._kept
            if self.free - kept < waiter.amount:
                return
            self._waiters.remove(waiter)
            self.free -= waiter.amount
            waiter.granted = True
            waiter.event.set()


class Breaker:
    """Open after failures in a row; then one attempt at a time, with growing pauses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0
        self.cause = ""
        self._open_until = 0.0
        self._probing = False
        self._changed = trio.Event()

    @property
    def is_open(self) -> bool:
        """Whether attempts are held back."""
        return self.failures >= OPEN_AFTER

    def try_turn(self) -> bool:
        """Whether an attempt may be made now; then succeeded, failed or abandoned must follow."""
        if not self.is_open:
            return True
        if self._probing or trio.current_time() < self._open_until:
            return False
        self._probing = True
        return True

    async def wait_change(self, deadline: float) -> None:
        """Returns when try_turn may give another answer. Raises RegistryError at `deadline`."""
        until = deadline if self._probing else min(deadline, self._open_until)
        with trio.move_on_at(until):
            await self._changed.wait()
        if self.is_open and trio.current_time() >= deadline:
            raise RegistryError(f"{self.name} does not answer: {self.cause}")

    def succeeded(self) -> None:
        """An attempt was answered."""
        if self.is_open:
            log.warning("%s answers again", self.name)
        self.failures = 0
        self._probing = False
        self._wake()

    def failed(self, cause: str) -> None:
        """An attempt was not answered."""
        self.failures += 1
        self.cause = cause
        self._probing = False
        if self.is_open:
            doublings = min(self.failures - OPEN_AFTER, 16)
            pause = min(FIRST_PAUSE_S * 2**doublings, LONGEST_PAUSE_S)
            self._open_until = trio.current_time() + pause
        if self.failures == OPEN_AFTER:
            log.error("%s does not answer: one attempt at a time from now: %s", self.name, cause)
        self._wake()

    def abandoned(self) -> None:
        """The attempt ended without saying anything about the service."""
        self._probing = False
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Service:
    """One registry's slots and breaker."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = PriorityPool(slots, kept=1 if slots > 1 else 0)
        self.breaker = Breaker(name)
        self.avoided_until = 0.0  # trio time; it kept silent while another one could be asked

    @property
    def is_busy(self) -> bool:
        """Whether somebody has a slot; whoever waits for one does so behind them."""
        return self.slots.free != self.slots.total

    @property
    def is_doubtful(self) -> bool:
        """Whether others should be asked first."""
        return self.breaker.is_open or trio.current_time() < self.avoided_until


class RecentSpans:
    """Spans that could not be stored on disk, kept in memory for the next reads, bounded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._spans: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def get(self, key: str, span: int) -> bytes | None:
        """The span's bytes, if they are still here."""
        data = self._spans.get((key, span))
        if data is not None:
            self._spans.move_to_end((key, span))
        return data

    def put(self, key: str, span: int, data: bytes) -> None:
        """Keeps a span at the cost of the oldest ones."""
        self.drop(key, span)
        if len(data) > self._limit:
            return
        self._spans[key, span] = data
        self._size += len(data)
        while self._size > self._limit:
            self._size -= len(self._spans.popitem(last=False)[1])

    def drop(self, key: str, span: int) -> None:
        """Forgets a span."""
        self._size -= len(self._spans.pop((key, span), b""))

    def clear(self) -> None:
        """Forgets everything."""
        self._spans.clear()
        self._size = 0


class LimitedLog:
    """Lets one line through per key and LOG_EVERY_S, and says how many it held back."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], tuple[float, int]] = {}

    def error(self, key: tuple[str, ...], message: str) -> None:
        """Logs an error unless the same was logged a moment ago."""
        now = time.monotonic()
        last, held_back = self._last.get(key, (-LOG_EVERY_S, 0))
        if now - last < LOG_EVERY_S:
            self._last[key] = (last, held_back + 1)
            return
        if len(self._last) > 1000:
            self._last.clear()
        self._last[key] = (now, 0)
        log.error("%s%s", message, f" (and {held_back} times before)" if held_back else "")


class Fetching:
    """The shared state; flights run in `nursery`, so they outlive the readers that asked."""

    def __init__(self, nursery: trio.Nursery, settings: Settings) -> None:
        if _malloc_trim is not None:
            _libc.mallopt(M_ARENA_MAX, ARENAS)
        self.nursery = nursery
        self.deadline_s = settings.fetch_deadline_s
        self.memory_bytes = settings.memory_bytes
        budget = max(1, settings.memory_bytes * 3 // 4)
        self.memory = PriorityPool(budget, kept=budget // 4)
        self.windows = WindowMemory(patience_s=settings.fetch_deadline_s / 2)
        self.recent = RecentSpans(settings.memory_bytes // 4)
        self.disk_limiter = trio.CapacityLimiter(DISK_THREADS)
        self.thread_limiter = trio.CapacityLimiter(FETCH_THREADS)
        self.limited_log = LimitedLog()
        self.total = LayerStatistics()  # of readers that are gone
        self.used_memory = False  # since return_memory
        self._parallel = max(1, settings.parallel_fetches)
        self._services: dict[str, Service] = {}

    def service(self, name: str) -> Service:
        """Slots and breaker of a registry."""
        found = self._services.get(name)
        if found is None:
            if len(self._services) >= MAX_SERVICES:
                busy = {n: s for n, s in self._services.items() if s.is_doubtful or s.is_busy}
                self._services = busy
            found = self._services[name] = Service(name, self._parallel)
        return found

    def return_memory(self) -> bool:
        """Gives back what malloc keeps after fetches, if none is under way. Blocking."""
        if not self.used_memory or self.memory.free != self.memory.total:
            return False
        self.used_memory = False
        if _malloc_trim is not None:
            _malloc_trim(0)
        return True

    def open_breakers(self) -> dict[str, str]:
        """Registries that do not answer at present, with the cause."""
        return {
            name: service.breaker.cause
            for name, service in self._services.items()
            if service.breaker.is_open
        }
