"""Mamba-2 in plain torch, for any device: what mamba_ssm and causal_conv1d compute in CUDA kernels for megatron-core.

The arithmetic is that of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, section 6): products inside chunks of a sequence, and a
state that goes from chunk to chunk. All sums are in fp32.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional

from trainer.torch_kernels import causal_conv1d


def scan(
    inputs: torch.Tensor,
    steps: torch.Tensor,
    decay: torch.Tensor,
    enters: torch.Tensor,
    leaves: torch.Tensor,
    *,
    chunk: int,
) -> torch.Tensor:
    """Return the outputs, [batch, tokens, heads, channels], of a linear recurrence over the states of heads, in fp32.

    A state becomes `state · exp(step · decay) + step · input ⊗ enters`, and its output is `state · leaves`. `inputs` are [batch,
    tokens, heads, channels], `steps` [batch, tokens, heads], `decay` [heads]; `enters` and `leaves`, [batch, tokens, groups,
    states], are those of a group of heads. Published as x, dt, A, B and C.
    """
    batch, tokens, heads, channels = inputs.shape
    groups, fill = enters.shape[2], -tokens % chunk
    shape = (batch, -1, chunk, groups, heads // groups)
    weighted = _chunks(inputs.float() * steps.float()[..., None], fill).view(*shape, channels)
    enters, leaves = (_chunks(vectors.float(), fill).view(*shape[:4], vectors.shape[-1]) for vectors in (enters, leaves))
    logs = _chunks(steps.float() * decay.float(), fill).view(shape).cumsum(dim=2)
    within_chunks = _inside(weighted, logs, enters, leaves)
    from_states = torch.einsum("zctgn,zcgrpn,zctgr->zctgrp", leaves, _states_before(weighted, logs, enters), logs.exp())
    return (within_chunks + from_states).reshape(batch, -1, heads, channels)[:, :tokens]


def _chunks(values: torch.Tensor, fill: int) -> torch.Tensor:
    """Add `fill` tokens of zeros at the end, which add nothing to states and let none decay."""
    return functional.pad(values, (*(0, 0) * (values.dim() - 2), 0, fill))


def _inside(weighted: torch.Tensor, logs: torch.Tensor, enters: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """Return what outputs have from tokens of their own chunk."""
    size = logs.shape[2]
    later = torch.ones(size, size, dtype=torch.bool, device=logs.device).triu(1)[..., None, None]
    between = (logs[:, :, :, None] - logs[:, :, None]).masked_fill(later, float("-inf")).exp()
    scores = torch.einsum("zctgn,zcugn->zctug", leaves, enters)
    return torch.einsum("zctugr,zcugrp->zctgrp", scores[..., None] * between, weighted)


def _states_before(weighted: torch.Tensor, logs: torch.Tensor, enters: torch.Tensor) -> torch.Tensor:
    """Return the state at the beginning of each chunk, [batch, chunks, groups, heads of a group, channels, states]."""
    to_end = (logs[:, :, -1:] - logs).exp()
    added_by_chunks = torch.einsum("zcugn,zcugr,zcugrp->zcgrpn", enters, to_end, weighted)
    decay_of_chunks, state, before = logs[:, :, -1].exp(), torch.zeros_like(added_by_chunks[:, 0]), list[torch.Tensor]()
    for number in range(added_by_chunks.shape[1]):
        before.append(state)
        state = state * decay_of_chunks[:, number, ..., None, None] + added_by_chunks[:, number]
    return torch.stack(before, dim=1)


class GroupedNorm(torch.nn.Module):
    """RMSNorm of each group of channels, with a weight for each channel of this rank; megatron-core's is mamba_ssm's."""

    tp_group: Any  # which megatron-core sets

    def __init__(
        self, size: int, *, eps: float, group_size: int, norm_before_gate: bool, device: Any = None, dtype: Any = None
    ) -> None:
        assert not norm_before_gate  # gates are applied before
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the norm over each group of the last axis."""
        grouped = states.float().unflatten(-1, (-1, self.group_size))
        normed = functional.rms_norm(grouped, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.float()).type_as(states)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return the weight, cut over tensor-parallel ranks."""
        state = self.state_dict(keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


class TorchMixer(MambaMixer):
    """megatron-core's Mamba-2 mixer without mamba_ssm and causal_conv1d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.multiple(mamba_mixer, HAVE_MAMBA_SSM=True, ExtendedRMSNorm=GroupedNorm):
            super().__init__(*args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, inference_context: Any = None, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Return the output of states, [tokens, batch, hidden]. While text is generated, all tokens are computed again for each
        new one: the cache holds their states before this layer."""
        if inference_context is None:
            return super().forward(hidden_states, **kwargs)
        new, cache = len(hidden_states), inference_context.key_value_memory_dict
        if inference_context.sequence_len_offset > 0:
            hidden_states = torch.cat([cache[self.layer_number], hidden_states])
        cache[self.layer_number] = hidden_states
        output, bias = super().forward(hidden_states, **kwargs)
        return output[-new:], bias

    def _ssm_prefill(self, zxBCdt: torch.Tensor, **_states: Any) -> torch.Tensor:  # noqa: N803 - megatron-core's
        """Return what training does: no state is kept for tokens to come."""
        return self._ssm_training(zxBCdt)

    def _ssm_training(self, zxBCdt: torch.Tensor, packed_seq_params: Any = None) -> torch.Tensor:  # noqa: N803 - megatron-core's
        """Return the gated and normed output, [tokens, batch, channels], of projected states, [tokens, batch, sections]."""
        assert packed_seq_params is None
        heads, groups = self.cp.nheads_local_tpcp, self.cp.ngroups_local_tpcp
        width, states = heads * self.headdim, groups * self.d_state
        gate, mixed, steps = zxBCdt.transpose(0, 1).split([width, width + 2 * states, heads], dim=-1)
        weight, bias = self.cp.get_conv1d_weight().squeeze(1), self.cp.get_conv1d_bias()
        mixed, _ = causal_conv1d(mixed, weight, bias=bias, activation="silu")
        inputs, enters, leaves = mixed.split([width, states, states], dim=-1)
        inputs = inputs.unflatten(-1, (heads, self.headdim))
        enters, leaves = (vectors.unflatten(-1, (groups, self.d_state)) for vectors in (enters, leaves))
        steps = functional.softplus(steps.float() + self.cp.get_dt_bias().float())
        decay = -torch.exp(self.cp.get_A_log().float())
        output = scan(inputs, steps, decay, enters, leaves, chunk=min(self.chunk_size, inputs.shape[1]))
        output = output + self.cp.get_D().float()[:, None] * inputs.float()
        gated = output.flatten(-2) * functional.silu(gate.float())
        return self.norm(self.cp.post_conv_ssm(gated.type_as(zxBCdt).transpose(0, 1).contiguous(), packed_seq_params))
