"""What planning takes, and whether `--dry-run`'s figure for memory is what a conversion then takes. Prints two tables.

    python -m benchmarks.plan [--tensors 45000 --tensors 200000] [--skip-experts] [--skip-cases] [--folder DIR]

Models are files full of holes: they take no disk and no time to make. Every row is a process of its own, with its processor
time (of the user alone) and its VmHWM. Needs no torch; the upload goes to a server here that forgets what it is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.convert import make_model
from benchmarks.headers import DEEPSEEK_V3, FP8, SMALL_EXPERTS, make_headers
from converter.memory import peak_memory

TARGETS = {45_000: (1.5, 128), 200_000: (5.0, 250)}
"""Seconds of processor time and MiB, by number of tensors."""

SHARD_BYTES = 160 << 10
"""Some 300 tiny tensors in a file, as large models have."""

PROGRAM = "import sys, json; from benchmarks.plan import measured; measured(json.loads(sys.argv[1]))"


def many(tensors: int) -> dict:
    """A Llama of tiny layers with that many tensors."""
    sizes = {"hidden": 16, "heads": 2, "groups": 2, "head_dim": 8, "ffn": 16, "vocab": 16}
    return {**sizes, "layers": -(-tensors // 9), "tied": False}


def measured(call: dict) -> None:
    """In a process of its own: one call, then what it took, as JSON."""
    from converter import hf_to_mcore, mcore_to_hf, reshard

    estimated_peak = 0
    if call["what"] == "index":
        from formats.dcp_index import read_index
        from formats.folder import LocalFolder

        index = read_index(LocalFolder(Path(call["source"])))
        for name in index.tensors:
            index.tensor(name)
    else:
        convert = {"import": hf_to_mcore, "export": mcore_to_hf, "reshard": reshard}[call["what"]]
        estimated_peak = convert(call["source"], call["target"], **call.get("options", {})).peak_memory
    print(json.dumps({"cpu": os.times().user, "peak": peak_memory(), "estimated": estimated_peak}))


def run(**call: object) -> dict:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }  # as an installed package
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(call)], stdout=subprocess.PIPE, check=True, env=environment
    )
    return json.loads(completed.stdout.splitlines()[-1])


def layout(shape: dict) -> dict:
    """TP2·PP8, for any number of layers."""
    layers_per_stage = -(-shape["layers"] // 8)
    return {
        "tp": 2,
        "pp": 8,
        "pp_layout": [layers_per_stage] * 7 + [shape["layers"] - 7 * layers_per_stage],
        "make_vocab_size_divisible_by": 1,
    }


def planning(folder: Path, tensors: int) -> None:
    source, megatron, shape = folder / f"hf-{tensors}", folder / f"mcore-{tensors}", many(tensors)
    make_model(source, shape, data=False, shard_bytes=SHARD_BYTES)
    call = {"source": str(source), "target": str(folder / "nothing")}
    row(tensors, "import", run(what="import", **call, options={**layout(shape), "dry_run": True}))
    run(what="import", source=str(source), target=str(megatron), options={**layout(shape), "integrity": False})
    row(tensors, "export", run(what="export", **{**call, "source": str(megatron)}, options={"dry_run": True}))
    options = {**layout(shape), "tp": 1, "dry_run": True}
    row(tensors, "reshard", run(what="reshard", **{**call, "source": str(megatron)}, options=options))
    row(tensors, "index", run(what="index", **{**call, "source": str(megatron / "iter_0000000")}))
    shutil.rmtree(source)
    shutil.rmtree(megatron)


TP8_PP16_EP64 = {"tp": 8, "pp": 16, "pp_layout": "Et*3|(t*4|)*14t*2mL", "ep": 64}
"""What DeepSeek-V3 is laid out for, with experts that are whole (`etp` 1) or divided as other layers are."""


def experts(folder: Path) -> None:
    """DeepSeek-V3 of its true sizes, in bf16 and in FP8; then as many tensors of experts as the largest model above has."""
    source, megatron = folder / "hf-experts", folder / "mcore-experts"
    for changes in ({}, FP8):
        tensors = make_headers(source, DEEPSEEK_V3 | changes)
        for etp in (1, 8):
            options = {**TP8_PP16_EP64, "etp": etp, "dry_run": True}
            figures = run(what="import", source=str(source), target=str(folder / "nothing"), options=options)
            row(tensors, f"DeepSeek-V3{', FP8' if changes else ''}, ETP{etp}", figures, TARGETS[200_000])
        shutil.rmtree(source)
    tensors = make_headers(source, SMALL_EXPERTS, shard_bytes=SHARD_BYTES)
    options = {"tp": 2, "pp": 8, "ep": 8, "etp": 1, "make_vocab_size_divisible_by": 1}
    call = {"source": str(source), "target": str(folder / "nothing")}
    row(tensors, "import, experts", run(what="import", **call, options={**options, "dry_run": True}), TARGETS[200_000])
    run(what="import", source=str(source), target=str(megatron), options={**options, "integrity": False})
    call["source"] = str(megatron)
    row(tensors, "export, experts", run(what="export", **call, options={"dry_run": True}), TARGETS[200_000])
    row(tensors, "reshard, experts", run(what="reshard", **call, options={**options, "ep": 4, "dry_run": True}), TARGETS[200_000])
    shutil.rmtree(source)
    shutil.rmtree(megatron)


def row(tensors: int, label: str, figures: dict, targets: tuple[float, float] | None = None) -> None:
    seconds, mib = targets or TARGETS.get(tensors, (float("nan"), float("nan")))
    print(
        f"{tensors:8,} {label:22} {figures['cpu']:6.2f} s  {seconds:5.1f} s  {figures['peak'] / 2**20:6.0f} MiB  {mib:4.0f} MiB",
        flush=True,
    )


class Forgetful(BaseHTTPRequestHandler):
    """As much of S3 as an upload needs. Keeps nothing."""

    protocol_version = "HTTP/1.1"

    def _answer(self, body: str = "", **headers: str) -> None:
        remaining = int(self.headers.get("Content-Length", 0))
        while remaining:
            remaining -= len(self.rfile.read(min(remaining, 1 << 20)))
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        self._answer("<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")

    def do_PUT(self) -> None:
        self._answer(ETag='"tag"')

    def do_POST(self) -> None:
        kind = "InitiateMultipartUploadResult" if re.search(r"\?uploads", self.path) else "CompleteMultipartUploadResult"
        self._answer(f"<{kind}><UploadId>1</UploadId><ETag>tag</ETag></{kind}>")

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def bucket():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forgetful)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    os.environ.update(environment)
    yield "s3://bucket/out"
    server.shutdown()


LARGE = {"hidden": 1024, "layers": 16, "heads": 16, "groups": 16, "head_dim": 64, "ffn": 4096, "vocab": 16384, "tied": False}
WIDE = {"hidden": 1 << 23, "layers": 1, "heads": 8, "groups": 8, "head_dim": 1, "ffn": 8, "vocab": 8, "tied": False}


def cases(folder: Path) -> None:
    """The four cases that a figure by workers and pieces alone gets wrong."""
    estimated_and_measured(folder, "TP8·PP4·VPP4 to s3://", LARGE, {"tp": 8, "pp": 4, "vpp": 4}, remote=True)
    estimated_and_measured(folder, "45,000 tensors", many(45_000), layout(many(45_000)))
    estimated_and_measured(
        folder, "rows of 16 MiB, 8 workers, cast", WIDE, {"workers": 8, "dtype": "fp32", "make_vocab_size_divisible_by": 1}
    )
    source, megatron, shape = folder / "hf", folder / "mcore", many(150_000)
    make_model(source, shape, data=False, shard_bytes=SHARD_BYTES)
    run(what="import", source=str(source), target=str(megatron), options={**layout(shape), "integrity": False})
    shutil.rmtree(source)
    compared("`.metadata` of 200,000 chunks, back", "export", megatron, folder / "X", {})
    shutil.rmtree(megatron)


def estimated_and_measured(folder: Path, name: str, shape: dict, options: dict, *, remote: bool = False) -> None:
    source = folder / "hf"
    make_model(source, shape, data=False, shard_bytes=SHARD_BYTES if shape["hidden"] == many(1)["hidden"] else 5_000_000_000)
    if remote:
        with bucket() as url:
            compared(name, "import", source, url, options)
    else:
        compared(name, "import", source, folder / "X", options)
    shutil.rmtree(source)


def compared(name: str, command: str, source: Path, target: Path | str, options: dict) -> None:
    estimated = run(what=command, source=str(source), target=str(target), options={**options, "dry_run": True})["estimated"]
    peak = run(what=command, source=str(source), target=str(target), options=options)["peak"]
    print(f"{name:36} {estimated / 2**20:6.0f} MiB {peak / 2**20:6.0f} MiB {estimated / peak:6.2f}  0.85 to 1.15", flush=True)
    if isinstance(target, Path):
        shutil.rmtree(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, action="append", help="default: 45000 and 200000; 0 for none")
    parser.add_argument("--skip-experts", action="store_true")
    parser.add_argument("--skip-cases", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mbconvert-plan"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{'tensors':>8} {'what':22} {'cpu':>8}  {'target':>7}  {'peak':>10}  {'target':>8}")
    for tensors in options.tensors or TARGETS:
        if tensors:
            planning(options.folder, tensors)
    if not options.skip_experts:
        experts(options.folder)
    if not options.skip_cases:
        print(f"{'case':36} {'estimated':>10} {'measured':>10} {'ratio':>6}  target")
        cases(options.folder)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
