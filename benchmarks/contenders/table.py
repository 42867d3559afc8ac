"""The table that `benchmarks/peers.py` prints: each contender's best runs, and under it the ratios that decide."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.contenders.contender import UNKNOWN, Contender
from benchmarks.contenders.turn import Turn

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "BF16": 16, "F16": 16, "int8": 8, "Q8_0": 8}
PEERS = ("transformers", "CTranslate2", "llama.cpp")  # how their names begin


@dataclass
class Row:
    contender: Contender
    turns: list[Turn] = field(default_factory=list)
    note: str = ""  # why there are none, or no more
    failed: bool = False

    @property
    def dtype(self) -> str:
        return self.turns[0].dtype if self.turns else self.contender.dtype

    @property
    def is_peer(self) -> bool:
        return self.contender.name.startswith(PEERS)

    def best(self, workload: str) -> float | None:
        """Tokens per second of the best run of `workload`, W1 or W2."""
        return max(((turn.w1 if workload == "W1" else turn.w2).speed for turn in self.turns), default=None)


Wanted = Callable[[Row], bool]


def table(rows: Sequence[Row]) -> str:
    reference = reference_tokens(rows)
    lines = [f"{'contender':24} {'dtype':6} {'W1 tokens/s':>12} {'W2 tokens/s':>12} {'agrees':>8}", "-" * 66]
    for row in rows:
        w1, w2 = ("-" if (speed := row.best(workload)) is None else f"{speed:.1f}" for workload in ("W1", "W2"))
        line = f"{row.contender.name:24} {row.dtype:6} {w1:>12} {w2:>12} {agreement(row, reference):>8}  {row.note}"
        lines.append(line.rstrip())
    lines.append("")
    for title, ratio, against in ratios(rows):
        lines.append(f"{title:47} {'-' if ratio is None else f'{ratio:.2f}':>7}  {against}".rstrip())
    return "\n".join(lines)


def ratios(rows: Sequence[Row]) -> list[tuple[str, float | None, str]]:
    """Title, ratio, and the peer it is measured against; where one of the two is missing, None and which."""
    found: list[tuple[str, float | None, str]] = []

    def compare(title: str, mine: Wanted, other: Wanted, mine_on: str = "W1", other_on: str = "W1") -> None:
        above, below = _fastest(rows, mine, mine_on), _fastest(rows, other, other_on)
        if above is None or below is None:
            found.append((title, None, "not measured" if above is None else "no peer"))
        else:
            found.append((title, above[0] / below[0], below[1].contender.title if below[1].is_peer else ""))

    compare("W1: ours bf16 / best 16-bit peer", _is("ours", "bf16"), _peer_of(16))
    compare("W1: ours int8 / best 8-bit peer", _is("ours", "int8"), _peer_of(8))
    compare("W1: ours default / best peer of any dtype", _is("ours default"), lambda row: row.is_peer)
    compare("W2: ours int8 / llama.cpp Q8_0", _is("ours", "int8"), _llama("Q8_0"), "W2", "W2")
    compare("W2: ours bf16 / llama.cpp BF16", _is("ours", "bf16"), _llama("BF16"), "W2", "W2")
    for dtype in ("bf16", "int8", "fp32"):
        compare(f"ours {dtype}: dynamic (W1) / nobatch (W2)", _is("ours", dtype), _is("ours", dtype), "W1", "W2")
    compare("W1: ours fp32 / effective-batching", _is("ours", "fp32"), _is("effective-batching"))
    compare("W1: ours default / effective-batching", _is("ours default"), _is("effective-batching"))
    compare("W1: ours over HTTP / ours default (its engine)", _is("ours over HTTP"), _is("ours default"))
    return found


def reference_tokens(rows: Sequence[Row]) -> tuple[int, ...] | None:
    """The first tokens of W1 in float32, by a peer if there is one."""
    exact = sorted((row for row in rows if row.turns and row.dtype == "fp32"), key=lambda row: not row.is_peer)
    return exact[0].turns[0].w1.first_tokens if exact else None


def agreement(row: Row, reference: tuple[int, ...] | None) -> str:
    """For how many of W1's requests the first token is the reference's."""
    if not row.turns or reference is None or UNKNOWN in row.turns[0].w1.first_tokens:
        return "-"
    same = sum(token == exact for token, exact in zip(row.turns[0].w1.first_tokens, reference, strict=True))
    return f"{same}/{len(reference)}"


def _fastest(rows: Sequence[Row], wanted: Wanted, workload: str) -> tuple[float, Row] | None:
    speeds = [(speed, row) for row in rows if wanted(row) and (speed := row.best(workload))]
    return max(speeds, key=lambda pair: pair[0], default=None)


def _is(name: str, dtype: str | None = None) -> Wanted:
    return lambda row: row.contender.name == name and dtype in (None, row.dtype)


def _peer_of(bits: int) -> Wanted:
    return lambda row: row.is_peer and BITS[row.dtype] == bits


def _llama(dtype: str) -> Wanted:
    return lambda row: row.contender.name.startswith("llama.cpp") and row.dtype == dtype
