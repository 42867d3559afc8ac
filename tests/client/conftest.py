"""Puts client/ on the path, as `python client/client.py` does, and starts a stub server for each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "client"), str(Path(__file__).parent)]

from client_stub import Stub  # noqa: E402 (found through the line above)


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the developer's own client/.env nor the environment may decide a test."""
    import arguments

    for name in ("IP", "API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(arguments, "ENV_FILE", tmp_path / ".env")
