"""What a running server has taken and has to give back."""

import os
from pathlib import Path

import requests

from .server_process import ServerProcess

PATIENCE_S = 30


def state(server: ServerProcess) -> dict[str, float]:
    """What a request may have taken and not given back."""
    worker = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()[0]
    stats = requests.get(server.url + "/stats", headers={"Connection": "close"}, timeout=PATIENCE_S).json()
    memory = next(line for line in Path(f"/proc/{worker}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "running": stats["running"],
        "queue_depth": stats["queue_depth"],
        "kv_use": stats["kv_use"],
        "threads": len(os.listdir(f"/proc/{worker}/task")),
        "open files": len(os.listdir(f"/proc/{worker}/fd")),
        "memory, MB": round(int(memory.split()[1]) / 1024),
    }


def is_back(before: dict[str, float], now: dict[str, float]) -> bool:
    """Memory is another matter: it has to be watched over a time. A thread or connection is that of whoever asks."""
    return all(now[name] <= before[name] + (name in ("threads", "open files")) for name in before if name != "memory, MB")
