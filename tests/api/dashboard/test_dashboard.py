"""The dashboard as a class sees it: a real browser before the real server."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from playwright.sync_api import Page, expect

from batching.policies import POLICIES

from ..server_process import ROOT, ServerProcess, wait_for

PATIENCE_S = 20
ENGINE_IS_IDLE = "fetch('/stats').then((r) => r.json()).then((stats) => stats.running + stats.queue_depth === 0)"
NEWEST_IS_SHOWN = "fetch('/steps?limit=1').then((r) => r.json()).then(({ last }) => last === +moment.max)"


def fact(page: Page, name: str) -> str:
    return page.inner_text(f"#fact-{name}")


def picture(page: Page) -> str:
    """The timeline's pixels."""
    url: str = page.evaluate("document.getElementById('cells').toDataURL()")
    return url


def switch(page: Page, mode: str) -> None:
    page.get_by_role("button", name=mode, exact=True).click()
    expect(page.locator("#said")).to_have_text(f"The mode is {mode}.")


def fire(page: Page, requests: int = 24, prompts: str = "3 20", outputs: str = "4 30") -> None:
    """A burst, and its end."""
    page.get_by_label("requests").fill(str(requests))
    page.get_by_label("prompt lengths").fill(prompts)
    page.get_by_label("output lengths").fill(outputs)
    page.get_by_role("button", name="Fire").click()
    expect(page.locator("#said")).to_have_text(f"{requests} requests fired.")
    wait_for(lambda: page.evaluate(ENGINE_IS_IDLE), PATIENCE_S, "all requests answered")
    if page.locator("#live").is_disabled():  # it is not held back, so all of it is to be seen
        wait_for(lambda: page.evaluate(NEWEST_IS_SHOWN), PATIENCE_S, "the newest step on the page")
        idle(page)


def idle(page: Page) -> None:
    expect(page.locator("#fact-busy")).to_have_text("0 of 8")


def test_the_page_opens_with_all_its_parts(page: Page) -> None:
    expect(page.locator("#connection")).to_have_text("live")
    idle(page)
    assert page.locator("#modes button").all_inner_texts() == list(POLICIES)
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    assert page.locator(".js-plotly-plot").count() == 4
    assert page.evaluate("performance.getEntriesByType('resource').every((e) => new URL(e.name).origin === location.origin)")


def test_a_burst_moves_the_picture_the_figures_and_the_bars(page: Page) -> None:
    switch(page, "dynamic")
    before = picture(page)
    fire(page)
    assert picture(page) != before
    expect(page.locator("#chart-latency")).to_have_attribute("aria-label", re.compile("dynamic p50"))
    assert page.locator("#chart-latency .bars .point").count() >= 3
    assert page.locator("#why li").count() > 0
    assert "waits: all sequence slots are taken" in page.inner_text("#why")


def test_the_page_stats_metrics_and_the_client_tell_the_same_padding_whatever_is_in_the_picture(
    open_page: Callable[..., Page], server: ServerProcess, tmp_path: Path
) -> None:
    wide, narrow = (open_page(server.url, viewport={"width": width, "height": 800}) for width in (1900, 340))
    before = scraped(server)
    line = [sys.executable, "client/client.py", "--url", server.url, "--modes", "static", "--numsamples", "40", "--wait", "0"]
    line += ["--numtokens_range", "2", "9", "60", "--deferred", "0.25", "--report", str(tmp_path)]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stats, after = server.stats(), scraped(server)
    padding, computed = (after[name] - before[name] for name in ("padding_tokens", "computed_tokens"))
    assert padding / (padding + computed) == stats["padding_share"] > 0.2
    shown = f"{100 * stats['padding_share']:.1f} %"
    for page in (wide, narrow):
        expect(page.locator("#fact-padding")).to_have_text(shown)
        assert page.evaluate("+moment.max - +moment.min") > 0
    row = next(line for line in told.splitlines() if line.startswith("static "))
    assert shown in row
    (run,) = json.loads((tmp_path / "results.json").read_text())["modes"]
    assert run["doubts"] == []
    steps = run["steps"]
    assert sum(s["padding"] for s in steps) / sum(s["padding"] + s["computed"] for s in steps) == stats["padding_share"]

    latencies = {"e2el": "e2el", "ttft": "server_ttft", "tpot": "tpot"}
    for metric, key in latencies.items():
        wide.select_option("#metric", metric)
        expected = ", ".join(f"static p{rank} {stats['latency']['all'][key][f'p{rank}']:.2f} s" for rank in (50,))
        expect(wide.locator("#chart-latency")).to_have_attribute("aria-label", re.compile(re.escape(expected)))
    expect(wide.locator("#latency-of")).to_contain_text("static: 40 requests")
    expect(wide.locator("#latency-of")).not_to_contain_text("since step")


def scraped(server: ServerProcess) -> dict[str, float]:
    text = requests.get(server.url + "/metrics", timeout=10).text
    return {name: float(value) for name, value in re.findall(r"^batchlab_(\w+)_total{[^}]*} (\S+)$", text, re.MULTILINE)}


def test_a_reset_by_anybody_begins_the_figures_anew_on_every_page(page: Page, server: ServerProcess) -> None:
    switch(page, "static")
    fire(page)
    expect(page.locator("#fact-padding")).not_to_have_text("0 %")
    expect(page.locator("#latency-of")).to_contain_text("static: ")
    assert requests.post(server.url + "/stats/reset", timeout=10).ok
    expect(page.locator("#fact-padding")).to_have_text("0 %")
    expect(page.locator("#latency-of")).not_to_contain_text("static")


def test_static_wastes_slots_and_dynamic_does_not_and_the_page_shows_it(page: Page) -> None:
    bands = []
    for mode in ("static", "dynamic"):
        switch(page, mode)
        page.get_by_role("button", name="Reset statistics").click()
        fire(page)
        bands.append(page.evaluate("document.getElementById('bands').toDataURL()"))
        steps = page.evaluate("fetch('/steps').then((r) => r.json())")["steps"]
        own = [step for step in steps if step["mode"] == mode]
        padded = sum(step["cells"].count("x") for step in own[-30:])
        assert (padded > 0) == (mode == "static")
        expect(page.locator("#fact-mode")).to_have_text(mode)
        padding = float(fact(page, "padding").removesuffix(" %"))
        assert (padding > 20) == (mode == "static")
    assert bands[0] != bands[1]
    assert padding == 0


def test_somebody_elses_switch_shows_on_an_idle_page(page: Page, open_page: Callable[..., Page], server: ServerProcess) -> None:
    other = open_page(server.url)
    for mode in ("orca", "dynamic"):
        switch(other, mode)
        expect(page.locator(f"button[data-mode={mode}]")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#fact-mode")).to_have_text(mode)


def test_a_prompt_streams_its_text(page: Page) -> None:
    page.get_by_label("Prompt:").fill("The king")
    page.locator("#max-tokens").fill("300")
    page.get_by_role("button", name="Go on").click()
    answer = page.locator("#answer")
    expect(answer).to_contain_text("The king ")
    early = len(answer.inner_text())
    expect(page.locator("#said")).to_contain_text("The text is complete")
    assert len(answer.inner_text()) > early
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#said")).to_have_text("Stopped.")


def test_what_the_server_refuses_is_said_in_its_words(open_page: Callable[..., Page], server: ServerProcess) -> None:
    page = open_page(server.url, complaints=("400",))
    page.get_by_label("output lengths").fill("5000")
    page.get_by_role("button", name="Fire").click()
    expect(page.locator("#said")).to_contain_text("num_tokens: must be an integer between 1 and 511")
    expect(page.locator("#said")).to_have_class("wrong")


def test_pause_and_step_back_while_the_engine_goes_on(page: Page) -> None:
    fire(page)
    page.get_by_role("button", name="Pause").click()
    held = page.inner_text("#window")
    fire(page)
    assert page.inner_text("#window") == held
    page.get_by_role("button", name="one step back").click()
    last = int(held.split()[3].rstrip(","))
    assert f"to {last - 1}," in page.inner_text("#window")
    page.get_by_role("button", name="one step forward").click()
    assert page.inner_text("#window") == held
    page.get_by_label("moment").fill(str(last - 20))
    assert f"to {last - 20}," in page.inner_text("#window")
    page.get_by_role("button", name="Live").click()
    expect(page.locator("#window")).not_to_have_text(held)


def test_all_of_it_works_from_the_keyboard(page: Page) -> None:
    page.locator("h1").click()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        width = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
        shown = page.evaluate("document.activeElement.matches(':focus-visible')")
        assert (shown and width >= 3) or page.evaluate("['BODY', 'INPUT'].includes(document.activeElement.tagName)")
    assert {"cells", "pause", "moment", "save", "load", "theme", "describe", "reset", "metric", "prompt", "orca"} <= reached

    page.locator("button[data-mode=orca]").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("The mode is orca.")
    page.locator("#requests").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("64 requests fired.")
    idle(page)
    page.locator("#cells").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Go on").first).to_be_visible()
    page.keyboard.press("Home")
    first = page.inner_text("#readout")
    assert first.startswith("slot 0, step ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#readout").startswith("slot 1, step ")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()


def test_a_screen_reader_hears_what_the_picture_shows(page: Page) -> None:
    switch(page, "static")
    fire(page)
    page.get_by_role("button", name="Describe").click()
    told = page.inner_text("#said")
    assert told.startswith("Slot timeline: static, 0 of 8 slots held, 0 waiting, ")
    assert told.endswith(" % of what was computed was padding")
    assert page.locator("#cells").get_attribute("aria-label") == told
    assert page.locator("#said").get_attribute("aria-live") == "polite"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
            .filter((c) => !(c.getAttribute("aria-label") || c.labels?.length || c.textContent.trim()))
            .map((c) => c.outerHTML)"""
    )
    assert nameless == []


def test_a_recording_is_saved_and_opened_again(page: Page, tmp_path: Path) -> None:
    fire(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save recording").click()
    file = tmp_path / "steps.json"
    download.value.save_as(file)
    recording = json.loads(file.read_text())
    assert recording["slots"] == 8
    ids = [step["id"] for step in recording["steps"]]
    assert ids == list(range(ids[0], ids[-1] + 1))
    assert recording["steps"] == page.evaluate("fetch('/steps').then((r) => r.json())")["steps"][-len(recording["steps"]) :]

    page.locator("#load").set_input_files(file)
    expect(page.locator("#said")).to_contain_text(f"{len(recording['steps'])} steps")
    shown = page.inner_text("#window")
    fire(page)
    assert page.inner_text("#window") == shown
    page.get_by_role("button", name="Live").click()
    expect(page.locator("#window")).not_to_have_text(shown)


BAD_RECORDINGS = {
    "no JSON": ("[1", "JSON"),
    "no schema": ('{"slots": 4, "steps": []}', "the version that this page reads; there is none"),
    "a newer schema": (
        '{"schema": 2, "slots": 4, "steps": []}',
        "the version that this page reads; it is 2",
    ),
    "no slots": ('{"schema": 1, "steps": []}', "slots: must be a whole number from 1 to 4096"),
    "no steps": ('{"schema": 1, "slots": 4, "steps": []}', "steps: must be a list of at least one record"),
    "a record without an end": ('{"schema": 1, "slots": 4, "steps": [{"id": 1}]}', "steps[0].end: must be a number"),
}


@pytest.mark.parametrize("name", BAD_RECORDINGS)
def test_a_file_that_is_no_recording_is_refused_with_its_fault(page: Page, tmp_path: Path, name: str) -> None:
    text, told = BAD_RECORDINGS[name]
    (tmp_path / "bad.json").write_text(text)
    page.locator("#load").set_input_files(tmp_path / "bad.json")
    expect(page.locator("#said")).to_contain_text("bad.json: ")
    assert told in page.inner_text("#said")
    expect(page.locator("#connection")).to_have_text("live")


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1920, 1080)], ids=["phone", "projector"])
def test_nothing_sticks_out_at_the_side(open_page: Callable[..., Page], server: ServerProcess, width: int, height: int) -> None:
    page = open_page(server.url, viewport={"width": width, "height": height})
    fire(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("parseFloat(getComputedStyle(document.documentElement).fontSize)") >= (15 if width < 500 else 20)


def test_light_and_dark_follow_the_system_and_the_button(open_page: Callable[..., Page], server: ServerProcess) -> None:
    page = open_page(server.url, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Light / dark").click()
    assert page.evaluate(ground) == "rgb(255, 255, 255)" != dark
    page.reload()
    assert page.evaluate(ground) == "rgb(255, 255, 255)", "it is remembered"
