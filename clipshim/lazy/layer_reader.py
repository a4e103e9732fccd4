"""Reads of one layer: from the store where it can, else by flights that all readers share.

Not for FUSE, nor for what a fetch does (span_fetch.py). All methods belong to one trio thread.

A read is answered as soon as the spans it touches are there, whatever else is under way. Whoever
waits can leave without harm to the others: flights run in the nursery of Fetching. Failed flights
are flown again until the reader's own deadline, unless the failure is of a kind that does not pass
(refused, not found); wrong bytes from every source are asked for a few times more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Protocol

import trio

from clipshim.errors import (
    AuthError,
    ClipError,
    DigestError,
    LayerError,
    NotFoundError,
    PolicyError,
    RegistryError,
    SpanDecodeError,
)
from clipshim.lazy.fetching import AHEAD, DEMAND, PREFETCH, Ticket
from clipshim.lazy.flight import Flight, parts_of, runs_of
from clipshim.lazy.readahead import Readahead
from clipshim.lazy.span_fetch import Attempt, fetch_run, memory_needed
from clipshim.lazy.statistics import LayerStatistics

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clipshim.index.model import LayerInfo
    from clipshim.index.span_table import SpanTable
    from clipshim.lazy.fetching import Fetching
    from clipshim.lazy.flight import Part
    from clipshim.lazy.span_source import SpanSource
    from clipshim.lazy.stored_layer import StoredLayer

log = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview
DENIALS = (AuthError, NotFoundError, PolicyError)
WRONG = (DigestError, SpanDecodeError)
LASTING = (*DENIALS, *WRONG)
FAIL_FAST_S = 1.0  # after a denial readers get it at once, and no request is made
RETRY_PAUSE_S = 0.1
PATIENCE_S = 3.0  # with a registry whose slots are all taken, while another one has the layer too
AVOIDED_S = 30.0  # a registry that kept silent, while another one may be asked
# Flights whose every source sent wrong bytes, until the reader is told so. A broken proxy or cache
# may be mended in a moment; a blob that is wrong for good costs 6 s, not the whole deadline.
WRONG_FLIGHTS = 6
LAUNCHED_SPANS = 64  # of one read at once


class Recorder(Protocol):
    """Is told which spans are touched (profile.py)."""

    def touch(self, key: str, span: int) -> None: ...


class LayerReader:
    """Verified bytes of one layer, from any of the images that have it."""

    def __init__(
        self, layer: LayerInfo, table: SpanTable, stored: StoredLayer, fetching: Fetching
    ) -> None:
        """`stored` comes from LayerStore.open, whose release is the caller's."""
        self.layer = layer
        self.key = layer.key
        self.size = layer.size
        self.table = table
        self.stored = stored
        self.statistics = LayerStatistics()
        self.recorders: set[Recorder] = set()
        self.without_source: ClipError | None = None  # why there is none: readers need not wait
        self._fetching = fetching
        self._sources: list[SpanSource] = []
        self._flights: dict[int, Flight] = {}
        self._readahead = Readahead(len(table))
        self._denied: tuple[float, ClipError] | None = None

    def add_source(self, source: SpanSource) -> None:
        """Bytes may come from here too. Sources are tried in this order."""
        self._sources.append(source)
        self._denied = None

    def foretell(self, spans: Iterable[int]) -> None:
        """A profile says that these spans will be read; its prefetch fetches them."""
        self._readahead.foretell(spans)

    @property
    def is_busy(self) -> bool:
        """Whether something is being fetched, for readers or ahead of them."""
        return bool(self._flights)

    # -- reading

    async def read(self, offset: int, size: int) -> Data:
        """The bytes of a range, as far as it lies within the layer.

        Raises ClipError if they cannot be had by the deadline.
        """
        size = min(size, self.size - offset)
        if size <= 0 or offset < 0:
            return b""
        began = time.perf_counter()
        first, last = self.stored.find(offset), self.stored.find(offset + size - 1)
        for recorder in self.recorders:
            for span in range(first, last + 1):
                recorder.touch(self.key, span)
        ahead = self._readahead.advance(first, last, offset, size)
        try:
            data: Data | None = await self._from_store(offset, size)
            if data is not None:
                self.statistics.hits += 1
                if ahead:
                    self._launch(ahead, AHEAD)
            else:
                self.statistics.misses += 1
                # the rest, if a hostile index has that many, as their turn comes
                self._launch(self.stored.missing(offset, size)[:LAUNCHED_SPANS], DEMAND)
                self._launch(ahead, AHEAD)
                data = await self._collect(offset, size, first, last)
        except Exception as exc:
            self.statistics.read_errors += 1
            cause = exc.message if isinstance(exc, ClipError) else repr(exc)
            self._fetching.limited_log.error(
                (self.key, type(exc).__name__),
                f"layer {self.layer.diff_id}: bytes {offset} to {offset + size}: {cause}",
            )
            raise
        self.statistics.reads += 1
        self.statistics.served_bytes += size
        self.statistics.read_s.observe(time.perf_counter() - began)
        return data

    async def _from_store(self, offset: int, size: int) -> bytearray | None:
        try:
            try:
                return self.stored.read(offset, size, nowait=True)
            except BlockingIOError:
                data = await trio.to_thread.run_sync(
                    self.stored.read, offset, size, limiter=self._fetching.disk_limiter
                )
                assert data is None or isinstance(data, bytearray)
                return data
        except OSError as exc:
            self._fetching.limited_log.error(
                (self.key, "disk"), f"layer {self.layer.diff_id}: store: {exc}: fetched again"
            )
            self.stored.suspect(offset, size)
            return None

    async def _collect(self, offset: int, size: int, first: int, last: int) -> Data:
        deadline = trio.current_time() + self._fetching.deadline_s
        if first == last:
            return await self._piece(first, offset, offset + size, deadline)
        # The spans may never be in the store all at once: put the answer together.
        data = bytearray(size)
        for span in range(first, last + 1):
            entry = self.table[span]
            low = max(offset, entry.uncompressed_offset)
            high = min(offset + size, entry.uncompressed_offset + entry.uncompressed_size)
            data[low - offset : high - offset] = await self._piece(span, low, high, deadline)
        return data

    async def _piece(self, span: int, low: int, high: int, deadline: float) -> Data:
        base = self.table[span].uncompressed_offset
        while True:
            recent = self._fetching.recent.get(self.key, span)
            if recent is not None:
                return memoryview(recent)[low - base : high - base]
            data = await self._from_store(low, high - low)
            if data is not None:
                return data
            flight = await self._fly(span, DEMAND, deadline)
            if flight.data is not None:
                return memoryview(flight.data)[low - base : high - base]

    async def _fly(self, span: int, priority: int, deadline: float) -> Flight:
        """Waits for a span, over failures that may pass. Raises ClipError."""
        cause = ""
        pause_s, wrong = RETRY_PAUSE_S, 0
        while True:
            self._launch((span,), priority)
            flight = self._flights.get(span)
            if flight is None:  # it has landed meanwhile
                await trio.lowlevel.checkpoint()
                done = Flight(span, Ticket(priority))
                done.stored = True
                return done
            flight.waiters += 1
            try:
                with trio.move_on_at(deadline):
                    await flight.event.wait()
            finally:
                flight.waiters -= 1
            error = flight.error
            if error is None and flight.event.is_set():
                return flight
            if error is not None:
                if isinstance(error, DENIALS) or priority != DEMAND:
                    raise error
                if isinstance(error, WRONG):
                    wrong += 1
                    pause_s = RETRY_PAUSE_S * 2**wrong
                    if wrong >= WRONG_FLIGHTS:
                        raise error
                cause = error.message
            # a long range is decoded from its start: as long as it gets on, it is worth waiting
            deadline = max(deadline, flight.ticket.progress + self._fetching.deadline_s)
            if error is None and trio.current_time() < deadline:
                continue
            if trio.current_time() + pause_s >= deadline:
                if isinstance(error, WRONG):
                    raise error
                seconds = self._fetching.deadline_s
                raise RegistryError(
                    f"span {span} did not come within {seconds:g} s: {cause or self._trouble()}",
                    hint="is the registry reachable? `clipshim status` shows what is not",
                ) from error
            await trio.sleep(pause_s)

    def _trouble(self) -> str:
        services = {self._fetching.service(source.service) for source in self._sources}
        causes = [service.breaker.cause for service in services if service.breaker.cause]
        return "; ".join(causes) or "no answer"

    async def fetch_spans(self, spans: Sequence[int], *, ahead: bool = True) -> None:
        """Returns when the spans are in the store (or were fetched but found no room there).

        `ahead`: nobody waits for them; they yield to those who do and fail at the first error.
        """
        priority = PREFETCH if ahead else DEMAND
        deadline = trio.current_time() + self._fetching.deadline_s
        self._launch(spans, priority)
        await trio.lowlevel.checkpoint()
        for span in spans:
            if not self.stored.has(span):
                await self._fly(span, priority, deadline)

    # -- flights

    def _launch(self, spans: Iterable[int], priority: int) -> None:
        """Starts flights for what is neither here nor under way."""
        fresh = []
        for span in spans:
            flight = self._flights.get(span)
            if flight is not None:
                self._promote(flight, priority)
            elif not self.stored.has(span) and not self._fetching.recent.get(self.key, span):
                fresh.append(span)
        if not fresh:
            return
        for run in runs_of(parts_of(self.table, fresh)):
            ticket = Ticket(priority)
            flights = {}
            for part in run:
                for span in part.spans:
                    if span not in self._flights and not self.stored.has(span):
                        flights[span] = self._flights[span] = Flight(span, ticket)
            if flights:
                self._fetching.nursery.start_soon(self._run, run, flights, ticket)

    def _promote(self, flight: Flight, priority: int) -> None:
        if priority < flight.ticket.priority:
            flight.ticket.priority = priority
            self._fetching.memory.grant()
            for source in self._sources:
                self._fetching.service(source.service).slots.grant()

    async def _run(self, run: list[Part], flights: dict[int, Flight], ticket: Ticket) -> None:
        error: ClipError = LayerError("the server is stopping")
        try:
            error = await self._attempts(run, flights, ticket)
        except ClipError as exc:
            error = exc
        except Exception:
            log.exception("layer %s: fetching failed", self.key)
            error = LayerError(f"layer {self.key}: internal error, see the daemon's log")
        finally:
            for span in list(flights):
                self._end(span, flights).fail(error)

    def _end(self, span: int, flights: dict[int, Flight]) -> Flight:
        flight = flights.pop(span)
        if self._flights.get(span) is flight:
            del self._flights[span]
        return flight

    async def _attempts(
        self, run: list[Part], flights: dict[int, Flight], ticket: Ticket
    ) -> ClipError:
        """One attempt from each source, a second one if there is only one and its bytes are bad."""
        await self._check_suspects(flights)
        if self._denied is not None:
            until, denial = self._denied
            if trio.current_time() < until:
                return denial
            self._denied = None
        sources = list(self._sources)
        if not sources:
            return self.without_source or LayerError("no image that is mounted has this layer")
        # one whose registry does not answer has its turn after those that may
        sources.sort(key=self._is_doubtful)
        if len(sources) == 1:
            sources *= 2
        error: ClipError | None = None
        refused: ClipError | None = None
        for number, source in enumerate(sources):
            if not flights:
                break
            if number:
                if error is not None and refused is None and source is sources[number - 1]:
                    break  # it did not answer: that is for the readers to try again
                self.statistics.retries += 1
            try:
                hurried = any(
                    other.service != source.service and not self._is_doubtful(other)
                    for other in sources[number + 1 :]
                )
                attempt = await self._attempt(source, run, flights, ticket, hurried)
            except RegistryError as exc:  # it is not to be asked now
                error = exc
                continue
            error = attempt.cause or error
            refused = next(iter(attempt.bad.values()), refused)
            if number and not flights and source in self._sources:
                self._sources.remove(source)  # the next fetch tries first what has worked
                self._sources.insert(0, source)
        failure = refused or error or LayerError("no source has the span")
        if flights and isinstance(failure, DENIALS):
            self._denied = (trio.current_time() + FAIL_FAST_S, failure)
        return failure

    def _is_doubtful(self, source: SpanSource) -> bool:
        return self._fetching.service(source.service).is_doubtful

    async def _attempt(
        self,
        source: SpanSource,
        run: list[Part],
        flights: dict[int, Flight],
        ticket: Ticket,
        hurried: bool,
    ) -> Attempt:
        fetching = self._fetching
        service = fetching.service(source.service)
        deadline = trio.current_time() + fetching.deadline_s
        while True:
            if service.breaker.is_open and ticket.priority != DEMAND:
                raise RegistryError(f"{service.name} does not answer: {service.breaker.cause}")
            async with contextlib.AsyncExitStack() as stack:
                with trio.move_on_after(PATIENCE_S if hurried else math.inf) as waiting:
                    await stack.enter_async_context(service.slots.taken(1, ticket))
                if waiting.cancelled_caught:
                    raise RegistryError(f"{service.name} is busy")
                if hurried and service.is_doubtful:
                    raise RegistryError(f"{service.name} does not answer")
                if service.breaker.try_turn():
                    try:
                        async with fetching.memory.taken(memory_needed(self.table, run), ticket):
                            return await self._fetch_in_thread(
                                source, run, flights, ticket, hurried
                            )
                    finally:
                        service.breaker.abandoned()  # unless it was said how the attempt ended
            await service.breaker.wait_change(deadline)

    async def _fetch_in_thread(
        self,
        source: SpanSource,
        run: list[Part],
        flights: dict[int, Flight],
        ticket: Ticket,
        hurried: bool,
    ) -> Attempt:
        token = trio.lowlevel.current_trio_token()
        service = self._fetching.service(source.service)
        statistics = self.statistics

        def land(span: int, data: bytes, stored: bool) -> None:
            flight = flights.get(span)
            keep = data if not stored or (flight and flight.waiters) else None
            token.run_sync_soon(self._land, span, keep, stored, flights)

        self._fetching.used_memory = True
        began = time.perf_counter()
        attempt = await trio.to_thread.run_sync(
            fetch_run,
            source,
            self.table,
            self.stored,
            run,
            set(flights),
            land,
            self._fetching.deadline_s,
            self._fetching.windows,
            hurried,
            limiter=self._fetching.thread_limiter,
            abandon_on_cancel=True,
        )
        await trio.lowlevel.checkpoint()  # what was landed before the end is delivered first
        if attempt.cause is None or isinstance(attempt.cause, LASTING):
            service.breaker.succeeded()
            service.avoided_until = 0.0
        elif isinstance(attempt.cause, RegistryError):
            if hurried and not attempt.fetched_bytes:  # it did not get the time to answer
                service.avoided_until = trio.current_time() + AVOIDED_S
            else:
                service.breaker.failed(attempt.cause.message)
        statistics.requests += attempt.requests
        statistics.fetched_bytes += attempt.fetched_bytes
        statistics.fetch_s.observe(time.perf_counter() - began)
        if attempt.cause is not None:
            statistics.fetch_failures += 1
            self._fetching.limited_log.error(
                (self.key, source.service, type(attempt.cause).__name__),
                f"layer {self.layer.diff_id}: bytes {run[0].start} to {run[-1].end} of its blob"
                f" from {source.name}: {attempt.cause}",
            )
        if attempt.bad:
            statistics.verify_failures += len(attempt.bad)
            source.distrust()
            for bad in set(attempt.bad.values()):
                log.error("WRONG BYTES from %s (%s): %s", source.name, source.service, bad)
        return attempt

    def _land(
        self,
        span: int,
        data: bytes | None,
        stored: bool,
        flights: dict[int, Flight],
        fetched: bool = True,
    ) -> None:
        if span not in flights:
            return
        ticket = flights[span].ticket
        ticket.progress = trio.current_time()
        if fetched:
            self.statistics.fetched_spans += 1
            self.statistics.ahead_spans += ticket.priority != DEMAND
            self.statistics.uncached_spans += not stored
        if not stored and data is not None:
            self._fetching.recent.put(self.key, span, data)
        elif stored:
            self._fetching.recent.drop(self.key, span)
        self._end(span, flights).land(data, stored=stored)

    async def _check_suspects(self, flights: dict[int, Flight]) -> None:
        for span in [span for span in flights if self.stored.is_suspect(span)]:
            good = await trio.to_thread.run_sync(
                self.stored.verify_suspect, span, limiter=self._fetching.disk_limiter
            )
            if good:
                self._land(span, None, True, flights, False)
            else:
                log.warning("layer %s: span %d was torn by a host reset", self.key, span)
