"""Attention and feed-forward part side by side: x + (attention(norm(x)) + mlp(norm(x))). GPT-NeoX, GPT-J, Phi, Falcon, Cohere.

The branches are added first, as transformers adds them: in bf16 a sum with the larger x is rounded once, not twice.

With `one_norm` both branches read one norm of the layer's input, `input_layernorm`; with `two_norms` each has its own, where
megatron-core has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from formats.errors import UserError
from trainer.layers.norms import norm
from trainer.layers.spec import attention_parts, backend, has_experts, mlp_parts

ONE_NORM, TWO_NORMS = "one_norm", "two_norms"


class ParallelResidualLayer(TransformerLayer):
    """A layer whose feed-forward part reads the layer's input, not what attention has added to it.

    Dropout, recomputation and the fused sum of bias, dropout and residual are megatron-core's; what it takes for the residual of
    the feed-forward part is the output of attention.
    """

    _layer_input: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return (output [sequence, batch, hidden], context) as TransformerLayer does."""
        self._layer_input = hidden_states
        try:
            branches, context = super().forward(hidden_states, *args, **kwargs)
            return hidden_states + branches, context
        finally:
            self._layer_input = None

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input of the feed-forward part, and the output of attention, which its output is added to."""
        return super()._forward_pre_mlp_layernorm(self._layer_input), hidden_states


class SharedNormLayer(ParallelResidualLayer):
    """The same with one norm for both branches. It is computed once for each: attention may discard its result to save memory."""

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = super()._forward_pre_mlp_layernorm(hidden_states)
        return self.input_layernorm(normed), residual


def parallel_residual(provider: Any, layer: Any) -> None:
    """Add both branches to the layer's input if `provider.parallel_residual` says so."""
    kind = provider.parallel_residual
    if kind is None:
        return
    if kind not in (ONE_NORM, TWO_NORMS):
        raise UserError(f"`model.parallel_residual` is `{kind}`", hint=f"set it to `{ONE_NORM}`, `{TWO_NORMS}` or null")
    if not provider.pre_layernorms:
        raise UserError(
            f"`model.parallel_residual` is `{kind}`, and `model.pre_layernorms` is `False`",
            hint="parallel branches read a norm of the layer's input: leave one of the two out",
        )
    layer.module, layer.submodules.self_attn_bda = ParallelResidualLayer, _add_bias_and_drop
    if kind == ONE_NORM:
        layer.module = SharedNormLayer
        _share_input_norm(provider, layer)


def _add_bias_and_drop(training: bool, _fused: bool) -> Callable[..., torch.Tensor]:
    """Return a replacement for megatron-core's `bias_dropout_add` that does not add the residual."""

    def add(branch: tuple[torch.Tensor, torch.Tensor | None], _residual: torch.Tensor, dropout: float) -> torch.Tensor:
        output, bias = branch
        return torch.nn.functional.dropout(output if bias is None else output + bias, dropout, training)

    return add


def _share_input_norm(provider: Any, layer: Any) -> None:
    attention_parts(layer).linear_qkv = backend(layer).column_parallel_linear()
    if not has_experts(layer):
        mlp_parts(layer).linear_fc1 = backend(layer).column_parallel_linear()
    layer.submodules.input_layernorm = norm(provider, layer)
    layer.submodules.pre_mlp_layernorm = IdentityOp
    # megatron-core's local layers save it under the name that it has inside Transformer Engine's fused projection.
    layer.submodules.sharded_state_dict_keys_map.pop("input_layernorm.", None)
