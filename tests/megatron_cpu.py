"""megatron-core itself on a machine without a GPU: the oracle that loads what we write and saves what we read.

Each request is a run of ranks over gloo, of the number a layout needs. megatron-core has no CPU mode: `_Cpu` sends its
hard-wired CUDA calls to the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ranks

WITHOUT_CUDA = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}
"""Fields of a TransformerConfig that switch megatron-core's CUDA kernels off."""


@dataclass(frozen=True)
class Shape:
    """A model as megatron-core builds it, and a layout to build it in."""

    config: dict  # of a Hugging Face `config.json`
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    layout: str | None = None  # megatron-core's pipeline_model_parallel_layout
    vocab_multiple: int = 128
    families: str = ""  # a folder of further family files
    ep: int = 1
    etp: int | None = None


class Ranks:
    """Ranks of megatron-core alone. `run(f, world, …)` calls `f(rank, …)` in a process group of `world` ranks."""

    def __init__(self, processes: ranks.Ranks) -> None:
        self._processes = processes

    def run(self, function: Any, world: int, *args: Any) -> list[Any]:
        """What each rank answered; the exception of the first rank that failed is raised here."""
        return self._processes.run(_in_group, world, function, *args)


def _in_group(function: Any, *args: Any) -> Any:
    warnings.simplefilter("ignore")
    import torch.distributed as dist

    from trainer import tensor_properties

    _pretend_cuda()
    dist.init_process_group("gloo")
    with _Cpu(), tensor_properties.without_strides():
        return function(dist.get_rank(), *args)


def _pretend_cuda() -> None:
    """What megatron-core calls on `torch.cuda`, answered by the CPU."""
    import torch

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.set_device = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _make_cpu_mode() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    class Cpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if "cuda" in str(kwargs.get("device", "")) or isinstance(kwargs.get("device"), int):
                kwargs["device"] = "cpu"
            if function is torch.Tensor.cuda:
                return args[0]
            if function is torch.Tensor.to:
                args = tuple("cpu" if isinstance(a, (str, torch.device)) and "cuda" in str(a) else a for a in args)
            return function(*args, **kwargs)

    return Cpu()


_Cpu = _make_cpu_mode


def build(shape: Shape) -> list[Any]:
    """The model chunks of this rank, in fp32, with random weights; parallel state is set up for the shape's layout."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from converter import families
    from converter.config import to_megatron
    from converter.config_rope import rope_numbers

    families.__path__ = [*([shape.families] if shape.families else []), *families.__path__]
    experts = {"expert_model_parallel_size": shape.ep, "expert_tensor_parallel_size": shape.etp}
    parallel_state.initialize_model_parallel(shape.tp, shape.pp, shape.vpp, **experts)
    model_parallel_cuda_manual_seed(1)
    fields = to_megatron(families.find(shape.config["model_type"]).CONFIG, shape.config)
    config = _transformer_config(shape, fields, experts)
    multiple = shape.vocab_multiple * shape.tp
    chunks = []
    for stage in range(shape.vpp or 1):
        keywords = {"ignore_virtual": False, "vp_stage": stage if shape.vpp else None}
        model = GPTModel(
            config,
            _layer_spec(fields),
            vocab_size=-(-fields["vocab_size"] // multiple) * multiple,
            max_sequence_length=128,
            pre_process=parallel_state.is_pipeline_first_stage(**keywords),
            post_process=parallel_state.is_pipeline_last_stage(**keywords),
            parallel_output=False,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=fields["share_embeddings_and_output_weights"],
            rotary_base=fields["rotary_base"],
            rope_scaling=fields["rope_scaling"],
            rope_scaling_factor=fields.get("rope_scaling_factor", 8.0),
            seq_len_interpolation_factor=fields.get("seq_len_interpolation_factor"),
            vp_stage=stage if shape.vpp else None,
        )
        if fields["rope_scaling"]:
            model.rotary_pos_emb.inv_freq = _scaled_frequencies(model.rotary_pos_emb, rope_numbers(shape.config))
        chunks.append(model.eval())
    return chunks


def _transformer_config(shape: Shape, fields: dict, experts: dict[str, Any]) -> Any:
    """megatron-core's configuration for the CPU, without fused kernels."""
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    own = {f.name for f in dataclasses.fields(TransformerConfig)} - {"rope_scaling", "window_size", "activation_func"}
    return TransformerConfig(
        **{name: value for name, value in fields.items() if name in own},
        activation_func=torch.nn.functional.silu,
        window_size=fields.get("window_size") and tuple(fields["window_size"]),
        tensor_model_parallel_size=shape.tp,
        pipeline_model_parallel_size=shape.pp,
        virtual_pipeline_model_parallel_size=None if shape.layout else shape.vpp,
        **experts,
        pipeline_model_parallel_layout=shape.layout,
        pipeline_dtype=torch.float32,
        **WITHOUT_CUDA,
        attention_backend=AttnBackend.local,
        overlap_p2p_comm=shape.vpp is not None,
        batch_p2p_comm=shape.vpp is None,
    )


def _layer_spec(fields: dict) -> Any:
    """megatron-core's own layer. With experts it calls the norm before them as Transformer Engine's layer does."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    experts = fields.get("num_moe_experts")
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=fields.get("qk_layernorm", False))
    if experts:
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec


def _scaled_frequencies(embedding: Any, rope: dict) -> Any:
    """Llama-3.1's scaling with its own four numbers; megatron-core's constructor takes only one of them."""
    import torch

    size = embedding.inv_freq.numel() * 2
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return embedding._apply_scaling(
        plain,
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )


def sharded(chunks: list[Any]) -> dict:
    """The sharded state dict of a rank, as Megatron-LM lays it out."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


def load_strictly(chunks: list[Any], iteration: str) -> list[str]:
    """Load with RETURN_ALL, which tells which keys nobody asked for. Fails if the checkpoint lacks one that the model has."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    loaded, missing, unexpected = dist_checkpointing.load(sharded(chunks), iteration, strict=StrictHandling.RETURN_ALL)
    assert not unexpected, f"the checkpoint lacks {sorted(map(str, unexpected))}"
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{number}"])
    return sorted(map(str, missing))


def logits_of(rank: int, shape: Shape, iteration: str, tokens: list[list[int]]) -> Any:
    """Load a checkpoint strictly and run it through the pipeline schedule.

    Answers (keys nobody asked for, logits as a numpy array on the last stage, else None).
    """
    chunks = build(shape)
    return load_strictly(chunks, iteration), forward(chunks, tokens, vpp=shape.vpp, microbatches=shape.pp if shape.vpp else 1)


def forward(chunks: list[Any], tokens: list[list[int]], *, vpp: int | None = None, microbatches: int = 1, **options: Any) -> Any:
    """Run a model through the pipeline schedule; answers logits as a numpy array on the last stage, else None.

    `options` go to the model.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data = torch.tensor(tokens)
    positions = torch.arange(data.shape[1]).unsqueeze(0).expand_as(data)
    mask = torch.triu(torch.ones(1, 1, data.shape[1], data.shape[1], dtype=torch.bool), 1)

    def step(_batches, model, *_):
        return model(data, positions, mask, **options), lambda output, **_: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks) if vpp else None,
            model=chunks if vpp else chunks[0],
            num_microbatches=microbatches,
            seq_length=data.shape[1],
            micro_batch_size=data.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return outputs[0].float().numpy() if last else None


def save(rank: int, shape: Shape, source: str, target: str, extra: dict) -> None:
    """Load `source` (an iteration) and let megatron-core save it at `target` in this shape's layout.

    `extra`: `singleton` keeps one key per layer; `optimizer` adds Adam's state and fp32 masters; `args` a Megatron-LM
    command line; `add` is added to every weight, as if training had changed them; `bf16` stores weights in bfloat16.
    """
    import torch
    from megatron.core import dist_checkpointing

    chunks = build(shape)
    load_strictly(chunks, source)
    if extra.get("add"):
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.data += extra["add"]
    if extra.get("bf16"):
        chunks = [chunk.bfloat16() for chunk in chunks]
    metadata = {"singleton_local_shards": bool(extra.get("singleton"))}
    state = {f"model{n or ''}": chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(chunks)}
    if extra.get("optimizer"):
        state["optimizer"] = _adam_state(state)
    if extra.get("args"):
        state["args"] = argparse.Namespace(**extra["args"])
    if rank == 0:
        Path(target).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save({**state, "iteration": 7, "checkpoint_version": 3.0}, target)


def _adam_state(state: dict) -> dict:
    """Adam's moments and fp32 masters of every weight, keyed as megatron-core's fully reshardable optimizer keys them."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    copied = {name: dict(part) for name, part in state.items()}
    apply_factories(copied)
    weights = [leaf for leaf in nested_values(copied) if isinstance(leaf, ShardedTensor)]
    return {
        f"{kind}.{number}": make_sharded_optimizer_tensor(
            weight, torch.full_like(weight.data, 0.5, dtype=torch.float32), f"optimizer.state.{kind}"
        )
        for kind in ("exp_avg", "exp_avg_sq", "fp32_param")
        for number, weight in enumerate(weights)
    }
