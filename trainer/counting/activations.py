"""What the forward pass keeps for the backward pass, in bytes.

After Korthikanti et al. 2022 (arXiv:2205.05198, section 4), counted anew for what megatron-core runs today: gated feed-forward
networks, grouped queries, flash attention (no matrix of scores), no dropout mask, fused norms, experts. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.enums import AttnBackend

from trainer.counting.shape import Shape, shape_of

LOGIT_TE, LOGIT_NATIVE, LOGIT_FP32 = 4, 10, 4
"""Bytes per logit. Transformer Engine's cross entropy writes gradients over bf16 logits; megatron-core's makes fp32 copies
of logits that are not fp32. Measured on H200s: what was over when all else was counted (docs/performance.md)."""

SCORE_COPIES = 2
"""Matrices of scores that attention without flash keeps: before and after the softmax."""

STATISTICS = 4
"""Bytes per token and norm or head that fp32 statistics take: a norm's deviation, a softmax's sum."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks divide a token's channels, and how wide one is."""

    tp: int
    etp: int
    shards: int
    """Ranks that share the tokens of norms and residuals: sequence parallelism."""

    wide: int
    """Bytes of one channel."""

    narrow: int
    """Bytes of one channel of a matrix product's input: FP8 keeps it quantized."""

    scores: int
    """Tokens of one row of the matrix of scores; 0 with flash attention."""


def activations(
    model: Any, *, layers: Sequence[int], pp_rank: int, tokens: int, num_microbatches: int, sequence_length: int
) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and reason of what one GPU of a pipeline rank keeps at its fullest. `layers` are those it computes, `tokens`
    those of one microbatch before ranks divide them. `model` is a finalized provider."""
    shape, layout = shape_of(model), _layout(model, sequence_length)
    tokens //= model.context_parallel_size
    whole = [tokens * sum(_layer(shape, number, layout).values()) for number in layers]
    kept, working = _kept(model, shape, layout, layers, tokens)
    flying = _in_flight(model, pp_rank, num_microbatches)
    recompute = f"{model.recompute_granularity} recompute" if model.recompute_granularity else "nothing recomputed"
    yield "activations", int(sum(kept) * flying), f"{len(whole)} layers, {flying:g} microbatches at a time, {recompute}"
    if working:
        yield "recomputation", working, "what is computed again, at its largest"
    edge = tokens * shape.hidden * layout.wide // layout.shards
    if pp_rank == 0:
        yield "embedding", int(edge * flying), "its output"
    if pp_rank == model.pipeline_model_parallel_size - 1:
        yield "final norm", 2 * edge, "its input and output"
        each = _logit(model, layout)
        yield "logits", tokens * shape.padded_vocab // layout.tp * each, f"one microbatch, {each} bytes per logit"


def _logit(model: Any, layout: Layout) -> int:
    if layout.wide == LOGIT_FP32:
        return LOGIT_FP32
    fused = model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te"
    return LOGIT_TE if fused else LOGIT_NATIVE


def _layout(model: Any, sequence_length: int) -> Layout:
    tensor = model.tensor_model_parallel_size
    unfused = model.attention_backend in (AttnBackend.local, AttnBackend.unfused)
    wide = model.params_dtype.itemsize
    return Layout(
        tp=tensor,
        etp=model.expert_tensor_parallel_size or tensor,
        shards=tensor if model.sequence_parallel else 1,
        wide=wide,
        narrow=1 if model.fp8 or model.fp4 else wide,
        scores=sequence_length if unfused else 0,
    )


def _layer(shape: Shape, number: int, layout: Layout) -> dict[str, int]:
    """Bytes per token of one layer, by what can be recomputed on its own."""
    wide, narrow, tp = layout.wide, layout.narrow, layout.tp
    hidden = shape.hidden // layout.shards
    norm_output = narrow * hidden
    parts = {
        "residual": 2 * (wide * hidden + STATISTICS),  # the inputs of both norms
        "layernorm": 2 * norm_output,
        "attention": wide * (shape.queries + 2 * shape.keys) // tp + narrow * shape.queries // tp,
        "core_attn": STATISTICS * shape.heads // tp + SCORE_COPIES * wide * shape.heads * layout.scores // tp,
    }
    if not shape.experts[number]:
        return {**parts, "mlp": _mlp(shape, shape.ffn, layout, tp)}
    routed = shape.active_experts * (wide * 2 * shape.hidden + _mlp(shape, shape.expert_ffn, layout, layout.etp))
    router = 2 * STATISTICS * shape.num_experts // layout.shards
    shared = _mlp(shape, shape.shared_ffn, layout, tp)
    return {**parts, "moe": routed // layout.shards + router, "shared_experts": shared}


def _mlp(shape: Shape, ffn: int, layout: Layout, tp: int) -> int:
    """The first product's output, and the second's input."""
    return (shape.gates * layout.wide + layout.narrow) * ffn // tp


def _kept(model: Any, shape: Shape, layout: Layout, layers: Sequence[int], tokens: int) -> tuple[list[int], int]:
    """Bytes that stay of each layer, and the most that recomputing one unit brings back."""
    parts = [_layer(shape, number, layout) for number in layers]
    whole = [tokens * sum(part.values()) for part in parts]
    again = set(model.recompute_modules or ()) if model.recompute_granularity == "selective" else set[str]()
    if model.recompute_granularity != "full":
        kept = [tokens * sum(size for name, size in part.items() if name not in again) for part in parts]
        return kept, max((all_of_it - left for all_of_it, left in zip(whole, kept, strict=True)), default=0)
    unit = tokens * layout.wide * shape.hidden // layout.shards
    number = model.recompute_num_layers or 1
    if model.recompute_method == "block":
        return [unit] * min(number, len(whole)) + whole[number:], max(whole[:number], default=0)
    chunks = [whole[start : start + number] for start in range(0, len(whole), number)]
    return [unit] * len(chunks), max(map(sum, chunks), default=0)


def _in_flight(model: Any, pp_rank: int, num_microbatches: int) -> float:
    """Microbatches whose activations a pipeline rank keeps at once (megatron-core's 1F1B schedules): with virtual stages,
    parts of the rank's layers are counted as parts of a microbatch."""
    pipeline, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if not virtual or pipeline == 1:
        return min(num_microbatches, pipeline - pp_rank)
    group = model.microbatch_group_size_per_vp_stage or pipeline
    warm_up = 2 * (pipeline - pp_rank - 1) + (virtual - 1) * group
    return min(num_microbatches * virtual, warm_up + 1) / virtual
