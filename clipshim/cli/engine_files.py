"""Where the engines keep their configuration, and writing it with a back-up.

What the texts say is decided in engine_config; here are only files.
"""

from __future__ import annotations

import difflib
import enum
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipshim.cli import engine_config
from clipshim.cli.terminal import print_note
from clipshim.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_RUNTIME = "/usr/local/bin/clipshim"
BACKUP_SUFFIX = ".before-clipshim"


class Engine(enum.StrEnum):
    """An engine that clipshim can be installed into."""

    DOCKER = "docker"
    CONTAINERD = "containerd"
    PODMAN = "podman"
    CRIO = "crio"


@dataclass(frozen=True, slots=True)
class _Facts:
    path: str
    add: Callable[[str, str], str]
    remove: Callable[[str], str]
    restart: str


FACTS = {
    Engine.DOCKER: _Facts(
        "/etc/docker/daemon.json", engine_config.add_docker, engine_config.remove_docker,
        "run `systemctl reload docker` (or restart it)",
    ),
    Engine.CONTAINERD: _Facts(
        "/etc/containerd/config.toml", engine_config.add_containerd,
        engine_config.remove_containerd, "run `systemctl restart containerd`",
    ),
    Engine.PODMAN: _Facts(
        "/etc/containers/containers.conf", engine_config.add_podman, engine_config.remove_podman,
        "nothing to restart, but `systemctl restart podman` if you use its API service",
    ),
    Engine.CRIO: _Facts(
        "/etc/crio/crio.conf.d/50-clipshim.conf", engine_config.add_crio,
        engine_config.remove_crio, "run `systemctl restart crio`",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """One file's change. `after` None: the file goes. `backup_text` None: no new back-up."""

    engine: Engine
    path: Path
    before: str | None
    after: str | None
    backup: Path
    write_backup: bool
    drop_backup: bool

    @property
    def changes(self) -> bool:
        """Whether there is anything to do to the file itself."""
        return self.before != self.after


def plan_install(
    engine: Engine, *, config: Path | None, root: Path | None, runtime: Path | None
) -> Plan:
    """What `install` would do. Raises ConfigError when the file is not understood."""
    path = _path(engine, config, root)
    before = _read(path)
    program = str(runtime) if runtime else shutil.which("clipshim") or DEFAULT_RUNTIME
    if not os.path.isabs(program):
        raise ConfigError(
            f"runtime {program}: expected an absolute path", hint="engines have no PATH of yours"
        )
    after = _named(path, lambda: FACTS[engine].add(before or "", program))
    backup = path.with_name(path.name + BACKUP_SUFFIX)
    changed = before != after
    return Plan(engine, path, before, after, backup, changed and not backup.exists(), False)


def plan_uninstall(engine: Engine, *, config: Path | None, root: Path | None) -> Plan:
    """What `uninstall` would do: the back-up where it is still the same but for our entry."""
    facts = FACTS[engine]
    path = _path(engine, config, root)
    before = _read(path)
    backup = path.with_name(path.name + BACKUP_SUFFIX)
    if before is None:
        return Plan(engine, path, None, None, backup, False, backup.exists())
    saved = _read(backup)
    if saved is not None and _is_install_of(facts, before, saved):
        after = saved
    else:
        after = _named(path, lambda: facts.remove(before))
    return Plan(engine, path, before, after or None, backup, False, backup.exists())


def tell_and_apply(plan: Plan, *, dry_run: bool) -> None:
    """Prints the difference, or makes it and says what to restart."""
    if not plan.changes:
        print_note(f"{plan.path}: nothing to change")
        if plan.drop_backup and not dry_run:
            plan.backup.unlink(missing_ok=True)
        return
    if dry_run:
        sys.stdout.writelines(
            difflib.unified_diff(
                (plan.before or "").splitlines(keepends=True),
                (plan.after or "").splitlines(keepends=True),
                str(plan.path) if plan.before is not None else "/dev/null",
                str(plan.path) if plan.after is not None else "/dev/null",
            )
        )
        return
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    if plan.write_backup:
        _replace(plan.backup, plan.before or "", like=plan.path)
        print_note(f"{plan.backup}: what was there before")
    if plan.after is None:
        plan.path.unlink()
        print_note(f"{plan.path}: removed")
    else:
        _replace(plan.path, plan.after, like=plan.path)
        print_note(f"{plan.path}: written")
    if plan.drop_backup:
        plan.backup.unlink(missing_ok=True)
    print_note(f"next: {FACTS[plan.engine].restart}")


def _is_install_of(facts: _Facts, text: str, saved: str) -> bool:
    """Whether `text` is what installing into `saved` gives, with whichever runtime it names."""
    for runtime in dict.fromkeys(re.findall(r'"(/[^"]*)"', text)):
        try:
            if facts.add(saved, runtime) == text:
                return True
        except ConfigError:
            return False
    return False


def _path(engine: Engine, config: Path | None, root: Path | None) -> Path:
    path = config or Path(FACTS[engine].path)
    if root is not None:
        return root / path.relative_to(path.anchor)
    # A link stays one: configuration management likes them.
    return Path(os.path.realpath(path))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8") from exc


def _named(path: Path, edit: Callable[[], str]) -> str:
    try:
        return edit()
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.message.partition(': ')[2]}", hint=exc.hint) from exc


def _replace(path: Path, text: str, *, like: Path) -> None:
    """Writes `text` whole or not at all, with owner and mode of `like` if that exists."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        if like.exists():
            facts = like.stat()
            os.fchmod(file.fileno(), facts.st_mode & 0o7777)
            os.fchown(file.fileno(), facts.st_uid, facts.st_gid)
        else:
            os.fchmod(file.fileno(), 0o644)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
