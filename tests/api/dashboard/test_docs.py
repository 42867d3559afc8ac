"""The page that shows /openapi.json, as a reader sees it: in light and dark, on a wide screen and on a phone."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from api.openapi import ROUTES

from ..server_process import ServerProcess

PHONE = {"width": 360, "height": 740}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_route_is_there_and_nothing_is_wider_than_a_phone(
    open_page: Callable[..., Page], server: ServerProcess, scheme: str
) -> None:
    page = open_page(server.url + "/docs", viewport=PHONE, color_scheme=scheme)
    expect(page.locator(".route")).to_have_count(len(ROUTES))
    page.evaluate("document.querySelectorAll('.route').forEach((route) => { route.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("performance.getEntriesByType('resource').every((e) => new URL(e.name).origin === location.origin)")


def test_a_link_opens_its_route_with_limits_example_and_statuses(open_page: Callable[..., Page], server: ServerProcess) -> None:
    page = open_page(server.url + "/docs#teaching.inference")
    route = page.locator("[id='teaching.inference']")
    expect(route).to_have_attribute("open", "")
    expect(route.locator("tr", has_text="num_tokens").first).to_contain_text("integer, 1 to 511")
    expect(route.locator("pre")).to_contain_text('"num_tokens":20')
    expect(route.locator(".statuses")).to_contain_text("429")
