"""The dashboard of a server with keys, in a real browser: logging in, students who watch, a teacher who switches."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from ..server_process import ServerProcess


@pytest.fixture(scope="module")
def guarded(start_process: Callable[..., ServerProcess]) -> ServerProcess:
    keys = {"BATCHLAB_API_KEY": "class", "BATCHLAB_TEACHER_KEY": "chalk"}
    return start_process("dynamic", "--model", "demo", "--max-batch-size", "8", **keys).wait_until_ready()


def log_in(page: Page, key: str) -> None:
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Log in").click()


def test_a_wrong_key_is_told_and_the_right_one_leads_to_the_dashboard(
    open_page: Callable[..., Page], guarded: ServerProcess
) -> None:
    page = open_page(guarded.url)
    assert page.url.endswith("/login")
    log_in(page, "clasp")
    expect(page.get_by_role("alert")).to_have_text("That is not a key of this server.")
    log_in(page, "class")
    expect(page.locator("#connection")).to_have_text("live")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Key")).to_be_visible()
    page.goto(guarded.url)
    assert page.url.endswith("/login")


def test_students_watch_what_the_teacher_does(open_page: Callable[..., Page], guarded: ServerProcess) -> None:
    student, teacher = open_page(guarded.url), open_page(guarded.url)
    log_in(student, "class")
    log_in(teacher, "chalk")
    expect(student.locator("#students")).to_be_visible()
    expect(student.get_by_role("button", name="static")).to_be_disabled()
    expect(student.get_by_role("button", name="Fire")).to_be_disabled()
    expect(teacher.locator("#students")).to_be_hidden()

    teacher.get_by_role("button", name="static").click()
    expect(student.locator("#fact-mode")).to_have_text("static")
    teacher.get_by_label("output lengths").fill("20 60")
    teacher.get_by_role("button", name="Fire").click()
    expect(student.locator("#fact-busy")).to_have_text("8 of 8")
    student.get_by_role("button", name="Go on").click()
    expect(student.locator("#said")).to_contain_text("The text is complete")
