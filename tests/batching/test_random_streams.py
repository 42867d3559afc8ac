"""The streams of a call's choices: the same for the same reasons, and otherwise nothing alike."""

from hashlib import blake2b
from itertools import pairwise

from batching.random_streams import random_streams

A, B = [464, 1468, 2156], [464, 1468, 2156, 379]
SEEDS = [-(2**63), -2, -1, 0, 1, 2, 10, 11, 2**32, 2**63 - 1]


def test_a_prompts_streams_are_the_same_alone_and_in_a_list():
    alone = random_streams(5, [B], 2)
    assert random_streams(5, [A, B, A], 2)[2:4] == alone
    assert random_streams(5, [B], 7)[:2] == alone, "of how many choices they are makes no difference"


def test_a_stream_is_a_blake2b_hash_of_tokens_occurrence_and_choice_keyed_by_the_seed():
    def stream(seed: int, tokens: list[int], occurrence: int, choice: int) -> int:
        words = b"".join(word.to_bytes(4, "little") for word in [*tokens, occurrence, choice])
        key = seed.to_bytes(8, "little", signed=True)
        return int.from_bytes(blake2b(words, key=key, digest_size=8).digest(), "little")

    assert random_streams(-3, [A, B, A], 2) == [stream(-3, *key) for key in (
        (A, 0, 0), (A, 0, 1), (B, 0, 0), (B, 0, 1), (A, 1, 0), (A, 1, 1)
    )]  # fmt: skip
    assert random_streams(10, [A]) == [8195158070966741506], "a seed's texts are the same in the next release"


def test_seeds_prompts_occurrences_and_choices_never_share_a_stream():
    prompts = [[i] * n for i in range(20) for n in range(4)] + [[0, 0, i] for i in range(3)]
    distinct = list(map(list, dict.fromkeys(map(tuple, prompts))))
    streams = [stream for seed in SEEDS for stream in random_streams(seed, distinct * 3, 4)]
    assert len(set(streams)) == len(streams) == len(SEEDS) * len(distinct) * 12
    assert all(0 <= stream < 2**64 for stream in streams)


def test_without_a_seed_every_call_has_streams_of_its_own():
    streams = [stream for _ in range(50) for stream in random_streams(None, [A, A, B], 2)]
    assert len(set(streams)) == 300


def test_of_two_neighbours_half_of_the_bits_differ():
    """Over neighbouring seeds, choices, occurrences and last tokens: what differs in one bit or two comes out unlike."""
    neighbours = [
        [random_streams(seed, [A])[0] for seed in range(-5000, 5000)],
        random_streams(3, [A], 10_000),
        random_streams(3, [A] * 10_000),
        random_streams(3, [[*A, last] for last in range(10_000)]),
    ]
    for streams in neighbours:
        apart = [f"{a ^ b:064b}" for a, b in pairwise(streams)]
        for bit in range(64):
            share = sum(bits[bit] == "1" for bits in apart) / len(apart)
            assert abs(share - 0.5) < 5 * 0.5 / len(apart) ** 0.5
