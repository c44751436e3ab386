"""From the logits of one position to the token that is chosen. Knows one rank and one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from formats.errors import UserError

NO_NUMBER = -1
"""What `choose` answers where the logits are no numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen. UserError for settings that mean nothing."""

    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 samples what the model says."""

    top_k: int | None = None
    """Sample among so many of the likeliest tokens."""

    top_p: float | None = None
    """Sample among the fewest tokens that have this much of the probability together."""

    seed: int = 1234
    """Prompt number i, from 0, draws from `seed` + i: its text depends on no other prompt."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for name, value, fits, range_ in (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "more than 0, and 1 at most"),
        ):
            if not fits:
                raise UserError(f"`{name}` is `{value}`", hint=f"choose {range_}")
            if name != "temperature" and value is not None and self.temperature == 0:
                raise UserError(
                    f"`{name}` is `{value}`, but `temperature` is `0`, which always takes the likeliest token",
                    hint=f"set `temperature`, for example to 1, or leave `{name}` out",
                )

    def generator(self, number: int) -> torch.Generator:
        """Random numbers of prompt `number`, apart from those of training."""
        return torch.Generator().manual_seed(self.seed + number)


def filtered(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Logits [vocabulary] at a temperature above 0, minus infinity where `top_k` and then `top_p` leave a token out.

    Tokens as likely as the last one of `top_k` stay (Fan et al. 2018); `top_p` keeps the one that crosses it (Holtzman et
    al. 2020).
    """
    logits = logits / how.temperature
    if how.top_k is not None and how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
    if how.top_p is not None and how.top_p < 1:
        ascending, order = logits.sort()
        unlikely = ascending.softmax(0).cumsum(0) <= 1 - how.top_p
        unlikely[-1] = False
        logits = logits.index_fill(0, order[unlikely], -torch.inf)
    return logits


def choose(logits: torch.Tensor, how: Sampling, generator: torch.Generator) -> int:
    """A token for logits [vocabulary], which hold no padding. On the CPU, so that a seed means the same everywhere."""
    logits = logits.detach().to("cpu", torch.float32)
    if not torch.isfinite(logits).all():
        return NO_NUMBER
    if how.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(filtered(logits, how).softmax(0), 1, generator=generator))
