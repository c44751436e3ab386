"""What layers report of a step beside the loss: auxiliary losses and loads of experts, and losses of multi-token prediction.

megatron-core's routers and prediction layers add up their own losses while they compute. Tokens per expert are counted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from trainer import device
from trainer.layers.pattern import layers_of_each

Numbers = dict[str, torch.Tensor]


class LayerMetrics(NamedTuple):
    """Numbers of a step over all ranks and microbatches, by the names that `records.Step` explains."""

    means: dict[str, float]
    layers: dict[str, list[float]]
    """The same layer by layer, with 0 for layers without experts; empty unless `model.moe_per_layer_logging` is set."""

    loads: Sequence[list[float]] = ()
    """`[layers, experts]`: the tokens of each expert over the mean of its layer's; empty likewise."""


def counter(chunks: Sequence[Any], config: Any) -> LayerCounter | None:
    """Return what counts a model's layers; None for a model without experts and without multi-token prediction."""
    if not isinstance(config, TransformerConfig) or not (config.num_moe_experts or config.mtp_num_layers):
        return None
    return LayerCounter(chunks, config)


class LayerCounter:
    """Counts tokens per expert in the routers of this rank's chunks, and collects what layers report.

    Recomputed layers are counted once, and evaluations not at all.
    """

    def __init__(self, chunks: Sequence[Any], config: TransformerConfig) -> None:
        self._config = config
        self._layers = config.num_layers * layers_of_each(config)
        rows = self._layers + (config.mtp_num_layers or 0)
        self._tokens = torch.zeros(rows, config.num_moe_experts or 0, device=device.current())
        self._assigned = 0
        destroy_moe_metrics_tracker()  # that of another run in this process
        MTPLossLoggingHelper.tracker.clear()
        for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)):
            router.register_forward_hook(self._count)

    def _count(self, router: Any, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not (router.training and torch.is_grad_enabled()):
            return
        probabilities, routing_map = output
        # A map that is padded to the experts' capacity has tokens in it that were not sent there.
        sent = probabilities != 0 if self._config.moe_pad_expert_input_to_capacity else routing_map
        row = router.layer_number - 1 + (self._layers if router.is_mtp_layer else 0)
        self._tokens[row] += sent.sum(dim=0)
        self._assigned += routing_map.shape[0] * router.topk

    def collect(self, microbatches: int) -> LayerMetrics:
        """Return the numbers of the step, and start again. All ranks call this: it is one all-reduce."""
        of_rank = {"tokens": self._tokens, "assigned": self._tokens.new_tensor([self._assigned]), **self._losses()}
        step = _summed(of_rank)
        self._clear()
        layers = {name: step[name] * scale / microbatches for name, scale in self._scales().items()}
        if not self._config.num_moe_experts:
            return LayerMetrics(self._predicted(step, microbatches), {})
        loads = _loads(step["tokens"])
        layers["max_expert_load"] = loads.amax(dim=1)
        with_experts = int((step["tokens"].sum(dim=1) > 0).sum())
        means = {name: values.sum().item() / max(with_experts, 1) for name, values in layers.items()}
        if self._config.moe_expert_capacity_factor is not None:
            means["dropped_tokens"] = 1 - (step["tokens"].sum() / step["assigned"].clamp(min=1)).item()
        means |= self._predicted(step, microbatches)
        if not self._config.moe_per_layer_logging:
            return LayerMetrics(means, {})
        return LayerMetrics(means, {name: values.tolist() for name, values in layers.items()}, loads.tolist())

    def _losses(self) -> Numbers:
        """Return what this rank's layers added up, with zeros for what only other ranks have."""
        metrics, rows = get_moe_metrics_tracker().metrics, len(self._tokens)
        losses = {name: metrics[name].values if name in metrics else self._tokens.new_zeros(rows) for name in self._scales()}
        none = self._tokens.new_zeros(self._config.mtp_num_layers or 0)
        return {**losses, "predicted": MTPLossLoggingHelper.tracker.get("loss_values", none)}

    def _scales(self) -> dict[str, float]:
        """Return each auxiliary loss that is on, by its name in megatron-core's log, and what makes the mean over ranks of the
        sum over ranks."""
        config, copies = self._config, parallel_state.get_data_parallel_world_size()
        names = {
            "aux_loss": ("load_balancing_loss", 1 / copies),
            "seq_aux_loss": ("seq_load_balancing_loss", 1 / copies),
            "global_aux_loss": ("global_load_balancing_loss", 1.0),  # each rank has its share of the loss over all
        }
        kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
        pairs = [(kinds, coefficients)] if isinstance(kinds, str) else list(zip(kinds, coefficients, strict=True))
        scales = dict(names[kind] for kind, coefficient in pairs if kind in names and coefficient)
        return scales | ({"z_loss": _mean_over_ranks()} if config.moe_z_loss_coeff else {})

    def _predicted(self, step: Mapping[str, torch.Tensor], microbatches: int) -> dict[str, float]:
        losses = (step["predicted"] * _mean_over_ranks() / microbatches).tolist()
        return {f"mtp_{number}_loss": loss for number, loss in enumerate(losses, 1)}

    def _clear(self) -> None:
        self._tokens.zero_()
        self._assigned = 0
        get_moe_metrics_tracker().clear()
        MTPLossLoggingHelper.clean_metrics_in_tracker()


def _mean_over_ranks() -> float:
    """Return the factor that makes a mean of a sum over the ranks of one pipeline stage."""
    return parallel_state.get_pipeline_model_parallel_world_size() / dist.get_world_size()


def _summed(numbers: Numbers) -> Numbers:
    """Return the sum of each tensor over all ranks, in fp64, in the CPU's memory: one copy waits for a GPU once."""
    flat = torch.cat([values.flatten().double() for values in numbers.values()])
    dist.all_reduce(flat)
    parts = flat.cpu().split([values.numel() for values in numbers.values()])
    return {name: part.view_as(values) for (name, values), part in zip(numbers.items(), parts, strict=True)}


def _loads(tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens of each expert over the mean of its layer's, `[layers, experts]`; 0 for layers without experts."""
    return tokens / tokens.mean(dim=1, keepdim=True).clamp(min=1e-9)
