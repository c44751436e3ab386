"""Write `te_keys.json.gz`: what megatron-core asks of a checkpoint with Transformer Engine's layers, of a small model of each
family in `converter/families`.

    PYTHONPATH=PACKAGES python -m tests.golden.make_te_keys

Run it when a family is added, or the keys that a module asks for change. It takes a minute, and no GPU: models are built by the
trainer, and never computed. PACKAGES is a folder beside the environment, made with

    pip install --target PACKAGES --no-deps transformer-engine==2.20.2 transformer-engine-cu13==2.20.2 \
        nvdlfw-inspect==0.2.2 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 einops ml_dtypes

and `transformer_engine_torch`, the compiled extension of the same version, copied into it. `golden_keys.json`, taken on an H200,
is the check: where the two have the same model and their keys differ, nothing is written.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FILE = FOLDER / "te_keys.json.gz"

SIZES = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 160, "vocab_size": 128,
}  # fmt: skip
MIXTRAL = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
ON_GPU: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt_bias_layernorm": ("starcoder2", {"tie_word_embeddings": False}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral_sequential": ("mixtral", MIXTRAL),
    "qwen3_moe": ("qwen3_moe", QWEN_MOE),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 96}),
    "gpt_oss": ("gpt_oss", MIXTRAL),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3_mtp": ("deepseek_v3", {**DEEPSEEK, "num_nextn_predict_layers": 1}),
}
"""Models of `golden_keys.json`, whose sizes are `SIZES`: the family, and what `config.json` has otherwise."""

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "deepseek_v3_mtp": ("deepseek_v3", {"num_nextn_predict_layers": 2}),
    "deepseek_v32_mtp": ("deepseek_v32", {"num_nextn_predict_layers": 1}),
    "glm_moe_dsa_mtp": ("glm_moe_dsa", {"num_nextn_predict_layers": 1}),
    "dbrx_without_clipping": ("dbrx", {"attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0}}),
    "moonlight": ("deepseek_v3", {"q_lora_rank": None}),
    "qwen3_next_mtp": ("qwen3_next", {"num_nextn_predict_layers": 1}),
    "falcon_rw": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
}
"""Models beside those of `tests/converter/test_family_variants.py`: the family, and what `config.json` has otherwise."""


def main() -> None:
    """Write the keys of every family and variant; exit with 1 where one could not be built, or has not the keys of the GPU."""
    _prepare()
    from converter import families
    from tests.converter.test_family_variants import VARIANTS

    known = families.names()
    with _without_gpu():
        differing = [name for name, (family, _) in ON_GPU.items() if family in known and not _agrees_with_gpu(name)]
        if differing:
            sys.exit(f"differ from golden_keys.json: {', '.join(differing)}")
        cases = {family: (family, {}) for family in known if families.find(family).trains} | {**VARIANTS, **MORE}
        built, failed = _build(cases)
    versions = {name: version(name) for name in ("megatron-core", "transformer-engine", "torch", "transformers")}
    content = json.dumps({"versions": versions, "models": built}, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(content.encode(), mtime=0))
    print(f"{FILE.name}: {len(built)} models, {FILE.stat().st_size} bytes")
    sys.exit("\n".join(failed) or None)


def _build(cases: dict[str, tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of each model, and what went wrong with the others."""
    from tests.converter.family_suite import small_config

    built, failed = {}, []
    for name, (family, changes) in cases.items():
        try:
            config = small_config(family)
            config.update(changes)
            built[name] = _keys(json.loads(config.to_json_string()))
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    return built, failed


def _prepare() -> None:
    """Import Transformer Engine, before megatron-core looks for it, and answer what it asks of a GPU.

    Symbols of the compiled extension are bound when they are called, which none is: it may be built for another torch.
    """
    import torch

    sys.setdlopenflags(os.RTLD_LAZY)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.Event = torch.cuda.Stream = lambda *_, **__: None
    torch.cuda.is_available = lambda: True
    import transformer_engine.pytorch  # noqa: F401


def _without_gpu() -> Any:
    """Return the context in which megatron-core's models are built on the CPU, alone in a process group, of the layers that the
    trainer has on a GPU."""
    from contextlib import ExitStack
    from tempfile import mkdtemp

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from trainer import cpu_backend, device

    stack = ExitStack()
    stack.enter_context(cpu_backend.activate())
    device._on_gpu = lambda: True
    dist.init_process_group("gloo", init_method=f"file://{mkdtemp()}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    return stack


def taken_on_gpu(name: str) -> dict[str, Any]:
    """Return a model of `golden_keys.json` as `_keys` does."""
    family, changes = ON_GPU[name]
    taken = json.loads((FOLDER / "golden_keys.json").read_text())[name]
    fields = ("global_shape", "dtype", "prepend_axis_num", "chunks")
    tensors = {key: [one[field] for field in fields] for key, one in taken["tensors"].items()}
    return {"config": {"model_type": family, **SIZES, **changes}, "tensors": tensors, "objects": taken["objects"]}


def _agrees_with_gpu(name: str) -> bool:
    """Are the keys that are made here those that were taken on a GPU?"""
    taken = taken_on_gpu(name)
    made = _keys(taken["config"])
    return made["tensors"] == taken["tensors"] and sorted(made["objects"]) == sorted(taken["objects"])


def _keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the trainer's model of a `config.json` asks for."""
    return keys_of(config, _model(config))


def keys_of(config: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return a model's `config.json`, its tensors, `{key: [global shape, dtype, prepended axes, [[offset, local shape], …]]}`,
    and the keys of its objects."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    tensors: dict[str, Any] = {}
    objects: list[str] = []
    for leaf in _leaves(model):
        if isinstance(leaf, ShardedTensor):
            first = [[*leaf.global_shape], str(leaf.dtype), leaf.prepend_axis_num, []]
            chunks = tensors.setdefault(leaf.key, first)[-1]
            chunks.append([[*leaf.global_offset], [*leaf.local_shape]])
        elif isinstance(leaf, ShardedObject):
            objects.append(leaf.unique_key)
    return {"config": config, "tensors": tensors, "objects": objects}


def _model(config: dict[str, Any]) -> Any:
    import torch

    from trainer import optim
    from trainer.model import from_hf_config

    provider = from_hf_config(config)
    provider.bf16, provider.params_dtype = True, torch.bfloat16
    provider.use_cpu_initialization, provider.perform_initialization = True, False
    provider.finalize()
    return optim.in_16_bits(provider, provider.provide(pre_process=True, post_process=True))


def _leaves(model: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict(metadata={"singleton_local_shards": False, "chained_optim_avoid_prefix": True})
    apply_factories(state)
    return nested_values(state)


if __name__ == "__main__":
    main()
