"""Watches which spans containers read while they start, for profiles and `clipshim report`.

A start lasts from the mount of the tree until WATCH_S after the runtime succeeded. What several
containers of an image read at the same time cannot be told apart: each is given all of it.
"""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from clipshim.node.layer_directory import LayerDirectory
from clipshim.node.tree_records import TreeRecord

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

WATCH_S = 20.0  # after the runtime's success: programs go on loading for a while
ABANDON_S = 300.0  # a start that nobody reported the end of
MAX_TOUCHES = 20_000
MAX_KEPT = 1000  # containers whose start is remembered

Touches = list[tuple[int, int]]  # (layer, span) in order, each once


@dataclass
class StartRecorder:
    """One container's start. Implements lazy.layer_reader.Recorder."""

    record: TreeRecord
    until: float  # trio's clock
    touches: dict[tuple[int, int], None] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A layer that is in the image twice counts as its first place."""
        for position, layer in enumerate(self.record.layers):
            self.positions.setdefault(layer.key, position)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def touch(self, key: str, span: int) -> None:
        """See Recorder."""
        position = self.positions.get(key)
        if position is not None and len(self.touches) < MAX_TOUCHES:
            self.touches.setdefault((position, span))


class StartWatch:
    """All starts that are under way or were lately."""

    def __init__(self, layers: LayerDirectory) -> None:
        self._layers = layers
        self._running: dict[str, StartRecorder] = {}
        self._done: dict[str, Touches] = {}
        self.on_done: Callable[[TreeRecord, Touches], None] = lambda _record, _touches: None

    def begin(self, container: str, record: TreeRecord) -> None:
        """A container asked for its tree."""
        self.end(container, keep=False)
        recorder = StartRecorder(record, trio.current_time() + ABANDON_S)
        self._running[container] = recorder
        self._attach(recorder, on=True)

    def started(self, container: str) -> None:
        """Its runtime succeeded."""
        recorder = self._running.get(container)
        if recorder is not None:
            recorder.until = trio.current_time() + WATCH_S

    def end(self, container: str, *, keep: bool = True) -> None:
        """The start is over, or the container is gone."""
        recorder = self._running.pop(container, None)
        if recorder is None:
            return
        self._attach(recorder, on=False)
        if not keep:
            return
        touches = list(recorder.touches)
        self._done.pop(container, None)
        self._done[container] = touches
        while len(self._done) > MAX_KEPT:
            del self._done[next(iter(self._done))]
        if touches:
            self.on_done(recorder.record, touches)

    def end_due(self) -> None:
        """Ends the starts whose time is over."""
        now = trio.current_time()
        for container in [c for c, r in self._running.items() if now >= r.until]:
            self.end(container)

    def touches(self, container: str) -> Touches:
        """What a container has read while it started, as far as it is known."""
        recorder = self._running.get(container)
        return list(recorder.touches) if recorder else self._done.get(container, [])

    def _attach(self, recorder: StartRecorder, *, on: bool) -> None:
        for key in recorder.positions:
            layer = self._layers.get(key)
            if layer is not None:
                layer.record(recorder, on=on)
