"""Programs for which a folder that may not be written cannot be written, root's too."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def bound() -> list[str]:
    """What goes before a command: root may write anywhere, unless that power is taken away."""
    if os.getuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("as root, setpriv is needed (Debian: util-linux)")
    return ["setpriv", "--bounding-set", "-dac_override"]


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
