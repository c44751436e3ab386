"""How fast are other kinds of checkpoints read? Prints `mcore-to-hf` of each beside `cp` of the checkpoint, in turns, in one run.

    python -m benchmarks.kinds [--runs 3] [--kind ranks ...] [--folder DIR]

A Llama of 3.9 GB is made, converted, and written again as files of eight ranks (TP 4, PP 2, `torch.save`) and as zarr, a chunk
for each rank's part. Each round runs `cp -r SRC X && sync`, then the export and `sync`; start-up is counted, the source is in the
page cache. `bare` hashes nothing (`--no-integrity`), `torch_dist` is the format of today, for comparison. The limit is 1.25 times
the time of `cp`. The load of the machine is printed with each row: on one that does other work, read the core-seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.convert import Run, make_model, timed
from formats.folder import LocalFolder
from formats.rank_names import partition_dim
from formats.spec import Array
from formats.torch_dist import TorchDistReader

SHAPE = {
    "hidden": 2048, "layers": 40, "heads": 32, "groups": 8, "head_dim": 64, "ffn": 5632, "vocab": 32000, "tied": False,
}  # fmt: skip
TP, PP = 4, 2
LIMIT = 1.25
KINDS = ("torch_dist", "ranks", "zarr")
ARGS = {
    "tensor_model_parallel_size": TP, "pipeline_model_parallel_size": PP, "expert_model_parallel_size": 1,
    "num_layers": SHAPE["layers"], "hidden_size": SHAPE["hidden"], "num_attention_heads": SHAPE["heads"],
    "group_query_attention": True, "num_query_groups": SHAPE["groups"], "kv_channels": SHAPE["head_dim"],
    "ffn_hidden_size": SHAPE["ffn"], "swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False,
    "position_embedding_type": "rope", "rotary_base": 500000, "rotary_percent": 1.0, "norm_epsilon": 1e-5,
    "max_position_embeddings": 131072, "untie_embeddings_and_output_weights": True,
}  # fmt: skip


def make(folder: Path) -> dict[str, Path]:
    """Write the model in every kind; return the folder of each, and that of the source."""
    folders = {kind: folder / kind for kind in ("hf", *KINDS)}
    make_model(folders["hf"], SHAPE)
    layout = ["--tp", str(TP), "--pp", str(PP), "--quiet", "--json"]
    command = [sys.executable, "-m", "converter", "hf-to-mcore", str(folders["hf"]), str(folders["torch_dist"])]
    timed([*command, *layout], folders["torch_dist"])
    reader = TorchDistReader(LocalFolder(folders["torch_dist"]))
    write_ranks(reader, folders["ranks"] / "iter_0000000")
    write_zarr(reader, folders["zarr"] / "iter_0000000")
    reader.close()
    for kind in ("ranks", "zarr"):
        (folders[kind] / "latest_checkpointed_iteration.txt").write_text("0")
    return folders


def write_ranks(reader: TorchDistReader, folder: Path) -> None:
    """Write the file of every rank, its weights as views of one storage."""
    for tp in range(TP):
        for pp in range(PP):
            weights = dict(of_rank(reader, tp, pp))
            storage = torch.from_numpy(np.concatenate([array.reshape(-1).view(np.uint16) for array in weights.values()]))
            starts = np.cumsum([0, *(array.size for array in weights.values())])
            views = zip(weights.items(), starts, strict=False)
            model = {name: storage[at : at + weight.size].view(torch.bfloat16).view(weight.shape) for (name, weight), at in views}
            target = folder / f"mp_rank_{tp:02d}_{pp:03d}"
            target.mkdir(parents=True)
            content = {"args": argparse.Namespace(**ARGS), "iteration": 0, "checkpoint_version": 3.0, "model": model}
            torch.save(content, target / "model_optim_rng.pt")


def of_rank(reader: TorchDistReader, tp: int, pp: int) -> Iterator[tuple[str, Array]]:
    """Yield a rank's part of every weight of its stage, under the stage's own numbers of layers."""
    layers_per_stage = SHAPE["layers"] // PP
    for name in reader.specs:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        stage = PP - 1 if layer is None and "embedding" not in name else (layer or 0) // layers_per_stage
        if stage == pp:
            local = name if layer is None else name.replace(f".{layer}.", f".{layer - layers_per_stage * pp}.", 1)
            yield local, part(name, whole(reader, name), tp)


def whole(reader: TorchDistReader, name: str) -> Array:
    spec = reader.specs[name]
    value = np.empty(spec.shape, spec.dtype)
    reader.read(name, spec.full_region, value)
    return value


def part(name: str, value: Array, tp: int) -> Array:
    """Return what a tensor-parallel rank holds of a weight; of gated projections its gates, then what they multiply."""
    axis = partition_dim(name, TP)
    if axis is None:
        return value
    if "linear_fc1." in name:
        return np.concatenate([np.split(half, TP)[tp] for half in np.split(value, 2)])
    return np.ascontiguousarray(np.split(value, TP, axis)[tp])


def write_zarr(reader: TorchDistReader, folder: Path) -> None:
    """Write each key as megatron-core did, a file for each chunk."""
    container = reader.container
    for key in container.tensor_names:
        tensor = container.tensor(key)
        sizes = [part.stop - part.start for part in tensor.chunks[0].region]
        array = {"shape": tensor.shape, "chunks": sizes, "dtype": "bfloat16", "order": "C", "zarr_format": 2}
        (folder / key).mkdir(parents=True)
        fixed = {"compressor": None, "filters": None, "fill_value": None}
        (folder / key / ".zarray").write_text(json.dumps({**array, **fixed}))
        for chunk in tensor.chunks:
            value = np.empty(sizes, tensor.dtype)
            container.read(tensor, chunk.region, value)
            name = ".".join(str(part.start // size) for part, size in zip(chunk.region, sizes, strict=True))
            value.view(np.uint8).tofile(folder / key / name)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def measure(folders: Mapping[str, Path], out: Path, kind: str, runs: int) -> Iterator[str]:
    """Yield a row for each way of exporting one kind."""
    export = [sys.executable, "-m", "converter", "mcore-to-hf", str(folders[kind]), str(out), "--hf-config", str(folders["hf"])]
    rounds: dict[str, list[tuple[Run, Run]]] = {}
    for _ in range(runs):
        for name, options in (("hashed", []), ("bare", ["--no-integrity"])):
            copied = timed(["cp", "-r", str(folders[kind]), str(out)], out)
            rounds.setdefault(name, []).append((timed([*export, "--quiet", "--json", *options], out), copied))
    for name, pairs in rounds.items():
        yield row(kind, name, pairs, sum(path.stat().st_size for path in folders[kind].rglob("*") if path.is_file()))


HEADER = (
    f"{'kind':10} {'export':7} {'source':>8} {'mbconvert':>9} {'cp+sync':>8} {'ratio':>6} {'limit':>6} {'cores/GB':>9} "
    f"{'of cp':>6} {'peak':>8} {'load':>5}  ratios"
)


def row(kind: str, name: str, pairs: list[tuple[Run, Run]], size: int, *, limit: float = LIMIT) -> str:
    ours, copied = (statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1))
    cores, cp_cores = (statistics.median(pair[side].cores for pair in pairs) / size * 1e9 for side in (0, 1))
    ratios = [run.seconds / cp.seconds for run, cp in pairs]
    return (
        f"{kind:10} {name:7} {size / 1e9:5.2f} GB {ours:7.2f} s {copied:6.2f} s {statistics.median(ratios):6.2f} {limit:6.2f} "
        f"{cores:9.2f} {cp_cores:6.2f} {max(run.peak for run, _ in pairs):4.0f} MiB {os.getloadavg()[0]:5.1f}  "
        f"{[round(ratio, 2) for ratio in ratios]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-bench-kinds"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    folders = make(options.folder)
    print(HEADER, flush=True)
    for kind in options.kind or KINDS:
        for text in measure(folders, options.folder / "X", kind, options.runs):
            print(text, flush=True)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
