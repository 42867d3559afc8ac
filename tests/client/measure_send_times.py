"""Does the client send on time? 2,000 requests at 200 a second (Poisson) against a stub server in another process.

    python -m tests.client.measure_send_times [--stream]

Not a test: a busy machine would fail it. Prints how far planned and actual send times are apart, as the client reports it and
as the stub saw the requests come in (both processes read the machine's one monotonic clock).
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from aiohttp import web

from client.main import main as run_client

TOKENS, SECONDS_A_TOKEN = 10, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=200.0, help="a second")
    parser.add_argument("--stream", action="store_true", help=f"streamed answers of {TOKENS} tokens")
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    stub = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    stub.start()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--url", here.recv(), "--out", folder, "--numsamples", str(args.requests), "--numtokens_range", str(TOKENS)]
        flags += ["--arrivals", "gamma:burstiness=1", "--rate", str(args.rate), "--stream" if args.stream else "--no-stream"]
        status = run_client(flags)
        with (Path(folder) / "results.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    here.send("done")
    came: dict[int, float] = here.recv()
    lag = [float(row["sent_s"]) - float(row["planned_s"]) for row in rows]
    # The stub does not know when the plan began: the earliest it can have been is what the most punctual request says.
    at_stub = [came[int(row["seed"])] - float(row["planned_s"]) for row in rows]
    first = min(at_stub)
    print(f"\nexit status {status}, {sum(row['status'] == 'ok' for row in rows)} of {len(rows)} answered")
    print(f"planned to sent, by the client:     p50 {_ms(lag, 50)}, p99 {_ms(lag, 99)}, most {1e3 * max(lag):.2f} ms")
    spread = [value - first for value in at_stub]
    print(f"planned to seen by the stub, beyond the fastest: p50 {_ms(spread, 50)}, p99 {_ms(spread, 99)}")


def _ms(values: list[float], percent: float) -> str:
    return f"{1e3 * np.percentile(values, percent):.2f} ms"


def serve(pipe: Connection) -> None:
    """The stub: answers after some time, and says at the end when each request came, by its seed."""
    asyncio.run(_serve(pipe))


async def _serve(pipe: Connection) -> None:
    came: dict[int, float] = {}

    async def inference(request: web.Request) -> web.StreamResponse:
        at = time.perf_counter()
        body = await request.json()
        came[body["seed"]] = at
        if not body.get("stream"):
            await asyncio.sleep(SECONDS_A_TOKEN * body["num_tokens"])
            return web.json_response({"completion": body["prompt"] + " and", "num_tokens": body["num_tokens"], "mode": "stub"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(SECONDS_A_TOKEN)
            await response.write(b'data: {"choices": [{"index": 0, "text": " and", "finish_reason": null}]}\n\n')
        await response.write(
            b'data: {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 10}}\n\ndata: [DONE]\n\n'
        )
        return response

    async def other(request: web.Request) -> web.Response:
        return web.json_response({"mode": "stub", "modes": {"stub": {}}, "data": [{"id": "stub"}]})

    app = web.Application()
    app.add_routes([web.post("/inference", inference), web.post("/v1/completions", inference)])
    app.add_routes([web.route("*", "/{any:.*}", other)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
    await site.start()
    pipe.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
    await asyncio.to_thread(pipe.recv)
    pipe.send(came)
    await runner.cleanup()


if __name__ == "__main__":
    main()
