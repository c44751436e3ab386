"""Norms of query and key other than one weight for all heads, which megatron-core has.

`all_heads`: RMSNorm over the heads of all tensor-parallel ranks together, with a weight per channel (OLMo 2 and 3). `each_head`:
LayerNorm of each head, with a weight of its own and no bias (Command R+, StableLM 2 12B).

Every rank holds the whole weight, a few KiB, and uses the part of its heads. The gradient is zero outside that part, and
megatron-core sums the gradients of `q_layernorm` and `k_layernorm` over all tensor-parallel ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region

from formats.errors import UserError
from trainer.layers.spec import attention_parts

HEAD = "head"


def head_norms(provider: Any, layer: Any) -> None:
    """Give query and key the norms of `provider.qk_layernorm_scope`, if they have any."""
    scope = provider.qk_layernorm_scope
    if scope != HEAD and scope not in _NORMS:
        supported = ", ".join(f"`{name}`" for name in (HEAD, *_NORMS))
        raise UserError(f"`model.qk_layernorm_scope` is `{scope}`", hint=f"set it to one of {supported}")
    if scope == HEAD or not provider.qk_layernorm:
        return
    if provider.layernorm_zero_centered_gamma or provider.multi_latent_attention:
        raise UserError(
            f"`model.qk_layernorm_scope` is `{scope}`, which cannot be done with zero-centred norms or MLA",
            hint=f"set `model.qk_layernorm_scope={HEAD}`",
        )
    parts = attention_parts(layer)
    parts.q_layernorm = partial(_NORMS[scope], heads=provider.num_attention_heads)
    parts.k_layernorm = partial(_NORMS[scope], heads=provider.num_query_groups)


class _HeadNorm(torch.nn.Module):
    """A norm of this rank's heads [sequence, batch, heads, head_dim], with a weight [*shape] of all `heads`."""

    def __init__(self, config: Any, hidden_size: int, eps: float, heads: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(shape, dtype=config.params_dtype))
        self.group, self.heads, self.eps = parallel_state.get_tensor_model_parallel_group(), heads, eps
        self.head_dim = hidden_size

    def local_weight(self, heads: int) -> torch.Tensor:
        """Return the weight [heads, head_dim] of this rank's heads. Ranks share a head where there are fewer heads than ranks."""
        first = self.group.rank() * self.heads // self.group.size()
        return self.weight.view(self.heads, self.head_dim)[first : first + heads]


class AllHeadsNorm(_HeadNorm):
    """RMSNorm over all heads of all ranks. The weight is [heads · head_dim]."""

    def __init__(self, *, config: Any, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__(config, hidden_size, eps, heads, (heads * hidden_size,))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the norm of this rank's heads [sequence, batch, heads, head_dim], computed in fp32."""
        exact = states.float()
        squares = exact.square().mean((-2, -1), keepdim=True) / self.group.size()
        mean = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares, self.group), self.group)
        return (exact * torch.rsqrt(mean + self.eps) * self.local_weight(states.shape[-2])).type_as(states)


class EachHeadNorm(_HeadNorm):
    """LayerNorm of each head by itself. The weight is [heads, head_dim]."""

    def __init__(self, *, config: Any, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__(config, hidden_size, eps, heads, (heads, hidden_size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the norm of this rank's heads [sequence, batch, heads, head_dim], computed in fp32."""
        normed = torch.nn.functional.layer_norm(states.float(), states.shape[-1:], eps=self.eps)
        return (normed * self.local_weight(states.shape[-2])).type_as(states)


_NORMS = {"all_heads": AllHeadsNorm, "each_head": EachHeadNorm}
