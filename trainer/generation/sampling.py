"""Sample a token from the logits of one position, on one rank and for one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from formats.errors import UserError

NOT_FINITE = -1
"""Returned by `sample_token` if the logits are NaN or Inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is sampled. Raises UserError for invalid or contradictory settings.

    >>> sampling = Sampling(temperature=1.0, top_k=2)
    >>> filter_logits(torch.tensor([1.0, 3.0, 2.0]), sampling).tolist()
    [-inf, 3.0, 2.0]
    """

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's distribution."""

    top_k: int | None = None
    """Sample from this many of the most likely tokens."""

    top_p: float | None = None
    """Sample from the smallest set of tokens whose probabilities sum to this."""

    seed: int = 1234
    """Prompt i, from 0, has the seed `seed` + i, so its text does not depend on the other prompts."""

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, value, is_valid, expected in (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "more than 0, and 1 at most"),
        ):
            if not is_valid:
                raise UserError(f"`{name}` is `{value}`", hint=f"choose {expected}")
            if name != "temperature" and value is not None and self.temperature == 0:
                raise UserError(
                    f"`{name}` is `{value}`, but `temperature` is `0`, which always takes the most likely token",
                    hint=f"set `temperature`, for example to 1, or leave `{name}` out",
                )

    def generator(self, number: int) -> torch.Generator:
        """Return the random generator of prompt `number`; training's generators are not used."""
        return torch.Generator().manual_seed(self.seed + number)


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return logits [vocabulary] divided by the temperature, with -inf for tokens that `top_k`, then `top_p`, exclude.

    Tokens tied with the last one of `top_k` are kept (Fan et al. 2018). The token that crosses `top_p` is kept (Holtzman et al.
    2020).
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(0).cumsum(0) <= 1 - sampling.top_p
        unlikely[-1] = False
        logits = logits.index_fill(0, order[unlikely], -torch.inf)
    return logits


def sample_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token id for logits [vocabulary] without padding rows, or `NOT_FINITE`. Runs on the CPU, so that a seed gives the
    same
    token on any machine."""
    logits = logits.detach().to("cpu", torch.float32)
    if not torch.isfinite(logits).all():
        return NOT_FINITE
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(filter_logits(logits, sampling).softmax(0), 1, generator=generator))
