"""`make demo`: a small Llama directory with real structure goes to Megatron and comes back, byte for byte.

Needs no torch: the model's weights are random, its files as transformers writes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.convert import SHAPES, make_model

FOLDER = Path("demo")


def main() -> None:
    """Run the commands a user would run, and compare."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    source, megatron, back = FOLDER / "llama-hf", FOLDER / "llama-megatron", FOLDER / "llama-back"
    make_model(source, SHAPES["tiny"], shard_bytes=20_000_000)
    _side_files(source)
    run("hf-to-mcore", source, megatron, "--tp", 2, "--pp", 2)
    run("inspect", megatron)
    run("verify", source, megatron)
    run("mcore-to-hf", megatron, back, "--verify")
    same = compare(source, back)
    print(f"\n{same} files are the same byte for byte: {source} == {back}")


def _side_files(folder: Path) -> None:
    """What lies beside the weights on the Hub."""
    tokens = {chr(code): code for code in range(256)}
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": tokens, "merges": []}})
    )
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n")


def run(*arguments: object) -> None:
    """Show a command, and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ mbconvert {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "converter", *words], check=True)


def compare(first: Path, second: Path) -> int:
    """Print every file's sha256 on both sides; stop with an error where any differs. Answers how many files there are.

    The record of the conversion is the one file that an export adds.
    """
    names = {p.relative_to(folder) for folder in (first, second) for p in folder.rglob("*") if p.is_file()}
    names = sorted(names - {Path("conversion.json")})
    print()
    for name in names:
        sums = [hashlib.sha256((folder / name).read_bytes()).hexdigest() if (folder / name).exists() else "missing"
                for folder in (first, second)]  # fmt: skip
        print(f"{sums[0][:16]}  {sums[1][:16]}  {name}")
        if sums[0] != sums[1]:
            sys.exit(f"error: {name} differs")
    return len(names)


if __name__ == "__main__":
    main()
