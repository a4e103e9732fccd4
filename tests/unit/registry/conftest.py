"""Tests of registry access see no proxy and no log-in of the machine that they run on."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG"):
            monkeypatch.delenv(name)
