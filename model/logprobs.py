"""Log probabilities of tokens under the model itself: before temperature, top_k and top_p."""

from collections.abc import Sequence
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
    def of(cls, logits: torch.Tensor, tokens: torch.Tensor, places: Sequence[tuple[Request, int]]) -> "Scores":
        """logits: (n, vocab) float32; tokens: (n,) int64, those that follow."""
        logprobs = logits.log_softmax(-1)
        most = min(max(req.num_logprobs or 0 for req, _ in places), logits.shape[1])
        best, ids = logprobs.topk(most)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        return cls(list(places), *(tensor.to("cpu", non_blocking=True) for tensor in (chosen, best, ids)))

    def read(self) -> dict[str, dict[int, Logprob]]:
        """By request id and place. Only once the device has done its part."""
        found: dict[str, dict[int, Logprob]] = {}
        for (req, place), chosen, best, ids in zip(
            self.places, self.chosen.tolist(), self.best.tolist(), self.ids.tolist(), strict=True
        ):
            top = list(zip(ids, best, strict=True))[: req.num_logprobs or 0]
            found.setdefault(req.id, {})[place] = Logprob(chosen, top)
        return found
