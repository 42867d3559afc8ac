"""The body of POST /inference."""

import uuid
from typing import Any

from api.errors import bad
from api.fields import MAX_TEMPERATURE, check_prompt, instead, number, priority, read_seed, stops, whole
from batching.policy import Limits
from batching.random_streams import random_streams
from batching.request import Request, SamplingParams
from model.ending import Ending
from model.tokenizer import Tokenizer

TEMPERATURE, TOP_K = 0.6, 40  # where a call does not say: small models repeat themselves when they are greedy
FIELDS = ("prompt", "num_tokens", "priority", "temperature", "top_k", "top_p", "seed", "stop", "deadline_s")


def read_inference(body: dict[str, Any], tokenizer: Tokenizer, limits: Limits, now: float) -> Request:
    """The request that `body` asks for. Raises ApiError naming the field and its limit."""
    for name in body:
        if name not in FIELDS:
            raise bad(str(name)[:100], f"no such field; there are: {', '.join(FIELDS)}")
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise bad("prompt", "must be a text of at least one character" + instead(body, "prompt"))
    num_tokens = whole(body, "num_tokens", None, 1, limits.max_context - 1)
    tokens = tokenizer.encode(check_prompt(prompt, limits))
    if len(tokens) + num_tokens > limits.max_context:
        named = "prompt" if len(tokens) >= limits.max_context else "num_tokens"
        most = f"prompt and num_tokens together may be at most {limits.max_context} (the model's context)"
        raise bad(named, f"the prompt has {len(tokens)} tokens, num_tokens is {num_tokens}; {most}")
    ending = Ending(tokenizer, stops(body))
    deadline_s = number(body, "deadline_s", None, 0.001, 1e9)
    return Request(
        id=uuid.uuid4().hex,
        tokens=tokens,
        max_tokens=num_tokens,
        priority=priority(body),
        arrival=now,
        deadline=None if deadline_s is None else now + deadline_s,
        sampling=SamplingParams(
            temperature=number(body, "temperature", TEMPERATURE, 0.0, MAX_TEMPERATURE) or 0.0,
            top_k=whole(body, "top_k", TOP_K, 0, tokenizer.vocab_size),
            top_p=number(body, "top_p", 1.0, 1e-6, 1.0) or 1.0,
            stream=random_streams(read_seed(body), [tokens])[0],
        ),
        stop=ending,
    )
