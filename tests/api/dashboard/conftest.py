"""Debian's chromium, driven by Playwright, before the real server. A page with anything to complain about fails its test."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from ..server_process import ServerProcess

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 20_000


@pytest.fixture(scope="module")  # Playwright's event loop runs in this thread as long: no test after may find it
def browser() -> Iterator[Browser]:
    if not shutil.which(CHROMIUM):
        pytest.skip(f"there is no {CHROMIUM} (Debian: apt install chromium)")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(start_process: Callable[..., ServerProcess]) -> ServerProcess:
    return start_process("dynamic", "--model", "demo", "--max-batch-size", "8").wait_until_ready()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages, each as a new visitor; `complaints` lists what may stand on the console."""
    contexts: list[Any] = []
    found: list[str] = []
    expected: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(text in message.text for text in expected):
            found.append(message.text)

    def start(url: str, complaints: tuple[str, ...] = (), **context: Any) -> Page:
        expected.extend(complaints)
        contexts.append(browser.new_context(**context))
        page: Page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", listen)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.goto(url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert found == []


@pytest.fixture
def page(open_page: Callable[..., Page], server: ServerProcess) -> Page:
    page = open_page(server.url)
    page.wait_for_selector("#modes button")
    return page
