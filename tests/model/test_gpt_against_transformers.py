"""Logits against transformers' GPT2LMHeadModel on the same random weights, in float32, within 1e-4."""

import pytest
import torch

from model.gpt import GPT
from tests.model.paged import PagedRun

TOLERANCE = 1e-4


def prompts(vocab: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def expected(oracle, tokens: list[int]) -> torch.Tensor:
    return oracle(torch.tensor([tokens])).logits[0]


def worst(actual: torch.Tensor, oracle, tokens: list[int]) -> float:
    return (actual - expected(oracle, tokens)).abs().max().item()


def mixed_run(model: GPT, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Whole prefill, chunked prefill and decodes of three sequences, mixed in the same steps."""
    a, b, c = sequences
    run = PagedRun(model, 3)
    steps = [
        [(0, a[:9])],
        [(0, a[9:10]), (1, b[:5])],
        [(1, b[5:16]), (0, a[10:11]), (2, c[:3])],
        [(2, c[3:4]), (1, b[16:17]), (0, a[11:])],
        [(2, c[4:]), (1, b[17:])],
    ]
    parts: list[list[torch.Tensor]] = [[], [], []]
    for chunks in steps:
        for (sequence, _), logits in zip(chunks, run.step(chunks), strict=True):
            parts[sequence].append(logits)
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("shape", ["small", "medium"])
def test_logits_agree_however_the_tokens_are_cut_into_steps(shape, request, load_twin):
    oracle, folder = request.getfixturevalue(shape)
    model = load_twin(folder)
    sequences = prompts(model.config.vocab_size, [13, 22, 9])
    assert expected(oracle, sequences[0]).std() > 0.1, "logits that say something"

    whole = PagedRun(model, 1)
    assert worst(whole.step([(0, sequences[1])])[0], oracle, sequences[1]) < TOLERANCE, "whole prefill"

    chunked = PagedRun(model, 1)
    parts = [chunked.step([(0, sequences[1][i : i + 5])])[0] for i in range(0, 22, 5)]
    assert worst(torch.cat(parts), oracle, sequences[1]) < TOLERANCE, "chunked prefill"

    decoded = PagedRun(model, 1)
    parts = [decoded.step([(0, [token])])[0] for token in sequences[2]]
    assert worst(torch.cat(parts), oracle, sequences[2]) < TOLERANCE, "decode"

    for tokens, logits in zip(sequences, mixed_run(model, sequences), strict=True):
        assert worst(logits, oracle, tokens) < TOLERANCE, "mixed batch"


def test_the_comparison_fails_when_any_one_tensor_is_zeroed(small, load_twin):
    oracle, folder = small
    model = load_twin(folder)
    sequences = prompts(model.config.vocab_size, [13, 22, 9])
    for name, tensor in model.named_parameters():
        kept = tensor.clone()
        tensor.zero_()
        assert worst(mixed_run(model, sequences)[1], oracle, sequences[1]) > 10 * TOLERANCE, name
        tensor.copy_(kept)
    assert worst(mixed_run(model, sequences)[1], oracle, sequences[1]) < TOLERANCE


@pytest.mark.thorough
def test_the_comparison_fails_at_the_medium_shape_when_any_one_tensor_is_zeroed(medium, load_twin):
    oracle, folder = medium
    model = load_twin(folder)
    tokens = prompts(model.config.vocab_size, [4])[0]
    right = expected(oracle, tokens)
    for name, tensor in model.named_parameters():
        kept = tensor.clone()
        tensor.zero_()
        assert (PagedRun(model, 1).step([(0, tokens)])[0] - right).abs().max() > 10 * TOLERANCE, name
        tensor.copy_(kept)


def test_attention_of_the_oracle_is_peaked(small):
    oracle, _ = small
    oracle.set_attn_implementation("eager")
    tokens = torch.tensor([prompts(211, [22])[0]])
    attention = oracle(tokens, output_attentions=True).attentions[0][0, :, -1]
    oracle.set_attn_implementation("sdpa")
    assert (attention.max(-1).values > 3 / 22).all()
