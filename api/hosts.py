"""Which names the server answers to where no key guards it. A page of any site can have its own name resolve to this machine
(DNS rebinding), and is then, to the browser, of the same origin as the server; but its requests still carry that name."""

import re
from collections.abc import Sequence
from ipaddress import ip_address

from flask import Flask, request

from api.errors import ApiError

HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::[0-9]*)?")


def register(app: Flask, host: str, allowed: Sequence[str]) -> None:
    """`host` is where the server listens; `allowed` are names, .NAME for one with all its subdomains, or *."""

    @app.before_request
    def _() -> None:
        named = request.headers.get("Host")
        if named is not None and not _is_ours(named, host, allowed):
            shown = named[:60]
            told = f"Host: this server does not answer to {shown!r}; --allowed-hosts at its start names what else it answers to"
            raise ApiError(403, told, "Host", "host_not_allowed")


def _is_ours(named: str, host: str, allowed: Sequence[str]) -> bool:
    if "*" in allowed:
        return True
    if (found := HOST.fullmatch(named)) is None:
        return False
    name = found[1].strip("[]").lower().removesuffix(".")
    if name in ("localhost", host.lower()) or any(_fits(name, one.lower()) for one in allowed):
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or host in ("0.0.0.0", "::")  # who names an address has not been led here by a name


def _fits(name: str, allowed: str) -> bool:
    return name == allowed.removeprefix(".") or (allowed.startswith(".") and name.endswith(allowed))
