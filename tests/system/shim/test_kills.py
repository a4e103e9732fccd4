"""The runtime killed at any step leaves nothing that the next call does not clean up."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from clipshim.shim import state, trace
from tests.system.shim.containers import LOOP, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.node import Node
    from tests.support.runtimes import Runtime


DELETE_STEPS = [step for step in trace.STEPS if not step.startswith("create")]

CREATE_STEPS = [
    step
    for step in trace.STEPS
    if step.startswith("create") and step != "create-unmounted"  # that one is of grafts
]


@pytest.mark.parametrize("step", CREATE_STEPS)
def test_killed_in_create_the_next_one_cleans(
    step: str, node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(LOOP)
    before = (path / "config.json").read_text()
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    assert runtime.quietly("create", "-b", path, "box", check=False).returncode == -signal.SIGKILL
    runtime.env = node.env
    runtime("delete", "--force", "box")
    assert_clean(node)
    assert (path / "config.json").read_text() == before
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    assert runtime.quietly("create", "-b", path, "box", check=False).returncode == -signal.SIGKILL
    runtime.env = node.env
    if runtime.status("box"):
        runtime("delete", "--force", "box")
    runtime.quietly("create", "-b", path, "box")
    runtime("delete", "--force", "box")
    assert_clean(node)


@pytest.mark.parametrize("step", DELETE_STEPS)
def test_killed_in_delete_the_next_one_finishes(
    step: str, node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    path = bundle(LOOP)
    runtime.quietly("create", "-b", path, "box")
    runtime.env = {**node.env, trace.TRACE_ENV: step}
    done = runtime("delete", "--force", "box", check=False)
    assert done.returncode == -signal.SIGKILL
    runtime.env = node.env
    runtime("delete", "--force", "box")
    assert_clean(node)


def test_a_damaged_state_does_not_keep_a_container(
    node: Node, runtime: Runtime, bundle: Callable[..., Path]
) -> None:
    runtime.quietly("create", "-b", bundle(LOOP), "box")
    key = state.container_key("box", str(runtime.root))
    (node.run_dir / key / "state.json").write_text('{"version": 1, "id"')
    runtime("delete", "--force", "box")
    assert_clean(node)
