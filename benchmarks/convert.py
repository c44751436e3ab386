"""How fast and how large is a conversion beside `cp`? Prints a table of ratios measured in turns, in one run.

    python benchmarks/convert.py [--runs 3] [--shape 1b --shape 8b-16] [--folder DIR]

Each round runs `cp -r SRC X && sync`, then each conversion and `sync`, so that a machine whose speed drifts treats both alike.
Start-up is counted. Source files are in the page cache, as far as they fit. `bare` is forward without `integrity.json`, `verify`
compares the source with what was made of it. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from formats.huggingface import make_index, plan_shards
from formats.spec import DTYPES, TensorSpec

_FIELDS = ("hidden", "layers", "heads", "groups", "head_dim", "ffn", "vocab", "tied")
SHAPES = {
    name: dict(zip(_FIELDS, sizes, strict=True))
    for name, sizes in {
        "tiny": (512, 8, 8, 4, 64, 1536, 8192, False),
        "1b": (2048, 16, 32, 8, 64, 8192, 128256, True),
        "8b-16": (4096, 16, 32, 8, 128, 14336, 128256, False),
        "405b": (16384, 126, 128, 8, 128, 53248, 128256, False),
    }.items()
}
LAYOUTS = ((1, 1), (8, 4))
LIMITS = {"1b": {(1, 1): 1.3, (8, 4): 1.2}, "8b-16": {(1, 1): 1.1, (8, 4): 1.0}}
PEAK_LIMIT_MIB = 128


def config(shape: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["groups"],
        "head_dim": shape["head_dim"],
        "intermediate_size": shape["ffn"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape["tied"],
    }


def specs(shape: dict) -> list[TensorSpec]:
    hidden, ffn, vocab = shape["hidden"], shape["ffn"], shape["vocab"]
    queries, keys = shape["heads"] * shape["head_dim"], shape["groups"] * shape["head_dim"]
    layer = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    named = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(shape["layers"]):
        named |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    named["model.norm.weight"] = (hidden,)
    if not shape["tied"]:
        named["lm_head.weight"] = (vocab, hidden)
    return [TensorSpec(name, size, DTYPES["bf16"]) for name, size in named.items()]


def make_model(folder: Path, shape: dict, *, data: bool = True, shard_bytes: int = 5_000_000_000) -> None:
    """A Llama directory with random weights; without `data`, files of the right size full of holes."""
    folder.mkdir(parents=True)
    shards = plan_shards(specs(shape), limit=shard_bytes)
    rng = np.random.default_rng(1)
    for name, shard in shards.items():
        with (folder / name).open("wb") as file:
            file.write(shard.raw)
            left = shard.size - len(shard.raw) if data else 0
            while left:
                block = rng.integers(0, 1 << 16, min(left, 64 << 20) // 2, np.uint16) & 0x807F | 0x3C00
                file.write(block.tobytes())
                left -= block.nbytes
            file.truncate(shard.size)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(make_index(shards))
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2))


def timed(command: list[str], output: Path) -> tuple[float, float]:
    """Wall seconds of a command with `sync`, and its peak resident MiB if it reports one; its output is removed."""
    os.sync()
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    os.sync()
    seconds = time.monotonic() - started
    if output.name == "X":
        shutil.rmtree(output, ignore_errors=True)  # verifying makes none
    return seconds, json.loads(done.stdout)["peak_memory"] / 2**20 if done.stdout else 0.0


def measure(folder: Path, name: str, runs: int) -> list[dict]:
    """One shape: `cp` and every conversion in turns, `runs` times."""
    source, out = folder / name, folder / "X"
    if not source.exists():
        make_model(source, SHAPES[name])
    mbconvert = [sys.executable, "-m", "converter"]
    megatron = {}
    for tp, pp in LAYOUTS:
        megatron[tp, pp] = folder / f"{name}-tp{tp}-pp{pp}"
        if not megatron[tp, pp].exists():
            layout = ["--tp", str(tp), "--pp", str(pp), "--quiet", "--json"]
            timed([*mbconvert, "hf-to-mcore", str(source), str(megatron[tp, pp]), *layout], megatron[tp, pp])
    taken: dict[tuple, list[tuple[float, float]]] = {}
    for _ in range(runs):
        for tp, pp in LAYOUTS:
            there = [*mbconvert, "hf-to-mcore", str(source), str(out), "--tp", str(tp), "--pp", str(pp), "--quiet", "--json"]
            made = megatron[tp, pp]
            pairs = {
                "forward": (source, there),
                "bare": (source, [*there, "--no-integrity"]),
                "back": (made, [*mbconvert, "mcore-to-hf", str(made), str(out), "--quiet", "--json"]),
                "verify": (source, [*mbconvert, "verify", str(source), str(made), "--json"]),
            }
            for direction, (original, command) in pairs.items():
                copied, _ = timed(["cp", "-r", str(original), str(out)], out)
                seconds, peak = timed(command, out)
                taken.setdefault((tp, pp, direction), []).append((seconds, peak, copied))
    for path in megatron.values():
        shutil.rmtree(path)
    return [row(name, key, rows) for key, rows in taken.items()]


def row(name: str, key: tuple, rows: list[tuple]) -> dict:
    seconds, peak, copied = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(one / other for one, _, other in rows)
    limit = LIMITS.get(name, {}).get(key[:2]) if key[2] != "verify" else None
    peak = max(one for _, one, _ in rows)
    return {"shape": name, "layout": f"TP{key[0]}·PP{key[1]}", "direction": key[2], "seconds": seconds, "cp": copied,
            "ratio": ratio, "limit": limit, "peak_mib": peak, "runs": [round(a / b, 2) for a, _, b in rows]}  # fmt: skip


def help_seconds(runs: int = 5) -> float:
    """Median wall time of `mbconvert --help`."""
    taken = []
    for _ in range(runs):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "converter", "--help"], check=True, capture_output=True)
        taken.append(time.monotonic() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: 1b and 8b-16")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-bench"))
    options = parser.parse_args()
    print(f"mbconvert --help: {help_seconds():.2f} s (limit 0.3)")
    print(
        f"{'shape':6} {'layout':8} {'direction':9} {'mbconvert':>9} {'cp+sync':>8} {'ratio':>6} {'limit':>6} {'peak':>8}  ratios"
    )
    for name in options.shape or ["1b", "8b-16"]:
        for one in measure(options.folder, name, options.runs):
            print(
                f"{one['shape']:6} {one['layout']:8} {one['direction']:9} {one['seconds']:7.2f} s {one['cp']:6.2f} s "
                f"{one['ratio']:6.2f} {one['limit'] or '-':>6} {one['peak_mib']:4.0f} MiB  {one['runs']}",
                flush=True,
            )
        shutil.rmtree(options.folder / name)


if __name__ == "__main__":
    main()
