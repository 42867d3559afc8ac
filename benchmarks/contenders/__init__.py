"""The contenders, in the order of the table. Each imports its libraries when it is opened, in a process of its own."""

from functools import partial

from benchmarks.contenders.contender import Contender, Session, Setup


def ours(setup: Setup, dtype: str) -> Session:
    from benchmarks.contenders.ours import Engine

    return Engine(setup, dtype)


def ours_over_http(setup: Setup, dtype: str) -> Session:
    from benchmarks.contenders.ours_over_http import Server

    return Server(setup, dtype)


def static(setup: Setup, dtype: str) -> Session:
    from benchmarks.contenders.transformers_peer import StaticBatch

    return StaticBatch(setup, dtype)


def continuous(setup: Setup, dtype: str) -> Session:
    from benchmarks.contenders.transformers_peer import ContinuousBatching

    return ContinuousBatching(setup, dtype)


def ctranslate2(setup: Setup, dtype: str) -> Session:
    from benchmarks.contenders.ctranslate2_peer import CTranslate2

    return CTranslate2(setup, dtype)


def llama(setup: Setup, dtype: str, slots: int) -> Session:
    from benchmarks.contenders.llama_peer import LlamaServer

    return LlamaServer(setup, dtype, slots)


def effective_batching(setup: Setup, dtype: str) -> Session:
    from benchmarks.contenders.effective_batching import EffectiveBatching

    return EffectiveBatching(setup, dtype)


CONTENDERS = (
    Contender("ours", "bf16", ours),
    Contender("ours", "int8", ours),
    Contender("ours", "fp32", ours),
    Contender("ours default", "auto", ours),
    Contender("ours over HTTP", "auto", ours_over_http),
    Contender("transformers static", "bf16", static),
    Contender("transformers continuous", "bf16", continuous),
    Contender("transformers continuous", "fp32", continuous),
    Contender("CTranslate2", "int8", ctranslate2),
    Contender("CTranslate2", "bf16", ctranslate2),
    Contender("CTranslate2", "fp32", ctranslate2),
    *(
        Contender(f"llama.cpp {slots} slots", dtype, partial(llama, slots=slots))
        for dtype in ("BF16", "F16", "Q8_0")
        for slots in (64, 32)
    ),
    Contender("effective-batching", "fp32", effective_batching),
)
