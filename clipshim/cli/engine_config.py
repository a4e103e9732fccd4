"""Edits of the engines' configuration files: from one text to another. Pure: no files.

Each function is idempotent and leaves everything that it does not own as it was: comments and
order in TOML (tomlkit), order and indentation in JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from clipshim.errors import ConfigError

NAME = "clipshim"
ANNOTATIONS = "io.clipshim.*"
# podman 4.3's own list: naming the key replaces it.
PODMAN_JSON_RUNTIMES = ["crun", "runc", "kata", "runsc", "youki", "krun"]
# configuration version: the plugin that knows CRI's runtimes. Version 4 came with containerd 2.3.
CONTAINERD_CRI = {
    2: "io.containerd.grpc.v1.cri",
    3: "io.containerd.cri.v1.runtime",
    4: "io.containerd.cri.v1.runtime",
}


def add_docker(text: str, runtime: str) -> str:
    """daemon.json with `runtimes.clipshim`."""
    document = _json_object(text)
    runtimes = document.setdefault("runtimes", {})
    if not isinstance(runtimes, dict):
        raise ConfigError("daemon.json: runtimes: expected an object")
    entry = runtimes.setdefault(NAME, {})
    if isinstance(entry, dict) and entry.get("path") == runtime:
        return text
    runtimes[NAME] = {**entry, "path": runtime} if isinstance(entry, dict) else {"path": runtime}
    return _json_text(document, text)


def remove_docker(text: str) -> str:
    """daemon.json without `runtimes.clipshim`; empty when nothing else was in it."""
    document = _json_object(text)
    runtimes = document.get("runtimes")
    if not isinstance(runtimes, dict) or NAME not in runtimes:
        return text
    if document.get("default-runtime") == NAME:
        del document["default-runtime"]
    del runtimes[NAME]
    if not runtimes:
        del document["runtimes"]
    return _json_text(document, text) if document else ""


def add_containerd(text: str, runtime: str) -> str:
    """config.toml (version 2, 3 or 4) with the runtime `clipshim` for CRI.

    A file that sets nothing becomes version 2, which every containerd from 1.3 on reads.
    SystemdCgroup is taken over from the runtime runc: containerd does not inherit it.
    """
    document = _toml(text, "config.toml")
    if not document:
        document["version"] = 2
    version = document.get("version", 1)
    if version not in CONTAINERD_CRI:
        hint = "name the runtime by hand, as integration/containerd/config-v3.toml does"
        if version in (0, 1):
            hint = "run `containerd config migrate` first (containerd 1.7), or set version = 2"
        raise ConfigError(f"config.toml: version {version}: expected 2, 3 or 4", hint=hint)
    runtimes = _table(
        document, "plugins", CONTAINERD_CRI[int(version)], "containerd", "runtimes",
        where="config.toml",
    )  # fmt: skip
    _keep_default_runtime(runtimes, document)
    entry = runtimes.get(NAME)
    fresh = tomlkit.table() if entry is None else entry
    wanted: dict[str, Any] = {
        "runtime_type": "io.containerd.runc.v2",
        "pod_annotations": [ANNOTATIONS],
        "container_annotations": [ANNOTATIONS],
    }
    for key, value in wanted.items():
        if fresh.get(key) != value:
            fresh[key] = value
    options = fresh.get("options")
    if options is None:
        options = tomlkit.table()
        fresh["options"] = options
    if options.get("BinaryName") != runtime:
        options["BinaryName"] = runtime
    runc = runtimes.get("runc") or {}
    systemd = (runc.get("options") or {}).get("SystemdCgroup")
    if systemd is not None and options.get("SystemdCgroup") != systemd:
        options["SystemdCgroup"] = bool(systemd)
    if entry is None:
        runtimes[NAME] = fresh
    return tomlkit.dumps(document)


def _keep_default_runtime(runtimes: Any, document: Any) -> None:
    """Names runc beside us where the file relied on containerd's built-in entry.

    Naming any runtime replaces the built-in table (containerd 1.6 and 1.7, `config dump`), and
    CRI does not start without its default runtime.
    """
    cri = document["plugins"][CONTAINERD_CRI[int(document["version"])]]
    if "runc" in runtimes or cri["containerd"].get("default_runtime_name", "runc") != "runc":
        return
    runc = tomlkit.table()
    runc.add(tomlkit.comment("containerd's own default, which naming a runtime hides"))
    runc["runtime_type"] = "io.containerd.runc.v2"
    runtimes["runc"] = runc


def remove_containerd(text: str) -> str:
    """config.toml without the runtime `clipshim`; an entry for runc says what the default is."""
    document = _toml(text, "config.toml")
    cri = CONTAINERD_CRI.get(int(document.get("version", 1)))
    _prune(document, ["plugins", cri or "", "containerd", "runtimes", NAME])
    if set(document) <= {"version"} and "#" not in text:
        return ""
    return tomlkit.dumps(document)


def add_podman(text: str, runtime: str) -> str:
    """containers.conf with the runtime and its ability to report errors as JSON."""
    document = _toml(text, "containers.conf")
    engine = _table(document, "engine", where="containers.conf")
    supports = engine.get("runtime_supports_json")
    if supports is None:
        engine["runtime_supports_json"] = [*PODMAN_JSON_RUNTIMES, NAME]
    elif NAME not in supports:
        supports.append(NAME)
    runtimes = _table(document, "engine", "runtimes", where="containers.conf")
    if list(runtimes.get(NAME) or []) != [runtime]:
        runtimes[NAME] = [runtime]
    return tomlkit.dumps(document)


def remove_podman(text: str) -> str:
    """containers.conf without the runtime."""
    document = _toml(text, "containers.conf")
    engine = document.get("engine")
    if isinstance(engine, dict):
        supports = engine.get("runtime_supports_json")
        if supports is not None and NAME in supports:
            supports.remove(NAME)
            if list(supports) == PODMAN_JSON_RUNTIMES:
                del engine["runtime_supports_json"]
        if engine.get("runtime") == NAME:
            del engine["runtime"]
    _prune(document, ["engine", "runtimes", NAME])
    if isinstance(document.get("engine"), dict) and not document["engine"] and "#" not in text:
        del document["engine"]
    return tomlkit.dumps(document) if document or "#" in text else ""


def add_crio(_text: str, runtime: str) -> str:
    """The whole drop-in for crio.conf.d: the file is ours."""
    return (
        "# Written by `clipshim install crio`; `clipshim uninstall crio` removes it.\n"
        f"[crio.runtime.runtimes.{NAME}]\n"
        f"runtime_path = {json.dumps(runtime)}\n"
        'runtime_type = "oci"\n'
        'runtime_root = "/run/runc"\n'
    )


def remove_crio(_text: str) -> str:
    """Nothing: the drop-in is ours."""
    return ""


def _json_object(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        document = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"daemon.json: {exc}", hint="dockerd cannot read it either") from exc
    if not isinstance(document, dict):
        raise ConfigError(f"daemon.json: expected an object, got {type(document).__name__}")
    return document


def _json_text(document: dict[str, Any], like: str) -> str:
    """`document` indented as `like` is."""
    found = re.search(r'^([ \t]+)"', like, re.MULTILINE)
    indent = found.group(1) if found else "    "
    return json.dumps(document, indent=indent, ensure_ascii=False) + "\n"


def _toml(text: str, where: str) -> Any:
    try:
        return tomlkit.parse(text)
    except TOMLKitError as exc:
        raise ConfigError(f"{where}: {exc}") from exc


def _table(document: Any, *path: str, where: str) -> Any:
    """The table at `path`, made as far as it is missing."""
    here = document
    for depth, name in enumerate(path):
        if name not in here:
            # Only the last level gets a [header] of its own.
            here[name] = tomlkit.table(is_super_table=depth < len(path) - 1 and not here.get(name))
        here = here[name]
        if not isinstance(here, dict):
            raise ConfigError(f"{where}: {'.'.join(path[: depth + 1])}: expected a table")
    return here


def _prune(document: Any, path: list[str]) -> None:
    """Removes the item at `path` and the tables above it that become empty."""
    parents = [document]
    for name in path[:-1]:
        following = parents[-1].get(name)
        if not isinstance(following, dict):
            return
        parents.append(following)
    if path[-1] not in parents[-1]:
        return
    for parent, name in zip(reversed(parents), reversed(path), strict=True):
        if name == path[-1] or not parent[name]:
            del parent[name]
        else:
            break
