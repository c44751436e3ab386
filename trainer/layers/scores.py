"""Attention whose scores are changed before the softmax: a bias that grows with distance (ALiBi), or a cap by tanh.

Transformer Engine has both: it takes ALiBi's slopes in each call, and newer versions take a cap. It chooses among its kernels:
for a cap flash-attn's, or else its unfused one, which keeps a score for each pair of tokens in memory.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention

from formats.errors import UserError
from trainer.layers.spec import attention_parts, uses_transformer_engine


def changed_scores(provider: Any, layer: Any) -> None:
    """Change the core attention of a layer's spec where the provider has ALiBi or a cap of scores."""
    if provider.alibi is None and provider.attn_logit_softcapping is None:
        return
    if not uses_transformer_engine(layer):
        attention_parts(layer).core_attention = Attention
        return
    if provider.attn_logit_softcapping is not None and not caps_scores():
        raise UserError(
            f"`model.attn_logit_softcapping` is `{provider.attn_logit_softcapping}`, and the installed Transformer Engine does "
            "not cap scores of attention",
            hint="install a newer one: `pip install --upgrade 'transformer-engine[pytorch]'`",
        )
    attention_parts(layer).core_attention = _of_transformer_engine()


def slopes(heads: int, *, bias_max: float = 8.0, scale: float = 1.0) -> torch.Tensor:
    """Return ALiBi's slope of each head, [heads], fp32 on the CPU (https://arxiv.org/abs/2108.12409).

    2^(-bias_max · i / n) for i = 1 … n, n being the largest power of 2 up to `heads`; then those that 2n heads have in between.

    >>> slopes(6).log2().tolist()
    [-2.0, -4.0, -6.0, -8.0, -1.0, -3.0]
    """
    power = 2 ** math.floor(math.log2(heads))
    exponents = [step / power for step in range(1, power + 1)]
    exponents += [step / (2 * power) for step in range(1, 2 * (heads - power), 2)]
    return scale * 2.0 ** (-bias_max * torch.tensor(exponents, device="cpu"))


def slopes_of_this_rank(provider: Any) -> torch.Tensor:
    """Return the slopes of the heads that this tensor-parallel rank has."""
    everyone = slopes(provider.num_attention_heads, **provider.alibi)
    return everyone.chunk(parallel_state.get_tensor_model_parallel_world_size())[parallel_state.get_tensor_model_parallel_rank()]


class Attention(DotProductAttention):
    """megatron-core's own attention, with scores that are changed before mask and softmax."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.scale_mask_softmax = _Changed(self.scale_mask_softmax, config)


class _Changed(torch.nn.Module):
    """A softmax of changed scores."""

    def __init__(self, softmax: Any, config: Any) -> None:
        super().__init__()
        self.softmax, self.cap = softmax, config.attn_logit_softcapping
        self.slopes = None if config.alibi is None else slopes_of_this_rank(config)

    def forward(self, scores: torch.Tensor, mask: torch.Tensor | None, offset: torch.Tensor | None = None) -> torch.Tensor:
        """Return the attention of each query to each key; `scores` are [batch, heads of this rank, queries, keys]."""
        changed = scores.float()
        if self.cap is not None:
            changed = self.cap * torch.tanh(changed / self.cap)
        if self.slopes is not None:
            changed = changed + self.slopes.to(scores.device)[:, None, None] * _distances(*scores.shape[-2:], scores.device)
        return self.softmax.forward_torch_softmax(changed, mask, offset).to(scores.dtype)


def _distances(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return how far each key is behind each query, negative, [queries, keys]; the last query is at the last key."""
    last = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device)[None] - last[:, None]


def caps_scores() -> bool:
    """Tell whether the installed Transformer Engine caps scores."""
    from transformer_engine.pytorch import DotProductAttention as Theirs  # noqa: PLC0415 - needs a GPU

    return "softcap" in inspect.signature(Theirs.__init__).parameters


@cache
def _of_transformer_engine() -> type:
    """Return the core attention of Transformer Engine's layers with ALiBi or a cap, as its configuration has."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention  # noqa: PLC0415 - needs a GPU
    from transformer_engine.pytorch import DotProductAttention as Theirs  # noqa: PLC0415

    class WithSlopes(Theirs):
        """What megatron-core's class calls: the arguments that it has no name for are added here."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Return the attention, [sequence, batch, heads · channels]."""
            if self.slopes is None:
                return super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs, core_attention_bias_type="alibi", alibi_slopes=_fresh(self.slopes))

    class Changed(TEDotProductAttention, WithSlopes):
        """megatron-core's class above the one with slopes."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.slopes = None if config.alibi is None else _on_gpu(slopes_of_this_rank(config))
            self.softcap = config.attn_logit_softcapping or 0.0

    return Changed


_known: dict[tuple[float, ...], torch.Tensor] = {}


def _on_gpu(slopes_of_heads: torch.Tensor) -> torch.Tensor:
    """Return slopes on this GPU, the same tensor for the same slopes."""
    return _known.setdefault(tuple(slopes_of_heads.tolist()), slopes_of_heads.cuda())


def _fresh(slopes_of_heads: torch.Tensor) -> torch.Tensor:
    """Return the slopes, after clearing Transformer Engine's cached bias of other slopes: its cache compares sizes alone."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as te_attention  # noqa: PLC0415

    if te_attention._alibi_cache["_alibi_slopes"] is not slopes_of_heads:
        te_attention._alibi_cache.update(_alibi_slopes_require_update=True, _alibi_bias_require_update=True)
    return slopes_of_heads
