"""megatron-core's HybridModel on ranks without a GPU: its stack of layers, of megatron-core's own modules.

`hybrid_stack_spec` is of Transformer Engine's. The layers here are the halves of megatron-core's local GPT layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.megatron_cpu import WITHOUT_CUDA, forward, load_strictly, sharded


def logits_of(rank: int, model: tuple[dict, str, dict], iteration: str, tokens: list[list[int]]) -> Any:
    """Load a checkpoint strictly into a HybridModel and run it.

    `model` is a `config.json`, `hybrid_layer_pattern` with `|` between stages, and fields of TransformerConfig for parallelism.
    Answers (keys nobody asked for, logits as a numpy array on the last stage, else None).
    """
    from trainer import cpu_backend

    config, pattern, sizes = model
    with cpu_backend.activate():  # for the streams of token dispatchers
        chunks = build(config, pattern, **sizes)
        return load_strictly(chunks, iteration), forward(chunks, tokens)


def save(rank: int, model: tuple[dict, str, dict], iteration: str, target: str, args: dict) -> None:
    """Load a checkpoint and let megatron-core save it, with Megatron-LM's `args`."""
    import argparse
    from pathlib import Path

    import torch
    from megatron.core import dist_checkpointing

    from trainer import cpu_backend

    config, pattern, sizes = model
    with cpu_backend.activate():
        chunks = build(config, pattern, **sizes)
        load_strictly(chunks, iteration)
        if rank == 0:
            Path(target).mkdir(parents=True)
        torch.distributed.barrier()
        state = {**sharded(chunks), "args": argparse.Namespace(**args), "iteration": 7, "checkpoint_version": 3.0}
        dist_checkpointing.save(state, target)


def build(config: dict, pattern: str, **sizes: Any) -> list[Any]:
    """This rank's chunk in fp32; parallel state is set up for the sizes."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from converter import families
    from converter.config import to_megatron
    from trainer.settings.values import activation

    hybrid_block.TENorm = WrappedTorchNorm
    parallel_state.initialize_model_parallel(
        sizes.get("tensor_model_parallel_size", 1),
        sizes.get("pipeline_model_parallel_size", 1),
        expert_model_parallel_size=sizes.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=sizes.get("expert_tensor_parallel_size"),
    )
    model_parallel_cuda_manual_seed(1)
    fields = to_megatron(families.find(config["model_type"], "hybrid").CONFIG, config)
    settings = transformer_config({**fields, "activation_func": activation(fields["activation_func"])}, sizes)
    multiple = 128 * settings.tensor_model_parallel_size
    model = HybridModel(
        settings,
        stack_spec(fields),
        vocab_size=-(-fields["vocab_size"] // multiple) * multiple,
        max_sequence_length=fields["seq_length"],
        hybrid_layer_pattern=pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=fields["share_embeddings_and_output_weights"],
        position_embedding_type=fields["position_embedding_type"],
        **{name: fields[name] for name in ("rotary_base", "rotary_percent") if name in fields},
    )
    assert model.config.params_dtype == torch.float32
    return [model.eval()]


def transformer_config(fields: dict, sizes: dict) -> Any:
    """megatron-core's configuration of these fields."""
    import torch
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    names = {field.name for field in dataclasses.fields(kind)} - {"window_size"}
    given = {name: value for name, value in fields.items() if name in names and value is not None}
    return kind(
        **{**given, **sizes},
        window_size=fields.get("window_size") and tuple(fields["window_size"]),
        attention_backend=AttnBackend.local,
        pipeline_dtype=torch.float32,
        **WITHOUT_CUDA,
        moe_token_dispatcher_type="alltoall",
    )


def stack_spec(fields: dict) -> Any:
    """HybridStack's layers: the two halves of a GPT layer, with and without experts."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer, TransformerLayerSubmodules

    def half(layer: type, parts: Any, names: tuple[str, ...], keys: dict[str, str]) -> Any:
        kept = {name: getattr(parts, name) for name in names}
        return ModuleSpec(layer, submodules=TransformerLayerSubmodules(**kept, sharded_state_dict_keys_map=keys))

    latent, experts = bool(fields.get("multi_latent_attention")), fields.get("num_moe_experts")
    dense, keys = _gpt_layer(fields, None)
    attention, feed_forward = ("input_layernorm", "self_attention", "self_attn_bda"), ("pre_mlp_layernorm", "mlp", "mlp_bda")
    layers = {
        "mla_layer" if latent else "attention_layer": half(TransformerLayer, dense, attention, keys),
        "mlp_layer": half(MLPLayer, dense, feed_forward, {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
    }
    if experts:
        layers["moe_layer"] = half(MoETransformerLayer, _gpt_layer(fields, experts)[0], feed_forward, {})
    return ModuleSpec(HybridStack, submodules=HybridStackSubmodules(**layers, mtp_block_spec=_prediction()))


def _gpt_layer(fields: dict, experts: int | None) -> tuple[Any, dict[str, str]]:
    """The parts of megatron-core's GPT layer, and the keys of its attention that differ from its names."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules

    from trainer.layers.latent_attention import MLACoreAttention

    qk_layernorm, latent = fields.get("qk_layernorm") or False, bool(fields.get("multi_latent_attention"))
    parts = get_gpt_layer_local_submodules(
        experts, normalization=fields["normalization"], qk_layernorm=qk_layernorm, multi_latent_attention=latent
    )
    if not latent:
        return parts, dict(parts.sharded_state_dict_keys_map)
    parts.self_attention.submodules.core_attention = MLACoreAttention  # megatron-core's takes no other sizes
    return parts, {
        f"self_attention.{name}_layernorm.": f"self_attention.linear_{name}_up_proj.layer_norm_" for name in ("q", "kv")
    }


def _prediction() -> Any:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        get_mtp_layer_spec_for_backend,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec

    layer = get_mtp_layer_spec_for_backend(None, LocalSpecProvider())
    return ModuleSpec(MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]))
