"""How fast is a checkpoint resharded, its optimizer state included? Prints `reshard` beside `cp` of it, in turns, in one run.

    python -m benchmarks.reshard [--runs 3] [--gigabytes 9] [--folder DIR]

A Llama of about 14 bytes a parameter is made: bf16 weights, fp32 masters that round to them and Adam's two moments, saved by
torch as `fully_reshardable` state at TP1·PP1. Each round runs `cp -r SRC X && sync`, then `mbconvert reshard` to each layout and
`sync`; start-up is counted, the source is in the page cache. `bare` hashes nothing (`--no-integrity`). The limit is twice the
time of `cp`. The load of the machine is printed with each row: on one that does other work, read the core-seconds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from benchmarks.convert import Run, make_model, timed
from benchmarks.kinds import HEADER, row
from formats.folder import LocalFolder
from formats.spec import DTYPES
from formats.torch_dist import COMMON_KEY, TorchDistReader

SHAPE = {"hidden": 2048, "heads": 32, "groups": 8, "head_dim": 64, "ffn": 5632, "vocab": 32000, "tied": False}
LAYER, OTHER = 14 * 45_092_864, 14 * 131_074_048
"""Bytes of one layer, and of the embeddings, with their state."""

LAYOUTS = {"TP1·PP1": (), "TP8·PP4": ("--tp", "8", "--pp", "4")}
LIMIT = 2.0
GROUP = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "step": 10.0, "params": []}


def make(folder: Path, gigabytes: float) -> Path:
    """Write the checkpoint, and return its root."""
    model = {**SHAPE, "layers": max(4, 4 * round((gigabytes * 1e9 - OTHER) / LAYER / 4))}
    make_model(folder / "hf", model)
    command = [sys.executable, "-m", "converter", "hf-to-mcore", str(folder / "hf"), str(folder / "m"), "--quiet", "--json"]
    timed(command, folder / "m")
    add_state(folder / "m", folder / "source")
    for folder_name in ("hf", "m"):
        shutil.rmtree(folder / folder_name)
    return folder / "source"


def add_state(source: Path, target: Path) -> None:
    """Write a checkpoint of bf16 weights again, with optimizer state."""
    weights = stored(source)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.distcp", ".metadata", "integrity.json"))
    planner = DefaultSavePlanner(flatten_state_dict=False)  # the common state is one object
    dcp.save({**weights, **with_state(weights)}, checkpoint_id=target / "iter_0000000", planner=planner, no_dist=True)


def stored(root: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint by their keys."""
    reader = TorchDistReader(LocalFolder(root))
    weights: dict[str, torch.Tensor] = {}
    for key in reader.container.tensor_names:
        tensor = reader.container.tensor(key)
        value = torch.empty(tensor.shape, dtype=torch.bfloat16)
        assert tensor.dtype == DTYPES["bf16"]
        reader.container.read(
            tensor, tuple(slice(0, size) for size in tensor.shape), value.view(torch.uint16).numpy().view(tensor.dtype)
        )
        weights[key] = value
    reader.close()
    return weights


def with_state(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return optimizer state: masters between a weight and the next, and moments, as `fully_reshardable` names them."""
    state: dict[str, Any] = {}
    for key, weight in weights.items():
        master = weight.float()
        state[f"optimizer.state.param.{key}"] = master * (1 + 2**-10)  # rounds back
        state[f"optimizer.state.exp_avg.{key}"] = master * 0.1
        state[f"optimizer.state.exp_avg_sq.{key}"] = master.square()
    groups = {"optimizer": {"param_groups": [GROUP]}, "param_state_sharding_type": "fully_reshardable"}
    return {**state, COMMON_KEY: [{"checkpoint_version": 3.0, "iteration": 0, "optimizer": groups}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=9.0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-bench-reshard"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    source = make(options.folder, options.gigabytes)
    print(HEADER, flush=True)
    rounds: dict[tuple[str, str], list[tuple[Run, Run]]] = {}
    out = options.folder / "X"
    for _ in range(options.runs):
        for name, sizes in LAYOUTS.items():
            for hashing, flags in (("hashed", ()), ("bare", ("--no-integrity",))):
                copied = timed(["cp", "-r", str(source), str(out)], out)
                command = [
                    sys.executable,
                    "-m",
                    "converter",
                    "reshard",
                    str(source),
                    str(out),
                    "--quiet",
                    "--json",
                    *sizes,
                    *flags,
                ]
                rounds.setdefault((name, hashing), []).append((timed(command, out), copied))
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    for (name, hashing), pairs in rounds.items():
        print(row(name, hashing, pairs, size, limit=LIMIT), flush=True)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
