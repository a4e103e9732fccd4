"""Platforms of images: this machine's, and which manifest of an image index fits one.

The order of preference follows containerd (platforms.Only): the same architecture's own variant,
then lower ones, then what the processor runs besides.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipshim.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "i386": ("386", ""),
}
_ALIASES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm", "i386": "386"}
_PART = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Platform:
    """os/architecture[/variant], normalised: amd64 is v1 and arm64 is v8 without saying so."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def host_platform() -> Platform:
    """This machine's."""
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform("linux", architecture, variant)


def parse_platform(text: str) -> Platform:
    """os/architecture[/variant], or an architecture alone. Raises UsageError."""
    parts = text.split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if len(parts) > 3 or not all(_PART.fullmatch(part) for part in parts):
        raise UsageError(f"platform {text!r}: expected os/architecture[/variant]")
    return _normal(parts[0], parts[1], parts[2] if len(parts) == 3 else "")


def platform_of(fields: Mapping[str, Any]) -> Platform:
    """The platform that a descriptor or an image config names."""
    values = [fields.get(name) for name in ("os", "architecture", "variant")]
    system, architecture, variant = (item if isinstance(item, str) else "" for item in values)
    return _normal(system or "unknown", architecture or "unknown", variant)


def rank(wanted: Platform, offered: Platform) -> int | None:
    """How well `offered` serves `wanted`: 0 is best, None not at all."""
    for place, candidate in enumerate(_acceptable(wanted)):
        if candidate == offered:
            return place
    return None


def best_match(wanted: Platform, offered: Sequence[Platform]) -> int | None:
    """The position of the best of `offered`, the first of equals; None if none fits."""
    ranks = [(rank(wanted, item), place) for place, item in enumerate(offered)]
    fitting = [(score, place) for score, place in ranks if score is not None]
    return min(fitting)[1] if fitting else None


def _normal(system: str, architecture: str, variant: str) -> Platform:
    system, architecture, variant = system.lower(), architecture.lower(), variant.lower()
    if architecture == "armhf" and not variant:
        variant = "v7"
    if architecture == "armel" and not variant:
        architecture, variant = "arm", "v6"
    architecture = _ALIASES.get(architecture, architecture)
    if variant.isdigit():
        variant = f"v{variant}"
    if (architecture, variant) in (("amd64", "v1"), ("arm64", "v8")):
        variant = ""
    if architecture == "arm" and not variant:
        variant = "v7"
    return Platform(system, architecture, variant)


def _acceptable(wanted: Platform) -> list[Platform]:
    """Everything that runs where `wanted` runs, best first."""
    result = []
    for architecture, variant in _downwards(wanted.architecture, wanted.variant):
        result.append(Platform(wanted.os, architecture, variant))
    return result


def _downwards(architecture: str, variant: str) -> list[tuple[str, str]]:
    number = int(variant[1:]) if re.fullmatch(r"v[0-9]", variant) else None
    if architecture == "amd64":
        levels = range(number or 1, 0, -1)
        chain = [("amd64", f"v{level}" if level > 1 else "") for level in levels]
        return [*chain, ("386", "")]
    if architecture == "arm64":
        chain = [("arm64", f"v{level}" if level > 8 else "") for level in range(number or 8, 7, -1)]
        return [*chain, *(("arm", f"v{level}") for level in (8, 7, 6, 5))]
    if architecture == "arm" and number:
        return [("arm", f"v{level}") for level in range(number, 4, -1)]
    return [(architecture, variant)]
