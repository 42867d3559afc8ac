"""Starts a stub server for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.client_stub import Stub


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the developer's own client/.env nor the environment may decide a test."""
    from client import arguments

    for name in ("IP", "API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(arguments, "ENV_FILE", tmp_path / ".env")
