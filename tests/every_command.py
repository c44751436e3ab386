"""Every `mbconvert` command, as a user runs it, on what the environment of this interpreter has installed.

    python -m tests.every_command [--moto PYTHON]

`.ci/run` calls it where only the base dependencies are installed, and where the lowest allowed versions are. Needs no torch. With
`--moto`, an interpreter that has moto, the model goes up to S3 and Google Cloud too, which wants the `remote` extra here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.convert import SHAPES, make_model
from converter.cli import cli
from formats.huggingface import make_header
from formats.spec import DTYPES, TensorSpec
from tests.demo import compare
from tests.servers import GoogleServer, HubServer, WebServer

MBCONVERT = Path(sys.executable).with_name("mbconvert")
SHAPE = {**SHAPES["tiny"], "hidden": 256, "layers": 4, "head_dim": 32, "ffn": 512}
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Run every command; stop at the first that fails, and where one was forgotten."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--moto", metavar="PYTHON")
    moto = parser.parse_args().moto
    moto = moto and Path(moto).absolute()  # commands run in another folder
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        make_model(Path("hf"), SHAPE)
        make_adapter(Path("adapter"), SHAPE)
        run("--version")
        commands = [run(*words.split()) for words in WORDS]
        assert set(commands) == set(cli.commands), set(cli.commands) ^ set(commands)
        compare(Path("hf"), Path("back"))
        with hub(Path("hf")):
            run("verify", "hf", "hf://org/name")
        if moto:
            with s3(moto), google():
                for target in ("s3://models/megatron", "gs://models/megatron"):
                    run("hf-to-mcore", "hf", target, "--quiet")
                    run("verify", "hf", target)
    print(f"\nevery command ran: {', '.join(sorted(cli.commands))}")


WORDS = (
    "families",
    "hf-to-mcore hf mcore --tp 2 --pp 2 --verify",
    "inspect mcore --check",
    "verify hf mcore",
    "reshard mcore resharded --tp 4 --verify",
    "verify mcore resharded",
    "mcore-to-hf mcore back --verify --json",
    "adapter-to-mcore adapter adapter-mcore --base mcore",
    "adapter-to-hf adapter-mcore adapter-back",
    "merge mcore adapter merged --to hf",
    "inspect merged",
    "average hf back averaged --weights 1,3 --verify",
    "average mcore resharded averaged-mcore",
    "extend-vocab hf extended --to 8200 --verify",
    "extend-vocab mcore extended-mcore --to 8200 --verify",
    "verify extended extended-mcore",
)


def run(*words: str) -> str:
    """Show a command and run it; its name."""
    print(f"\n$ mbconvert {' '.join(words)}", flush=True)
    subprocess.run([MBCONVERT, *words], check=True)
    return words[0]


def make_adapter(folder: Path, shape: dict) -> None:
    """A LoRA of rank 4 on the query projections, as PEFT saves it."""
    queries = shape["heads"] * shape["head_dim"]
    names = (f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(shape["layers"]))
    specs = [
        TensorSpec(f"{name}.lora_{factor}.weight", size, DTYPES["fp32"])
        for name in names
        for factor, size in (("A", (4, shape["hidden"])), ("B", (queries, 4)))
    ]
    rng = np.random.default_rng(2)
    folder.mkdir()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(make_header(specs))
        for spec in specs:
            file.write(rng.normal(0, 0.02, spec.shape).astype(np.float32).tobytes())
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(described))


@contextmanager
def hub(folder: Path) -> Iterator[None]:
    """A server that speaks as the Hub does, with one model."""
    elsewhere = WebServer()
    server = HubServer("org/name", elsewhere)
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    os.environ["HF_ENDPOINT"] = server.url
    with elsewhere.running(), server.running():
        yield


@contextmanager
def google() -> Iterator[None]:
    """A server that speaks as Google Cloud Storage does, with a bucket called `models`."""
    server = GoogleServer("models")
    os.environ["STORAGE_EMULATOR_HOST"] = server.url
    with server.running():
        yield


@contextmanager
def s3(python: str) -> Iterator[None]:
    """A server that speaks S3, in a process of its own, with a bucket called `models`."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    server = subprocess.Popen(
        [python, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        from botocore.session import get_session

        get_session().create_client("s3").create_bucket(Bucket="models")
        yield
    finally:
        server.communicate("")


if __name__ == "__main__":
    main()
