"""How fast and how large is a conversion beside `cp`? Prints a table of ratios measured in turns, in one run.

    python benchmarks/convert.py [--runs 3] [--shape 1b --shape 8b-16] [--only reshard] [--folder DIR]

Each round runs `cp -r SRC X && sync`, then each conversion and `sync`, so that a machine whose speed drifts treats both alike.
Start-up is counted. Source files are in the page cache, as far as they fit. `bare` and `back-bare` hash nothing
(`--no-integrity`), `verify` compares the source with what was made of it, `reshard` makes the other layout of what was made.
Needs no torch.

Seconds tell little of another machine. So the first lines say what this one can do, and each row has the processor time that a
command and its children took, in core-seconds per GB of the source, beside those of `cp` in the same rounds. A core that moves
8 GB/s and hashes 2 GB/s cannot need less than 0.125 and 0.5 core-seconds per GB for it, whatever the program.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

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
CORE_LIMIT = 1.3
"""Core-seconds of a conversion that hashes nothing, as a multiple of `cp`'s."""

STARTUP_LIMIT = 2.0
"""Core-seconds of a command that does next to nothing, as a multiple of those of `import numpy`."""

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""For every command: modules are compiled once, as in an installed package."""


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


@dataclass(frozen=True)
class Run:
    """One command: wall seconds with `sync`, core-seconds of it and its children, and its peak resident MiB if it reports one."""

    seconds: float
    cores: float
    peak: float = 0.0


def timed(command: list[str], output: Path) -> Run:
    """Run a command; what it made is removed."""
    os.sync()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    completed = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.sync()
    seconds = time.monotonic() - started
    if output.name == "X":
        shutil.rmtree(output, ignore_errors=True)  # verifying makes none
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cores, json.loads(completed.stdout)["peak_memory"] / 2**20 if completed.stdout.startswith(b"{") else 0.0)


DIRECTIONS = ("forward", "bare", "back", "back-bare", "verify", "reshard", "reshard-bare")


def measure(folder: Path, name: str, runs: int, only: list[str]) -> list[dict]:
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
    rounds: dict[tuple, list[tuple[Run, Run]]] = {}
    for _ in range(runs):
        for tp, pp in LAYOUTS:
            layout = ["--tp", str(tp), "--pp", str(pp), "--quiet", "--json"]
            forward = [*mbconvert, "hf-to-mcore", str(source), str(out), *layout]
            same_layout, other = megatron[tp, pp], megatron[LAYOUTS[(tp, pp) == LAYOUTS[0]]]
            across = [*mbconvert, "reshard", str(other), str(out), *layout]
            back = [*mbconvert, "mcore-to-hf", str(same_layout), str(out), "--quiet", "--json"]
            pairs = {
                "forward": (source, forward),
                "bare": (source, [*forward, "--no-integrity"]),
                "back": (same_layout, back),
                "back-bare": (same_layout, [*back, "--no-integrity"]),
                "verify": (source, [*mbconvert, "verify", str(source), str(same_layout), "--json"]),
                "reshard": (other, across),
                "reshard-bare": (other, [*across, "--no-integrity"]),
            }
            for direction in only or DIRECTIONS:
                original, command = pairs[direction]
                copied = timed(["cp", "-r", str(original), str(out)], out)
                rounds.setdefault((tp, pp, direction), []).append((timed(command, out), copied))
    for path in megatron.values():
        shutil.rmtree(path)
    size = sum(path.stat().st_size for path in source.iterdir())
    return [row(name, key, rows, size) for key, rows in rounds.items()]


def row(name: str, key: tuple, rows: list[tuple[Run, Run]], size: int) -> dict:
    def median(value: Callable[[Run, Run], float]) -> float:
        return statistics.median(value(ours, cp) for ours, cp in rows)

    return {
        "shape": name,
        "layout": f"TP{key[0]}·PP{key[1]}",
        "direction": key[2],
        "seconds": median(lambda ours, _: ours.seconds),
        "cp": median(lambda _, cp: cp.seconds),
        "ratio": median(lambda ours, cp: ours.seconds / cp.seconds),
        "limit": LIMITS.get(name, {}).get(key[:2]) if key[2] != "verify" else None,
        "cores": median(lambda ours, _: ours.cores) / size * 1e9,
        "cp_cores": median(lambda _, cp: cp.cores) / size * 1e9,
        "cores_ratio": median(lambda ours, cp: ours.cores / cp.cores),
        "cores_limit": CORE_LIMIT if "bare" in key[2] else None,
        "peak_mib": max(ours.peak for ours, _ in rows),
        "runs": [round(ours.seconds / cp.seconds, 2) for ours, cp in rows],
    }


def core_seconds(command: list[str], runs: int = 5) -> float:
    """The least of some runs: what else goes on only adds to it."""
    return min(timed(command, Path()).cores for _ in range(runs))


def rate(act: Callable[[], object], nbytes: int, runs: int = 5) -> float:
    """GB a second, the best of some runs."""
    act()
    seconds = []
    for _ in range(runs):
        started = time.monotonic()
        act()
        seconds.append(time.monotonic() - started)
    return nbytes / min(seconds) / 1e9


def write_directly(path: Path, block: memoryview, count: int) -> None:
    """A file past the page cache, as conversions write."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        for number in range(count):
            os.pwrite(descriptor, block, number * len(block))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        path.unlink()


def machine(folder: Path) -> str:
    """What one core, and the disk, can do at best: no conversion takes less than its share of these."""
    block = memoryview(mmap.mmap(-1, 64 << 20))
    source, target = np.frombuffer(block, np.uint8), np.empty(64 << 20, np.uint8)
    source[:] = np.arange(64 << 20, dtype=np.uint8)
    copied = rate(lambda: np.copyto(target, source), 64 << 20)
    hashed = {
        name: rate(lambda make=make: make(block), 64 << 20) for name, make in (("sha256", hashlib.sha256), ("BLAKE3", blake3))
    }
    written = rate(lambda: write_directly(folder / "X", block, 8), 512 << 20, runs=2)
    return (
        f"{os.cpu_count()} cores; a core copies memory at {copied:.1f} GB/s, takes sha256 at {hashed['sha256']:.1f} GB/s and "
        f"BLAKE3 at {hashed['BLAKE3']:.1f} GB/s; direct writes {written:.1f} GB/s"
    )


def startup() -> str:
    """What commands take that do next to nothing, beside the import of numpy."""
    numpy = core_seconds([sys.executable, "-c", "import numpy"])
    commands = {name: core_seconds([sys.executable, "-m", "converter", name]) for name in ("--help", "families")}
    listed = ", ".join(f"{name} {seconds:.2f} ({seconds / numpy:.1f} ×)" for name, seconds in commands.items())
    return f"core-seconds to start: import numpy {numpy:.2f}, {listed}; limit {STARTUP_LIMIT} ×"


HEADER = (
    f"{'shape':6} {'layout':8} {'direction':12} {'mbconvert':>9} {'cp+sync':>8} {'ratio':>6} {'limit':>6} "
    f"{'cores/GB':>9} {'of cp':>6} {'ratio':>6} {'limit':>6} {'peak':>8}  ratios"
)


def line(row: dict) -> str:
    return (
        f"{row['shape']:6} {row['layout']:8} {row['direction']:12} {row['seconds']:7.2f} s {row['cp']:6.2f} s "
        f"{row['ratio']:6.2f} {row['limit'] or '-':>6} {row['cores']:9.2f} {row['cp_cores']:6.2f} {row['cores_ratio']:6.2f} "
        f"{row['cores_limit'] or '-':>6} {row['peak_mib']:4.0f} MiB  {row['runs']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: 1b and 8b-16")
    parser.add_argument("--only", action="append", choices=DIRECTIONS, default=[], help="default: all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-bench"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{machine(options.folder)}\n{startup()}\n{HEADER}", flush=True)
    for name in options.shape or ["1b", "8b-16"]:
        for figures in measure(options.folder, name, options.runs, options.only):
            print(line(figures), flush=True)
        shutil.rmtree(options.folder / name)


if __name__ == "__main__":
    main()
