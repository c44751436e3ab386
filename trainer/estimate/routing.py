"""How many pairs of a token and an expert one rank computes in a layer, where routing is even or as uneven as can be.

After megatron-core's dispatchers: each rank routes its own tokens, expert-parallel ranks exchange them, and the tensor-parallel
ranks of an expert each compute what all of them have got.
"""

from __future__ import annotations

from typing import Any


def even_pairs(model: Any) -> float:
    """Return the pairs of a rank for each token of a microbatch, before ranks divide it, if all experts get as many."""
    return _routed(model, 1.0)


def most_pairs(model: Any) -> float:
    """Return the same for a rank whose experts get every token of all expert-parallel ranks, up to their capacity. A token has
    no expert twice, so a rank gets it at most as often as it has experts."""
    if model.moe_router_force_load_balancing:
        return even_pairs(model)
    ranks, chosen = model.expert_model_parallel_size, model.moe_router_topk
    return _routed(model, ranks * min(chosen, model.num_moe_experts // ranks) / chosen)


def _routed(model: Any, load: float) -> float:
    """Return the pairs of a rank that gets `load` times as many as on average."""
    factor, most = model.moe_expert_capacity_factor, model.num_moe_experts / model.moe_router_topk
    if factor is not None:
        padded = model.moe_pad_expert_input_to_capacity
        load = min(factor, most) if padded else min(factor, load)
    tensor = model.tensor_model_parallel_size
    gathered = model.expert_tensor_parallel_size or tensor
    return model.moe_router_topk * load * gathered / (tensor if model.sequence_parallel else 1)
