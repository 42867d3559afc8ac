"""Attention over the paged KV cache, one signature with an implementation a kind of device, and what else a processor computes
faster in Numba. Knows tensors only.

Numba keeps compiled kernels on disk and compiles one anew when its file changes, but not when a file does from which it takes a
function. So the folder in which they are kept has a name that stands for all of these files.
"""

import atexit
import contextlib
import hashlib
import shutil
import tempfile
from pathlib import Path

import numba

_HERE = Path(__file__).parent
_SOURCES = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))
_KEPT = _HERE / "__pycache__" / f"compiled-{hashlib.sha256(_SOURCES).hexdigest()[:12]}"


def _folder() -> Path:
    """That one, or where it cannot be written a copy for this process alone: Numba takes none that it cannot write."""
    with contextlib.suppress(OSError):
        _KEPT.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=_KEPT).close()
        return _KEPT
    copy = Path(tempfile.mkdtemp(prefix="batchlab-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    if _KEPT.exists():
        shutil.copytree(_KEPT, copy, dirs_exist_ok=True)
    return copy


if not numba.config.CACHE_DIR:  # NUMBA_CACHE_DIR
    for _old in _HERE.glob("__pycache__/compiled-*"):
        if _old != _KEPT:
            shutil.rmtree(_old, ignore_errors=True)
    numba.config.CACHE_DIR = str(_folder())
