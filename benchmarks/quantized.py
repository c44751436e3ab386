"""How fast are quantized weights read? Prints the speed of each scheme as a share of that of `cp`, measured in turns, in one run.

    python benchmarks/quantized.py [--runs 3] [--kind fp8 ...] [--folder DIR] [--core 0]

Each round runs `cp -r OUT X && sync`, where OUT is the Megatron checkpoint that the conversion writes, then the conversion and
`sync`; both may use one core. A speed of 1 is that of `cp`: the limit for FP8 in blocks is 0.5. `bare` hashes nothing
(`--no-integrity`). The source is in the page cache. On a machine that does other work, read the core-seconds per GB of the
output: they tell what each program takes when it has the core for itself. Needs no torch.

The first line says how many GB of bf16 a core makes of codes in a second, in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.convert import Run, config, specs, timed
from formats.huggingface import make_header
from formats.quantized.fp8 import Fp8
from formats.quantized.int4 import PackedInt4
from formats.quantized.mxfp4 import Mxfp4
from formats.quantized.scheme import BF16
from formats.spec import DTYPES, TensorSpec

SHAPE = {
    "hidden": 4096, "layers": 4, "heads": 32, "groups": 8, "head_dim": 128, "ffn": 14336, "vocab": 32000, "tied": True,
}  # fmt: skip
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8-rows": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": ROWS}}},
    "int4": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": INT4}}},
    "mxfp4": {"quant_method": "mxfp4"},
}
LIMITS = {"fp8": 0.5}
BAND = 32 << 20


def stored(kind: str, spec: TensorSpec) -> list[TensorSpec]:
    """Return the tensors that a weight is stored as."""
    if len(spec.shape) == 1 or "embed" in spec.name:
        return [spec]
    rows, columns = spec.shape
    match kind:
        case "fp8":
            grid = -(-rows // 128), -(-columns // 128)
            scales = TensorSpec(f"{spec.name}_scale_inv", grid, DTYPES["fp32"])
            return [spec.cast(DTYPES["fp8_e4m3"]), scales]
        case "fp8-rows":
            return [spec.cast(DTYPES["fp8_e4m3"]), TensorSpec(f"{spec.name}_scale", (rows, 1), DTYPES["bf16"])]
        case _:
            codes = TensorSpec(f"{spec.name}_packed", (rows, columns // 8), DTYPES["int32"])
            return [codes, TensorSpec(f"{spec.name}_scale", (rows, columns // 32), DTYPES["bf16"])]


def gpt_oss() -> tuple[dict, list[TensorSpec]]:
    """Return the configuration of a GPT-OSS-20B of two layers, and its tensors."""
    hidden, ffn, experts, vocab = 2880, 2880, 32, 32000
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    for number in range(2):
        layer = f"model.layers.{number}."
        for name, rows in (("q_proj", 4096), ("k_proj", 512), ("v_proj", 512), ("o_proj", hidden)):
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, 4096 if name == "o_proj" else hidden)
            shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
        shapes |= {f"{layer}self_attn.sinks": (64,), f"{layer}mlp.router.weight": (experts, hidden)}
        shapes |= {f"{layer}mlp.router.bias": (experts,), f"{layer}mlp.experts.gate_up_proj_bias": (experts, 2 * ffn)}
        shapes |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes[f"{layer}mlp.experts.down_proj_bias"] = (experts, hidden)
    tensors = [TensorSpec(name, shape, BF16) for name, shape in shapes.items()]
    for number in range(2):
        for name, rows in (("gate_up_proj", 2 * ffn), ("down_proj", hidden)):
            blocks = f"model.layers.{number}.mlp.experts.{name}_blocks"
            tensors.append(TensorSpec(blocks, (experts, rows, 90, 16), DTYPES["uint8"]))
            tensors.append(TensorSpec(blocks.replace("_blocks", "_scales"), (experts, rows, 90), DTYPES["uint8"]))
    sizes = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": vocab,
        "num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128, "hidden_act": "silu",
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0, "tie_word_embeddings": False, "attention_bias": True, "dtype": "bfloat16",
    }  # fmt: skip
    return sizes, tensors


def make_model(folder: Path, kind: str) -> None:
    """Write a directory of random codes, with scales of the size that published models have."""
    folder.mkdir(parents=True)
    sizes, tensors = (
        (config(SHAPE), [tensor for spec in specs(SHAPE) for tensor in stored(kind, spec)]) if kind != "mxfp4" else gpt_oss()
    )
    generator = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(make_header(tensors))
        for spec in tensors:
            for start in range(0, spec.nbytes, BAND):
                file.write(values(generator, spec, min(BAND, spec.nbytes - start)))
    (folder / "config.json").write_text(json.dumps({**sizes, "quantization_config": CONFIGS[kind]}, indent=2))


def values(generator: np.random.Generator, spec: TensorSpec, nbytes: int) -> bytes:
    """Return random bytes of a tensor: finite, and scales near a thousandth."""
    if spec.name.endswith("_scales"):
        return generator.integers(115, 121, nbytes, np.uint8).tobytes()
    if "scale" in spec.name:
        return (generator.random(nbytes // spec.dtype.itemsize) * 1e-3 + 1e-4).astype(spec.dtype).tobytes()
    random = generator.integers(0, 256, nbytes, np.uint8)
    if spec.dtype == BF16:
        return (random.view(np.uint16) & 0x807F | 0x3C00).tobytes()
    return (random & 0xF7 if spec.dtype == DTYPES["fp8_e4m3"] else random).tobytes()


def in_memory() -> str:
    """Return the GB of bf16 that a core makes of codes in a second, by scheme."""
    generator = np.random.default_rng(1)
    codes = generator.integers(0, 247, (512, 8192), np.uint8)
    fp8, scales = codes.view(ml_dtypes.float8_e4m3fn), generator.random((512, 256)).astype(np.float32)
    exponents = generator.integers(110, 130, (1, 512, 256), np.uint8)
    e4m3 = fp8.dtype
    cases = {
        "FP8 in blocks": (Fp8("", e4m3, (128, 128), (4, 64)), fp8, scales[:4, :64], (512, 8192)),
        "FP8 by row": (Fp8("", e4m3, (1, 8192), (512, 1)), fp8, scales[:, :1], (512, 8192)),
        "INT4": (PackedInt4((512, 8192), 32), codes[:, :4096].copy().view(np.int32), scales, (512, 8192)),
        "MXFP4": (Mxfp4(), codes[:, :4096].copy().reshape(1, 512, 256, 16), exponents, (1, 8192, 512)),
    }
    shown = []
    for name, (scheme, stored_codes, parameters, shape) in cases.items():
        out, region, seconds = np.empty(shape, BF16), tuple(slice(0, size) for size in shape), []
        for _ in range(9):
            started = time.process_time()
            scheme.decode(stored_codes, [parameters], region, out)
            seconds.append(time.process_time() - started)
        shown.append(f"{name} {out.nbytes / min(seconds) / 1e9:.2f}")
    return f"GB of bf16 that a core makes in a second, in memory: {', '.join(shown)}"


def measure(folder: Path, kind: str, runs: int) -> list[str]:
    source, megatron, out = folder / kind, folder / "made", folder / "X"
    make_model(source, kind)
    convert = [sys.executable, "-m", "converter", "hf-to-mcore", str(source)]
    timed([*convert, str(megatron), "--quiet", "--json"], megatron)
    size = sum(path.stat().st_size for path in megatron.rglob("*") if path.is_file())
    rounds: dict[str, list[tuple[Run, Run]]] = {}
    for _ in range(runs):
        for name, options in (("forward", []), ("bare", ["--no-integrity"])):
            copied = timed(["cp", "-r", str(megatron), str(out)], out)
            rounds.setdefault(name, []).append((timed([*convert, str(out), "--quiet", "--json", *options], out), copied))
    shutil.rmtree(megatron)
    shutil.rmtree(source)
    return [line(kind, name, rows, size) for name, rows in rounds.items()]


HEADER = (
    f"{'kind':9} {'direction':9} {'output':>8} {'mbconvert':>9} {'cp+sync':>9} {'speed':>6} {'limit':>6} "
    f"{'cores/GB':>9} {'of cp':>6} {'peak':>8}  speed of each run"
)


def line(kind: str, name: str, rows: list[tuple[Run, Run]], size: int) -> str:
    seconds, copied = (statistics.median(pair[side].seconds for pair in rows) for side in (0, 1))
    cores, cp_cores = (statistics.median(pair[side].cores for pair in rows) / size * 1e9 for side in (0, 1))
    speeds = [cp.seconds / ours.seconds for ours, cp in rows]
    peak = max(ours.peak for ours, _ in rows)
    return (
        f"{kind:9} {name:9} {size / 1e9:5.2f} GB {seconds:7.2f} s {copied:7.2f} s {statistics.median(speeds):6.2f} "
        f"{LIMITS.get(kind, '-'):>6} {cores:9.2f} {cp_cores:6.2f} {peak:4.0f} MiB  {[round(speed, 2) for speed in speeds]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kind", action="append", choices=CONFIGS, help="default: all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-bench"))
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{in_memory()}\n{HEADER}", flush=True)
    for kind in options.kind or CONFIGS:
        for text in measure(options.folder, kind, options.runs):
            print(text, flush=True)


if __name__ == "__main__":
    main()
