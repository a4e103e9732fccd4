"""Rules of every test run: the installed product, no skips in CI, nothing left behind.

tests/run.sh sets CLIPSHIM_TEST_ROOT, _RUN and _INSTALLED; when pytest is called by hand this file
makes a root of its own, so that the rules are the same.

Tests import `clipshim` as installed, never as checked out: pytest runs with importmode=importlib
and `python -P`, and the checkout is put at the END of sys.path, where it provides only `tests`.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

CHECKOUT = Path(__file__).resolve().parents[1]
if str(CHECKOUT) not in sys.path:
    sys.path.append(str(CHECKOUT))

from tests.support import leftovers  # noqa: E402  after the path
from tests.support.skips import KERNEL_CANNOT  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Generator

# the same examples in every run, and no limits of time: a loaded machine must not fail a test
settings.register_profile(
    "steady",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("steady")

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
_LEAKS: pytest.StashKey[list[str]] = pytest.StashKey()
_MADE_ROOT: pytest.StashKey[Path] = pytest.StashKey()


def _make_root() -> Path:
    run = secrets.token_hex(4)
    root = leftovers.PARENT / f"{leftovers.PREFIX}{run}"
    root.mkdir(mode=0o711)
    (root / "owner").write_text(f"{os.getpid()} {leftovers.start_time(os.getpid())}\n")
    (root / "tmp").mkdir(mode=0o1777)
    os.environ["CLIPSHIM_TEST_RUN"] = run
    os.environ["CLIPSHIM_TEST_ROOT"] = str(root)
    os.environ["TMPDIR"] = str(root / "tmp")
    return root


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run a root, and temporary directories below it."""
    if "CLIPSHIM_TEST_ROOT" not in os.environ:
        root = _make_root()
        config.stash[_MADE_ROOT] = root
        if not config.option.basetemp:
            config.option.basetemp = root / "t"
    os.environ.pop("CLIPSHIM_CONFIG", None)  # a test that needs one sets its own
    if os.environ.get("CLIPSHIM_TEST_INSTALLED"):
        import clipshim

        if Path(clipshim.__file__).resolve().is_relative_to(CHECKOUT / "clipshim"):
            raise pytest.UsageError("the tests would import the checkout, not the installed wheel")
    faulthandler.enable()


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not IN_CI or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if KERNEL_CANNOT not in text:
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure in CI: {text}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skip is a failure, unless the kernel cannot do what the test needs."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for modules skipped as a whole."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After all fixtures are down: nothing that carries the run's mark may be left."""
    if session.config.option.collectonly or os.geteuid() != 0:
        return
    root = Path(os.environ["CLIPSHIM_TEST_ROOT"])
    left = leftovers.wait_until_gone(root, deadline_s=120)  # only what leaks takes that long
    session.config.stash[_LEAKS] = left.lines()
    if left.lines() and exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Names what was left."""
    leaks = config.stash.get(_LEAKS, [])
    if leaks:
        terminalreporter.section("left behind by the tests", red=True)
        for line in leaks:
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the root that a call by hand has made."""
    root = config.stash.get(_MADE_ROOT, None)
    if root is not None:
        leftovers.remove(root)


@pytest.fixture(scope="session")
def run_root() -> Path:
    """The directory below which everything of this run lies: short, on a disk."""
    return Path(os.environ["CLIPSHIM_TEST_ROOT"])


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository, for tests of its scripts and samples."""
    return CHECKOUT
