"""Count the bytes that the forward pass keeps for the backward pass.

After Korthikanti et al. 2022 (arXiv:2205.05198, section 4), recounted for what megatron-core runs today: gated feed-forward
networks, grouped queries, flash attention (no matrix of scores), no dropout mask, fused norms, latent attention, Mamba-2 and
delta nets (`trainer.estimate.mixing`), experts that get as many tokens each or as many as they can, multi-token prediction,
frozen weights with adapters (Transformer Engine 2.20: `module/layernorm_linear.py`, `module/linear.py`). Packed rows on a GPU
cost as much as other rows of their length. Weights are not counted, nor copies that canonical adapters stack of theirs, about
1 % of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import batched
from typing import Any

from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.enums import AttnBackend

from trainer.estimate.adapters import Linear, adapter_of, first_trained, is_known, linears
from trainer.estimate.built import is_quantized
from trainer.estimate.linear_layers import STATISTICS, Layout, by_linear
from trainer.estimate.mixing import by_mixing, check
from trainer.estimate.routing import even_pairs, most_pairs
from trainer.estimate.shape import Shape, shape_of
from trainer.peft.dora import DoRA

LOGIT_TE, LOGIT_NATIVE, LOGIT_FP32 = 4, 10, 4
"""Bytes per logit. Transformer Engine's cross entropy writes gradients over bf16 logits; megatron-core's makes fp32 copies
of logits that are not fp32. Measured on H200s: what was over when all else was counted (docs/performance.md)."""

ROUTER = 8
"""Bytes per token and expert that a router keeps: scores and weights in fp32."""


def activations(
    model: Any,
    *,
    layers: Sequence[int],
    pp_rank: int,
    tokens: int,
    num_microbatches: int,
    sequence_length: int,
    peft: Any = None,
    uneven: bool = False,
) -> Iterator[tuple[str, int, str]]:
    """Yield name, bytes and reason of what one GPU of a pipeline rank keeps at its peak.

    `layers` are the layers that the rank computes, `tokens` those of one microbatch before ranks divide them. `model` is a
    finalized provider, frozen if there is `peft`. `uneven`: the rank's experts get as many tokens as they can.
    """
    shape = shape_of(model)
    check(shape)
    tokens //= model.context_parallel_size
    pairs = _pairs(model, uneven=uneven)
    parts = [_layer(shape, number, replace(_layout(model, number, sequence_length, peft), pairs=pairs)) for number in layers]
    parts = parts[_num_without_gradients(model, shape, layers, peft) :]
    layout = _layout(model, 0, sequence_length, peft)
    kept, working = _kept(model, shape, layout, parts, tokens)
    flying = _in_flight(model, pp_rank, num_microbatches)
    states = ", of states what a GPU's kernels keep" if any(kind.recurrence for kind in shape.kinds) else ""
    count = f"{len(parts)} layers{states}, {flying:g} microbatches at a time"
    yield "activations", int(sum(kept) * flying), _why(model, count, peft)
    if working:
        yield "recomputation", working, "what is computed again, at its largest"
    edge = tokens * shape.hidden * layout.wide // layout.shards
    if pp_rank == 0 and peft is None:
        yield "embedding", int(edge * flying), "its output"
    if pp_rank == model.pipeline_model_parallel_size - 1:
        # The output layer's weight has no gradient if it is frozen, for which it would keep its input.
        norm = (2 * edge, "its input and output") if peft is None else (edge, "its input; the output layer, frozen, keeps none")
        yield "final norm", *norm
        logit_bytes, predictions = _logit(model, layout), 1 + shape.mtp
        why = f"one microbatch{f', {predictions} predictions' if shape.mtp else ''}, {logit_bytes} bytes per logit"
        yield "logits", tokens * shape.padded_vocab // layout.tp * logit_bytes * predictions, why


def _pairs(model: Any, *, uneven: bool) -> float:
    return (most_pairs if uneven else even_pairs)(model) if model.num_moe_experts else 0.0


def _why(model: Any, layers: str, peft: Any) -> str:
    recompute = f"{model.recompute_granularity} recompute" if model.recompute_granularity else "nothing recomputed"
    if peft is None:
        return f"{layers}, {recompute}"
    if not is_known(peft):
        return f"{layers}, {recompute}; frozen layers keep no input; what `{type(peft).__name__}` keeps is not counted"
    magnitudes = ", and with a magnitude their output" if isinstance(peft, DoRA) else ""
    return f"{layers}, {recompute}; of frozen layers, those with an adapter keep their input, not quantized{magnitudes}"


def _num_without_gradients(model: Any, shape: Shape, layers: Sequence[int], peft: Any) -> int:
    """Return how many layers no gradient reaches, which keep nothing. Pipelines and recomputation pass gradients through every
    layer (`trainer.peft.attach`)."""
    if peft is None or model.pipeline_model_parallel_size > 1 or model.recompute_granularity:
        return 0
    return min(first_trained(peft, shape), len(layers))


def _logit(model: Any, layout: Layout) -> int:
    capped = 0 if getattr(model, "final_logit_softcapping", None) is None else layout.wide  # the output of tanh
    if layout.wide == LOGIT_FP32:
        return LOGIT_FP32 + capped
    fused = model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te"
    return (LOGIT_TE if fused else LOGIT_NATIVE) + capped


_ROUTER_DTYPES = {"fp32": 4, "fp64": 8}


def _layout(model: Any, number: int, sequence_length: int, peft: Any) -> Layout:
    """Return the layout of layer `number`."""
    tensor = model.tensor_model_parallel_size
    # Transformer Engine caps scores in its unfused attention, unless flash-attn is installed (`trainer.layers.scores`).
    capped = getattr(model, "attn_logit_softcapping", None) is not None
    unfused = capped or model.attention_backend in (AttnBackend.local, AttnBackend.unfused)
    wide = model.params_dtype.itemsize
    quantized = is_quantized(model, number)
    return Layout(
        tp=tensor,
        etp=model.expert_tensor_parallel_size or tensor,
        shards=tensor if model.sequence_parallel else 1,
        wide=wide,
        narrow=1 if quantized else wide,
        # With other scalings than delayed, megatron-core lets it keep attention's output as it is (`save_original_input`).
        projection=1 if quantized and model.fp8 and model.fp8_recipe == Fp8Recipe.delayed else 0,
        scores=sequence_length if unfused else 0,
        logit=_ROUTER_DTYPES.get(model.moe_router_dtype, wide),
        peft=peft,
    )


def _layer(shape: Shape, number: int, layout: Layout) -> dict[str, int]:
    """Return the bytes per token of one layer, by module that can be recomputed on its own."""
    kind, linear_layers = shape.kinds[number], list(linears(shape, number))
    mixing, feeding = ([linear for linear in linear_layers if linear.mixes == mixes] for mixes in (True, False))
    into_mixing, mixed = by_mixing(shape, kind, mixing, layout)
    into_mlp, feed_forward = 0, dict[str, int]()
    if kind.experts:
        into_mlp, feed_forward = _experts(shape, layout, feeding)
    elif kind.dense:
        into_mlp, of_mlp = _mlp(shape, feeding, layout, layout.tp, normed=True)
        feed_forward = {"mlp": of_mlp}
    return {
        "residual": kind.norms * (layout.wide * (shape.hidden // layout.shards) + STATISTICS),  # the inputs of norms
        "prediction": _prediction(shape, layout) if number >= shape.layers else 0,
        "layernorm": into_mixing + into_mlp,
        **mixed,
        **feed_forward,
    }


def _prediction(shape: Shape, layout: Layout) -> int:
    """Return the bytes per token that a layer of multi-token prediction keeps beside its transformer layer: the inputs of two
    norms, which its projection reads side by side, and the input and output of a last norm."""
    inputs = layout.narrow * 2 * shape.hidden if layout.peft is None else 0
    return (4 * layout.wide * shape.hidden + inputs) // layout.shards + 3 * STATISTICS


def _experts(shape: Shape, layout: Layout, inner: Sequence[Linear]) -> tuple[int, dict[str, int]]:
    """Return the bytes per token of the experts' input before it is dispatched, which router and dispatcher keep as it is, and of
    router and experts. Experts' outputs are not kept: what they weigh is multiplied inside them."""
    wide, hidden, (router, *linear) = layout.wide, shape.hidden, inner
    routed, shared = ([layer for layer in linear if (layer.expert is None) == of_all] for of_all in (False, True))
    not_sharded = replace(layout, shards=1)
    pairs = [_mlp(shape, pair, not_sharded, layout.etp, normed=False) for pair in batched(routed, 2)]
    entering, inner_outputs = (sum(pair[index] for pair in pairs) // len(pairs) for index in (0, 1))
    added = wide * shape.gates * shape.expert_ffn // layout.etp if shape.biases else 0  # with their biases, and without
    of_routed = int(layout.pairs * (entering + inner_outputs + added))
    of_router = (ROUTER * shape.num_experts + _router_adapter(router, layout)) // layout.shards
    _, of_shared = _mlp(shape, shared, layout, layout.tp, normed=False) if shared else (0, 0)
    of_shared += wide * hidden // layout.shards if shape.shared_gate else 0  # what the gate multiplies
    latent = 2 * wide * shape.expert_hidden // layout.shards if shape.expert_hidden != hidden else 0  # into experts and from them
    return wide * hidden // layout.shards, {"moe": of_routed + of_router + latent, "shared_experts": of_shared}


def _router_adapter(router: Linear, layout: Layout) -> int:
    """Return the bytes per token that a router's adapter keeps: its input, where it is not the router's own, and A·x."""
    added = adapter_of(layout.peft, router)
    if added is None:
        return 0
    dropped = layout.peft.dropout > 0
    another = layout.logit if dropped or layout.logit != layout.wide else 0
    return (another + dropped) * router.inputs + layout.logit * added.rank


def _mlp(shape: Shape, pair: Sequence[Linear], layout: Layout, ranks: int, *, normed: bool) -> tuple[int, int]:
    """Return the bytes per token of a feed-forward network's input, and of the first product's output and the second's input."""
    first, second = pair
    into, of_first = by_linear(first, layout, ranks, normed=normed)
    activated, of_second = by_linear(second, layout, ranks)
    return into, shape.gates * layout.wide * second.inputs // ranks + activated + of_first + of_second


def _kept(model: Any, shape: Shape, layout: Layout, parts: Sequence[dict[str, int]], tokens: int) -> tuple[list[int], int]:
    """Return the bytes that each layer keeps, and the most that recomputing one unit needs."""
    bytes_of_layers = [tokens * sum(part.values()) for part in parts]
    again = set(model.recompute_modules or ()) if model.recompute_granularity == "selective" else set[str]()
    if model.recompute_granularity != "full":
        kept = [tokens * sum(size for name, size in part.items() if name not in again) for part in parts]
        return kept, max((total - remaining for total, remaining in zip(bytes_of_layers, kept, strict=True)), default=0)
    unit = tokens * layout.wide * shape.hidden // layout.shards
    number = model.recompute_num_layers or 1
    if model.recompute_method == "block":
        return [unit] * min(number, len(bytes_of_layers)) + bytes_of_layers[number:], max(bytes_of_layers[:number], default=0)
    chunks = [bytes_of_layers[start : start + number] for start in range(0, len(bytes_of_layers), number)]
    return [unit] * len(chunks), max(map(sum, chunks), default=0)


def _in_flight(model: Any, pp_rank: int, num_microbatches: int) -> float:
    """Return the microbatches whose activations a pipeline rank keeps at once (megatron-core's 1F1B schedules). With virtual
    stages, parts of the rank's layers count as parts of a microbatch."""
    pipeline, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if not virtual or pipeline == 1:
        return min(num_microbatches, pipeline - pp_rank)
    group = model.microbatch_group_size_per_vp_stage or pipeline
    warm_up = 2 * (pipeline - pp_rank - 1) + (virtual - 1) * group
    return min(num_microbatches * virtual, warm_up + 1) / virtual
