"""Real tiny files to damage: made by the safetensors library, by torch, by Python's pickle, and by the project's writers."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import safetensors.numpy
import torch
import torch.distributed.checkpoint

from converter import adapter_to_mcore, hf_to_mcore
from formats import pickle_writer, pickles
from formats.huggingface import make_index, parse_shard, plan_shards
from formats.spec import DTYPES, TensorSpec
from formats.torch_zip import object_archive, tensor_frame
from tests.formats import zarr_arrays
from tests.golden.kinds import unpacked
from tests.models import tree

Files = dict[str, bytes]
"""A folder: contents by relative path."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu", "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 8,
    "vocab_size": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "transformers_version": "5.0.0",
}  # fmt: skip

ARGS = {
    "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "group_query_attention": True,
    "num_query_groups": 2, "kv_channels": 4, "max_position_embeddings": 64, "norm_epsilon": 1e-5, "normalization": "RMSNorm",
    "swiglu": True, "untie_embeddings_and_output_weights": True, "add_bias_linear": False, "position_embedding_type": "rope",
    "rotary_base": 10000, "rotary_percent": 1.0, "use_rope_scaling": False, "attention_dropout": 0.0, "init_method_std": 0.02,
    "vocab_size": 8, "window_size": None,
}  # fmt: skip

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
ITERATION = "iter_0000000"


def weights() -> dict[str, np.ndarray]:
    """A Llama of one layer, with the one extra tensor that old ones carry."""
    rng = np.random.default_rng(5)
    attention = {f"self_attn.{part}_proj": (8, 8) for part in "qkvo"}
    layer = {
        **attention, "mlp.gate_proj": (8, 8), "mlp.up_proj": (8, 8), "mlp.down_proj": (8, 8), "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
    }  # fmt: skip
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (8, 8), "model.norm.weight": (8,), "lm_head.weight": (8, 8), INV_FREQ: (2,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@cache
def one_file() -> tuple[Files, ...]:
    """A file as the safetensors library makes it: a model's, and one of many dtypes, an empty tensor and a single number."""
    made = weights()
    mixed = {
        "half": made["model.norm.weight"].astype(np.float16), "empty": np.zeros((0, 3), np.int64), "flags": np.ones(3, np.bool_),
        "one": np.array(7, np.int32), "bytes": np.arange(9, dtype=np.uint8).reshape(3, 3),
    }  # fmt: skip
    return tuple({"model.safetensors": safetensors.numpy.save(tensors, {"format": "pt"})} for tensors in (made, mixed))


@cache
def huggingface() -> tuple[Files, ...]:
    """A model in two files with their index, and in one."""
    made = weights()
    shards = plan_shards([TensorSpec(name, array.shape, DTYPES["fp32"]) for name, array in made.items()], limit=2000)
    files = {file: safetensors.numpy.save({name: made[name] for name in shard.tensors}) for file, shard in shards.items()}
    parsed = {file: parse_shard(data[: 8 + int.from_bytes(data[:8], "little")], source=file) for file, data in files.items()}
    documents = {"config.json": json.dumps(CONFIG, indent=1).encode(), "README.md": b"# A model\n"}
    return ({**documents, **files, "model.safetensors.index.json": make_index(parsed)}, {**documents, **one_file()[0]})


def indexed() -> tuple[Files, ...]:
    """The one of these that has an index."""
    return huggingface()[:1]


@cache
def megatron() -> tuple[Files, ...]:
    """The same model converted, for one rank and for two."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "hf", huggingface()[0])
        for tp in (1, 2):
            hf_to_mcore(folder / "hf", folder / f"tp{tp}", tp=tp, make_vocab_size_divisible_by=4)
        return tuple(tree(folder / f"tp{tp}") for tp in (1, 2))


@cache
def by_torch() -> tuple[Files, ...]:
    """Iterations that torch's own writer saved: layers stacked, layers numbered, an object; and the converted ones."""
    state = {
        "decoder.layers.mlp.linear_fc2.weight": torch.arange(24.0).reshape(2, 3, 4),
        "decoder.final_layernorm.weight": torch.arange(5, dtype=torch.bfloat16), "number": torch.tensor(3, dtype=torch.int64),
        "optimizer.state.exp_avg.w": torch.ones(2), "decoder.layers.0.self_attention.linear_proj.weight": torch.ones(2, 2),
        "common_state/shard_0_1": [{"args": argparse.Namespace(**ARGS), "iteration": 3}],
    }  # fmt: skip
    with TemporaryDirectory() as name:
        torch.distributed.checkpoint.save(state, checkpoint_id=name, no_dist=True)
        return (tree(Path(name)), *(below(files, ITERATION) for files in megatron()))


ZARRAY = "decoder.layers.mlp.linear_fc2.weight/.zarray"


@cache
def zarr() -> tuple[Files, ...]:
    """Arrays in whole chunks, in chunks that reach past the end, and in bf16."""
    with TemporaryDirectory() as name:
        for number, dtype in enumerate((np.dtype(np.float32), DTYPES["bf16"])):
            folder = Path(name) / str(number)
            layers = np.arange(2 * 5 * 6).reshape(2, 5, 6).astype(dtype)
            zarr_arrays.write(folder / Path(ZARRAY).parent, layers, chunks=(1, 2, 4 + 2 * number))
            zarr_arrays.write(folder / "output_layer.weight", layers[0], chunks=(5, 3))
            zarr_arrays.mark(folder)
        return tuple(tree(Path(name) / str(number)) for number in (0, 1))


ADAPTER_CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "inference_mode": True, "r": 2,
    "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none", "init_lora_weights": True,
    "layers_pattern": None, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip
ADAPTED = {"self_attn.q_proj": 2, "self_attn.v_proj": 2, "mlp.down_proj": 3}


def factors() -> dict[str, np.ndarray]:
    """A LoRA of three modules, one of a rank of its own, as PEFT names it."""
    rng = np.random.default_rng(9)
    shapes = {f"{name}.lora_A": (rank, 8) for name, rank in ADAPTED.items()}
    shapes |= {f"{name}.lora_B": (8, rank) for name, rank in ADAPTED.items()}
    return {
        f"base_model.model.model.layers.0.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@cache
def adapters() -> tuple[Files, ...]:
    """PEFT's folders: modules by name, by a pattern, and within layers."""
    asked = [
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 3}},
        {
            "target_modules": r".*\.(q|v|down)_proj",
            "rank_pattern": {r"layers\.\d+\.mlp.*": 3},
            "exclude_modules": "lm_head|.*norm",
        },
        {"target_modules": [*ADAPTED], "rank_pattern": {"^model.layers.0.mlp.down_proj": 3}, "layers_to_transform": [0]},
    ]
    tensors = safetensors.numpy.save(factors(), {"format": "pt"})
    documents = [json.dumps({**ADAPTER_CONFIG, **changes}, indent=1).encode() for changes in asked]
    return tuple({"adapter_config.json": document, "adapter_model.safetensors": tensors} for document in documents)


@cache
def megatron_adapters() -> tuple[Files, ...]:
    """The same converted: an iteration that holds an adapter alone."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "hf", huggingface()[0])
        config = {**ADAPTER_CONFIG, "target_modules": ["q_proj", "v_proj"]}
        kept = {name: tensor for name, tensor in factors().items() if "self_attn" in name}
        files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": safetensors.numpy.save(kept)}
        write(folder / "peft", files)
        adapter_to_mcore(folder / "peft", folder / "m", base=folder / "hf")
        made = below(tree(folder / "m"), ITERATION)
        return ({**made, "adapter.json": made["adapter.json"].replace(str(folder / "hf").encode(), b"tiny")},)


@cache
def bare() -> tuple[Files, ...]:
    """An iteration that says what it holds in `run_config.yaml` alone."""
    kept = {name: data for name, data in megatron()[0].items() if "/huggingface/" not in name}
    return (below(kept, ITERATION),)


@cache
def with_args() -> tuple[Files, ...]:
    """An iteration that says what it holds in Megatron-LM's command line alone."""
    kept = {name: data for name, data in bare()[0].items() if name != "run_config.yaml"}
    made = [{"args": argparse.Namespace(**ARGS), "iteration": 5}, {"args": SimpleNamespace(**ARGS), "rng_state": [{"a": {1, 2}}]}]
    return tuple({**kept, "common.pt": saved(common)} for common in made)


@cache
def optimizers() -> tuple[Files, ...]:
    """Iterations of megatron-core with optimizer state in buckets, with experts too, gathered, and flattened."""
    kinds = ("ranks_ep2_buckets", "ranks_pp2_vpp2_buckets", "ranks_tp2_pp2_gathered", "zarr_distributed_optimizer_flattened")
    with TemporaryDirectory() as name:
        return tuple(tree(next(unpacked(kind, Path(name)).glob("iter_*"))) for kind in kinds)


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@cache
def archives() -> tuple[Files, ...]:
    """What `torch.save` makes, and what the project's writers make."""
    frame = tensor_frame("bf16", (3, 4))
    made = [
        saved(torch.arange(6.0)), saved([torch.arange(20)[5:9], torch.nn.Parameter(torch.ones(2, 3))]),
        saved(torch.ones(4).to(torch.float8_e4m3fn)), object_archive([{"a": 1, "t": np.arange(3), "d": {"x": (1, 2.5, None)}}]),
        frame.before + bytes(range(frame.size)) + frame.after,
    ]  # fmt: skip
    return tuple({"archive": data} for data in made)


@cache
def pickled() -> tuple[Files, ...]:
    """Pickles of every protocol in use, of plain data, of records, and a whole index."""
    plain = {"a": [1, 2.5, None, True, "text", b"bytes", -(1 << 70)], "b": ({1, 2}, frozenset([3])), 5: {"c": ()}}
    made = [pickle.dumps({"args": argparse.Namespace(**ARGS), "plain": plain}, protocol) for protocol in (2, 4, 5)]
    made += [pickle_writer.dumps([pickles.Global("torch", "Size")((1, 2)), plain["a"][:5]]), by_torch()[0][".metadata"]]
    return tuple({"pickle": data} for data in made)


@cache
def checksums() -> tuple[Files, ...]:
    """JSON as a record of checksums holds it."""
    entry = {"size": 4096, "sha256": "0" * 64, "blocks": [[0, 1], [4096, 17]]}
    return ({"integrity.json": json.dumps({"version": 1, "files": {"a.distcp": entry, "b": entry}, "made": None}).encode()},)


@cache
def carried() -> tuple[Files, ...]:
    """A converted iteration, with what travelled under plain names."""
    return (below(megatron()[0], ITERATION),)


def below(files: Files, folder: str) -> Files:
    """The part of a folder that lies in a folder of it."""
    return {name.removeprefix(f"{folder}/"): data for name, data in files.items() if name.startswith(f"{folder}/")}


def write(folder: Path, files: Files) -> None:
    """Make a folder hold just these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
