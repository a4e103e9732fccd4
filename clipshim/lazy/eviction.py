"""Which spans and layers leave the layer store. Decides only; removes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HEADROOM = 0.05  # of the limit: evicting in bulk costs less than span by span


class IdleLayer(NamedTuple):
    """A layer that nobody has open: it goes as a whole."""

    last_use: float
    key: str
    size: int


class IdleSpan(NamedTuple):
    """A span of an open layer."""

    last_use: float
    key: str
    span: int
    size: int


def bytes_to_free(used: int, limit: int, free: int, min_free: int, need: int) -> int:
    """How much must go so that `need` more bytes fit. 0: nothing; else with some headroom."""
    excess = max(used + need - limit, min_free + need - free)
    return excess + int(limit * HEADROOM) if excess > 0 else 0


def choose_layers(layers: Iterable[IdleLayer], amount: int) -> list[IdleLayer]:
    """The least recently used layers that free `amount` bytes, or all."""
    chosen = []
    for layer in sorted(layers):
        if amount <= 0:
            break
        chosen.append(layer)
        amount -= layer.size
    return chosen


def choose_spans(spans: Iterable[IdleSpan], amount: int) -> dict[str, Sequence[int]]:
    """The least recently used spans that free `amount` bytes, or all, by layer."""
    chosen: dict[str, list[int]] = {}
    for span in sorted(spans):
        if amount <= 0:
            break
        chosen.setdefault(span.key, []).append(span.span)
        amount -= span.size
    return dict(chosen)
