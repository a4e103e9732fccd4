"""Learning what a start touches; counting events; the cgroup file."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from clipshim.node.events import Events
from clipshim.node.own_cgroup import parse_cgroups
from clipshim.node.start_watch import ABANDON_S, WATCH_S, StartWatch
from clipshim.node.tree_records import LayerName, TreeRecord

RECORD = TreeRecord(
    image_id="ab" * 16,
    digest="sha256:" + "ab" * 32,
    reference="a.example/b:c",
    mode="erofs",
    layers=(LayerName("k0", 1), LayerName("k1", 1), LayerName("k0", 1)),
    generation="g",
)


class FakeLayer:
    """Remembers its recorders as a shown layer does."""

    def __init__(self) -> None:
        self.recorders: set[Any] = set()

    def record(self, recorder: Any, *, on: bool) -> None:
        (self.recorders.add if on else self.recorders.discard)(recorder)


class FakeLayers:
    """Two layers."""

    def __init__(self) -> None:
        self.layers = {"k0": FakeLayer(), "k1": FakeLayer()}

    def get(self, key: str) -> FakeLayer:
        return self.layers[key]

    def touch(self, key: str, span: int) -> None:
        for recorder in self.layers[key].recorders:
            recorder.touch(key, span)


def test_touches_are_kept_in_order_each_once_until_the_start_is_over() -> None:
    async def main() -> None:
        layers = FakeLayers()
        watch = StartWatch(layers)  # type: ignore[arg-type]
        learned = []
        watch.on_done = lambda record, touches: learned.append((record.image_id, touches))
        watch.begin("c", RECORD)
        for key, span in (("k1", 3), ("k0", 0), ("k1", 3), ("k0", 7)):
            layers.touch(key, span)
        watch.started("c")
        assert watch.touches("c") == [(1, 3), (0, 0), (0, 7)]
        await trio.sleep(WATCH_S + 1)
        watch.end_due()
        layers.touch("k0", 99)
        assert watch.touches("c") == [(1, 3), (0, 0), (0, 7)]
        assert learned == [(RECORD.image_id, [(1, 3), (0, 0), (0, 7)])]
        assert all(not layer.recorders for layer in layers.layers.values())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_start_that_nobody_reports_on_ends_too_and_a_second_end_is_nothing() -> None:
    async def main() -> None:
        layers = FakeLayers()
        watch = StartWatch(layers)  # type: ignore[arg-type]
        watch.begin("c", RECORD)
        await trio.sleep(ABANDON_S + 1)
        watch.end_due()
        watch.end("c")
        watch.started("c")
        assert watch.touches("c") == []
        assert watch.touches("unknown") == []

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_causes_from_outside_are_bounded() -> None:
    events = Events()
    for i in range(1000):
        events.container_failed(f"Cause{i}")
    events.container_failed("not an identifier\n")
    assert len(events.failures) <= 65
    assert sum(events.failures.values()) == 1001
    events.container_failed("DeletedDirectory")
    assert sum(events.failures.values()) == 1002
    assert events.deleted_directory == 1


def test_both_versions_of_cgroups_are_read() -> None:
    text = "5:cpuset:/a\n1:name=systemd:/b:c\n0::/d\n"
    assert parse_cgroups(text) == [("cpuset", "/a"), ("name=systemd", "/b:c"), ("", "/d")]
