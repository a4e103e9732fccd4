"""The one kind of skip that CI accepts: what the machine's kernel cannot do."""

from __future__ import annotations

from typing import NoReturn

import pytest

KERNEL_CANNOT = "kernel cannot: "


def kernel_cannot(reason: str) -> NoReturn:
    """Skips a test because the kernel lacks something; any other skip fails in CI."""
    pytest.skip(KERNEL_CANNOT + reason)
