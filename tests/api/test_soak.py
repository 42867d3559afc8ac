"""A few seconds of `soak.py`: whether everything that it does is answered and given back. Memory takes its hour."""

from collections.abc import Callable

from .server_process import ServerProcess
from .soak import FLAGS, run


def test_after_a_little_of_everything_the_server_is_as_it_was(start_process: Callable[..., ServerProcess]) -> None:
    assert run(start_process("dynamic", *FLAGS).wait_until_ready(), minutes=0.25, seed=0)
