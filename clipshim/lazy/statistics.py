"""Counters and histograms of the lazy part, for metrics and reports. No locks: one trio thread."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields

BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip


@dataclass(slots=True)
class Histogram:
    """Durations in seconds; counts[i] is of those ≤ BUCKETS_S[i] and above the one before."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    def add(self, other: Histogram) -> None:
        """Adds another one's counts."""
        self.counts = [
            mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.sum_s += other.sum_s

    @property
    def count(self) -> int:
        """How many durations were observed."""
        return sum(self.counts)


@dataclass(slots=True)
class LayerStatistics:
    """Of one layer since the server's start, or added up over several."""

    reads: int = 0  # that reached the server: what the kernel has cached does not
    served_bytes: int = 0
    hits: int = 0  # reads that needed no registry
    misses: int = 0
    requests: int = 0  # ranges asked of a source
    fetched_bytes: int = 0  # compressed, on demand and ahead
    fetched_spans: int = 0
    ahead_spans: int = 0  # of those: nobody was waiting for them
    retries: int = 0  # fetches after a failed one
    verify_failures: int = 0  # spans that did not match their digest or could not be decoded
    fetch_failures: int = 0  # fetches that a source did not answer as it should
    read_errors: int = 0  # reads that ended as I/O errors
    uncached_spans: int = 0  # served from memory for lack of room on the disk
    read_s: Histogram = field(default_factory=Histogram)
    fetch_s: Histogram = field(default_factory=Histogram)

    def add(self, other: LayerStatistics) -> None:
        """Adds another one's counts: several layers of an image, or of the node."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Histogram):
                mine.add(theirs)
            else:
                setattr(self, item.name, mine + theirs)

    def counters(self) -> dict[str, int]:
        """The plain counters by name."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if isinstance(getattr(self, item.name), int)
        }
