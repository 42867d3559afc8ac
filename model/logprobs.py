"""Log probabilities of tokens under the model itself: before temperature, top_k and top_p."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from batching.request import Logprob, Request


class Scores(NamedTuple):
    """On their way to the host. `places`: whose token, and where in its tokens."""

    places: list[tuple[Request, int]]
    chosen: torch.Tensor  # (n,)
    best: torch.Tensor  # (n, most alternatives)
    ids: torch.Tensor  # of the best

    @classmethod
    def of(cls, slices: Iterable[tuple[torch.Tensor, torch.Tensor]], places: Sequence[tuple[Request, int]]) -> "Scores":
        """Slices of (logits (n, vocab) float32, the tokens (n,) int64 that follow), together as many as `places`."""
        most = max(req.num_logprobs or 0 for req, _ in places)
        parts = []
        for logits, tokens in slices:
            logprobs = logits.log_softmax(-1)
            best, ids = logprobs.topk(min(most, logits.shape[1]))
            parts.append((logprobs.gather(-1, tokens[:, None])[:, 0], best, ids))
        return cls(list(places), *(torch.cat(kind).to("cpu", non_blocking=True) for kind in zip(*parts, strict=True)))

    def read(self) -> dict[str, dict[int, Logprob]]:
        """By request id and place. Only once the device has done its part."""
        found: dict[str, dict[int, Logprob]] = {}
        for (req, place), chosen, best, ids in zip(
            self.places, self.chosen.tolist(), self.best.tolist(), self.ids.tolist(), strict=True
        ):
            top = list(zip(ids, best, strict=True))[: req.num_logprobs or 0]
            found.setdefault(req.id, {})[place] = Logprob(chosen, top)
        return found
