# ruff: noqa: E501 - the texts are a page's, whose lines are not wrapped
"""Writes docs/modes.md from the policies themselves, so that the page and the files cannot part: `python docs/make_modes.py`.

Of each policy it takes the docstring of its file (rule, paper, what is left out), that of its class (whom it preempts, what it
reserves, whether it uses the prefix cache) and its parameters with their comments, and runs the command under SEE in virtual time
to show its figures. With `--check` it writes nothing, and fails where the page is not what it would write.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from batching.policies import POLICIES  # noqa: E402
from simulator.__main__ import main as simulate  # noqa: E402

HEAD = """# The modes

Made from the policies by `docs/make_modes.py`; edit [their files](../batching/policies), not this page. "Dynamic" here is what most of the field calls
*continuous* batching. What Triton Inference Server and TF Serving call dynamic batching (collect until a size or a time-out, then run) is
`static` here. Terms are defined in the [glossary](glossary.md). New here? Read `nobatch`,
`static`, `orca` and `dynamic` first.

| mode | preempts | reserves | prefix cache |
|---|---|---|---|
"""
PICTURE = """
![Six workloads: the gap that a long prompt makes, step sizes under a backlog, short jobs behind long ones, padding, shared prefixes, model variants as the load grows](images/schemes.png)

Each panel is one workload in virtual time, so that it does not depend on the machine (`python -m teaching.examples.schemes --out DIR` draws it
and prints the figures).

Below, each mode is compared with the most instructive alternative, on the same requests, in virtual time. `gpt2-medium` stands for the step times of
gpt2-medium on two cores of an AMD EPYC: expect a processor's speeds, not a GPU's. `--policy A,B` takes any of the modes.

On the server the iteration-level modes look alike unless slots or memory are short. With four slots `mixed` answers the immediate
requests before the deferred ones, and `fastserve` gives everybody a first token early:

```bash
./server.sh dynamic --model demo --max-batch-size 4
```

```bash
python client/client.py --modes orca,dynamic,mixed,fastserve --numsamples 64 --wait 0 --deferred 0.3
```
"""
LONG_PROMPTS = "--requests 200 --rate 1 --prompt 16-900 --output 8-64"
SEE = {  # what to run, and what to look at
    "nobatch": (
        "--policy nobatch,static,dynamic --requests 200 --rate 2 --prompt 16-128 --output 8-128",
        "One request at a time carries a third of the load, and the queue grows: look at its TTFT.",
    ),
    "static": (
        "--policy static,dynamic --requests 200 --rate 2 --prompt 16-128 --output 8-128",
        "Much of what it computes is padding, nobody is answered before the batch has ended, and late arrivals wait for the next batch.",
    ),
    "orca": (
        "--policy orca,dynamic --requests 200 --rate 3 --prompt 16-128 --output 8-256 --limit num_blocks=64",
        "With little memory its reservations keep batches small, though much of what is reserved is never used.",
    ),
    "dynamic": (
        "--policy orca,dynamic --requests 200 --rate 3 --prompt 16-128 --output 8-256 --limit num_blocks=32",
        "Without reservation requests are preempted and recomputed. Here it still pays off; with long prompts and little memory it does not, see "
        "`splitfuse`.",
    ),
    "mixed": (
        "--policy dynamic,mixed --requests 200 --rate 1.5 --deferred 0.5 --prompt 16-512 --output 8-128 --limit max_batch_size=8",
        "Immediate requests get their first token in half the time, at the cost of deferred ones. (The limit between tokens is this engine's own, "
        "0.63 s; batch size and preemptions are of the whole mode.)",
    ),
    "sarathi": (
        f"--policy orca,sarathi {LONG_PROMPTS} --policy-arg tbt_slo_ms=300",
        "A long prompt stops all decodes under `orca`: look at the p99 between tokens (ITL). Here it keeps to the limit of 0.3 s.",
    ),
    "splitfuse": (
        f"--policy dynamic,splitfuse {LONG_PROMPTS} --limit num_blocks=80",
        "With memory for one long prompt at a time, `dynamic` begins prompts that it has to give up again, hundreds of times; this begins none that does not fit.",
    ),
    "fastserve": (
        "--policy orca,fastserve --requests 200 --rate 1.5 --prompt 16-64 --output 1-256 --limit max_batch_size=8",
        "Everybody gets a first token soon, since short jobs pass long ones; the longest (E2EL p99) pay for it.",
    ),
    "sequence": (
        "--policy static,sequence --requests 256 --rate inf --prompt 16-64 --output 8-256 --limit max_batch_size=16",
        "Little is left of the padding, because rows of one batch are equally long; that is with a predictor that knows the lengths "
        "(`--policy-arg predictor=noisy` and `mean` do not).",
    ),
    "flover": (
        f"--policy orca,flover {LONG_PROMPTS} --limit lanes=2",
        "Decodes no longer wait for prompts. Here the second lane costs the first nothing, as if there were twice the hardware; with "
        "one lane (leave `--limit` out) they take turns.",
    ),
    "batchllm": (
        "--policy dynamic,batchllm --requests 200 --rate inf --prompt 64 --output 8-64 --limit num_blocks=128",
        "These requests share no prefixes, so the difference comes from admission alone: a request joins only if that can never need a "
        "preemption. With shared prefixes: `python -m teaching.examples.prefix`.",
    ),
    "deadline": (
        "--policy static,deadline --requests 400 --rate 3 --prompt 16-128 --output 8-64 --policy-arg deadline_ms=6000",
        "Requests that cannot meet their deadline are rejected at once (`errors`); the rest meet it. The choice among model variants: [ceng523](ceng523.md).",
    ),
}
COLUMNS = (
    "mode",
    "errors",
    "tokens/s",
    "batch",
    "padding",
    "preemptions",
    "TTFT p50, p99 (s)",
    "ITL p50, p99",
    "E2EL p50, p99",
)


def main(arguments: list[str]) -> int:
    page = HEAD
    facts = {name: facts_of(name) for name in POLICIES}
    for name, found in facts.items():
        page += f"| [`{name}`](#{name}) | {found['Preempts']} | {found['Reserves']} | {found['Prefix cache']} |\n"
    page += PICTURE
    for name in POLICIES:
        page += section(name)
    path = HERE / "modes.md"
    if "--check" in arguments:
        if path.read_text("utf-8") != page:
            print("docs/modes.md is not what the policies say: run python docs/make_modes.py", file=sys.stderr)
            return 1
        return 0
    path.write_text(page, "utf-8")
    return 0


def facts_of(name: str) -> dict[str, str]:
    """The lines `Name: value.` of a policy's class, continued lines joined."""
    found: dict[str, str] = {}
    key = ""
    for line in (inspect.getdoc(POLICIES[name]) or "").splitlines():
        if begins := re.match(r"([A-Z][a-z ]+): ", line):
            key = begins[1]
        found[key] = f"{found.get(key, '')} {line.removeprefix(f'{key}: ')}".strip().rstrip(".")
    return found


def section(name: str) -> str:
    module = importlib.import_module(POLICIES[name].__module__)
    rule = inspect.cleandoc(module.__doc__ or "")
    command, what = SEE[name]
    text = f"\n## {name}\n\n{rule}\n\n([batching/policies/{name}.py](../batching/policies/{name}.py))\n"
    if parameters := parameters_of(name):
        text += "\n| parameter | default | |\n|---|---|---|\n" + parameters
    return (
        text + f"\n```bash\npython -m simulator run --model gpt2-medium {wrapped(command)}\n```\n\n{table(command)}\n{what}\n"
    )


def parameters_of(name: str) -> str:
    """A row for each: name, default, and the comment beside it in the source."""
    params: Any = POLICIES[name].Params
    rows = ""
    for field in fields(params):
        line = next(line for line in inspect.getsource(params).splitlines() if line.strip().startswith(f"{field.name}:"))
        comment = line.partition("  # ")[2] or "as the flag of the same name"
        rows += f"| `{field.name}` | {field.default} | {comment} |\n"
    return rows


def wrapped(command: str) -> str:
    head, _, tail = command.partition(" --requests")
    return f"{head} \\\n    --requests{tail}"


def table(command: str) -> str:
    """Runs it, and shows the figures that tell modes apart; immediate and deferred requests apart where there are both."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        code = simulate(["run", "--model", "gpt2-medium", *shlex.split(command), "--report", folder])
        assert code == 0, command
        modes = json.loads((Path(folder) / "results.json").read_text("utf-8"))["modes"]
    text = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n"
    for mode in modes:
        groups = {name: group for name, group in mode["groups"].items() if name != "all"}
        both = len(groups) > 1
        for name, group in groups.items() if both else [("", mode["groups"]["all"])]:
            label = f"`{mode['mode']}`" + (f", {name}" if both else "")
            text += "| " + " | ".join([label, *cells(group, mode["server_stats"])]) + " |\n"
    return text


def cells(group: dict[str, Any], engine: dict[str, Any]) -> list[str]:
    spans = [f"{group[name]['p50']:.2f}, {group[name]['p99']:.2f}" for name in ("ttft", "itl", "e2el")]
    errors = sum(group["errors"].values())
    counts = [str(errors), f"{group['output_token_throughput']:.0f}", f"{engine['mean_batch_size']:.1f}"]
    return [*counts, f"{100 * engine['padding_share']:.0f}%", str(engine["preemptions"]), *spans]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
