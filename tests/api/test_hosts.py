"""Host and Origin headers: to which names the server answers, and from whose pages it may be changed."""

from collections.abc import Callable

import pytest

from .conftest import Server

ROUTES = [("GET", "/health"), ("GET", "/"), ("GET", "/stats"), ("POST", "/inference"), ("PUT", "/mode"), ("GET", "/nothing")]
OURS = ["localhost", "localhost:8500", "LOCALHOST.", "127.0.0.1", "127.9.9.9:8500", "[::1]", "[::1]:8500"]
NOT_OURS = [
    "evil.example", "evil.example:8500", "localhost.evil.example", "evil-localhost", "10.0.0.1", "[::2]", "127.0.0.1.nip.io",
    "0.0.0.0", "[::1", "::1", "", "a b", "localhost:x", "localhost@evil.example", "\xe9", "127.0.0.1,evil.example",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_OURS)
def test_without_a_key_no_route_answers_to_a_name_that_is_not_ours(server: Server, name: str) -> None:
    for method, path in ROUTES:
        response = server.client.open(path, method=method, headers={"Host": name})
        assert response.status_code == 403, path
        error = response.get_json()["error"]
        assert (error["param"], error["code"]) == ("Host", "host_not_allowed")
        assert "--allowed-hosts" in error["message"]


@pytest.mark.parametrize("name", OURS)
def test_it_answers_to_its_own_names(server: Server, name: str) -> None:
    assert server.client.get("/health", headers={"Host": name}).status_code == 200


def test_it_answers_to_the_names_it_was_started_with(serve: Callable[..., Server]) -> None:
    server = serve(allowed_hosts=("lab.example", ".ngrok-free.app"), host="gpu-box")
    statuses = {
        name: server.client.get("/health", headers={"Host": name}).status_code
        for name in (
            "lab.example:443",
            "a.lab.example",
            "x.ngrok-free.app",
            "ngrok-free.app",
            "xngrok-free.app",
            "GPU-box",
            "10.0.0.1",
        )
    }
    assert list(statuses.values()) == [200, 403, 200, 200, 403, 200, 403]
    assert serve(allowed_hosts=("*",)).client.get("/health", headers={"Host": "evil.example"}).status_code == 200


def test_a_server_for_every_address_answers_to_addresses_and_not_to_names(serve: Callable[..., Server]) -> None:
    server = serve(host="0.0.0.0", insecure=True)
    assert server.client.get("/health", headers={"Host": "192.168.1.20:8500"}).status_code == 200
    assert server.client.get("/health", headers={"Host": "evil.example"}).status_code == 403


def test_with_a_key_a_name_says_nothing(serve: Callable[..., Server]) -> None:
    assert serve(api_key="class").client.get("/health", headers={"Host": "any.example"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://[::1", "null", "", "localhost", "http://evil.example", "http://localhost:1", "://", "[", "//["]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/inference"), ("PUT", "/mode"), ("POST", "/burst"), ("DELETE", "/burst"), ("POST", "/stats/reset"),
     ("POST", "/v1/files"), ("POST", "/v1/completions"), ("POST", "/login")],
)  # fmt: skip
def test_a_page_from_elsewhere_is_refused_whatever_its_origin_looks_like(
    server: Server, method: str, path: str, origin: str
) -> None:
    response = server.client.open(path, method=method, headers={"Origin": origin})
    assert (response.status_code, response.get_json()["error"]["code"]) == (403, "cross_site")
