"""Real conversions and a real training run in a terminal, as the pictures in the README.

python -m benchmarks.picture conversion docs/conversion.svg
python -m benchmarks.picture training docs/training.svg
python -m benchmarks.picture finetuning docs/finetuning.svg
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from benchmarks.convert import SHAPES, make_model
from benchmarks.docstrings import modules

WIDTH = {"conversion": 112, "training": 172, "finetuning": 172}
COMMANDS = {
    "conversion": (
        "mbconvert hf-to-mcore Llama-3.2-1B megatron --tp 8 --pp 4 --verify",
        "mbconvert inspect megatron",
        "mbconvert inspect megatron --check",
        "mbconvert mcore-to-hf megatron Llama-back",
        "mbconvert verify Llama-back megatron",
        "mbconvert hf-to-mcore Llama-3.2-1B again --tp 3",
    ),
    "training": (
        "mbtrain prepare-data sources text --tokenizer byte",
        "mbtrain pretrain llama_tiny --nproc 2 model.tensor_model_parallel_size=2 dataset.blend=[text] checkpoint.save=run",
        "mbtrain generate run --prompt 'def __init__(self' --max-new-tokens 16",
        "mbconvert mcore-to-hf run llama-hf",
        "mbtrain pretrain llama_tiny train.train_itres=5",
    ),
    "finetuning": (
        "mbtrain preview llama_tiny dataset.path=docstrings.jsonl --examples 2",
        "mbtrain finetune llama_tiny dataset.path=docstrings.jsonl checkpoint.pretrained_checkpoint=base checkpoint.save=adapter",
        "mbconvert adapter-to-hf adapter peft",
        "mbconvert merge base adapter merged --to hf",
    ),
}
MODULES = {"mbconvert": "converter", "mbtrain": "trainer"}
_FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-family: arial; font-weight: bold; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def seen(command: str, folder: str, *, width: int) -> list[str]:
    """The lines a terminal shows at the end of a command: of a bar, its last state."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width)}
    program, *words = shlex.split(command)
    process = subprocess.Popen(
        [sys.executable, "-m", MODULES[program], *words], cwd=folder, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 1 << 16):
            shown += data
    except OSError:
        pass  # how Linux says that the other end is closed
    process.wait()
    return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in shown.decode().split("\n")]


def _model(folder: Path) -> None:
    make_model(folder / "Llama-3.2-1B", SHAPES["1b"])


def _sources(folder: Path) -> None:
    shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / "asyncio", folder / "sources")


def _examples(folder: Path) -> None:
    """Signatures and docstrings, and a model that has read some sources."""
    short_examples = [
        example
        for _, of_module in modules()
        for example in of_module
        if len(example["completion"]) < 120 and len(example["prompt"]) < 120
    ]
    (folder / "docstrings.jsonl").write_text("".join(json.dumps(example) + "\n" for example in short_examples[:1000]))
    _sources(folder)
    for command in COMMANDS["training"][:1]:
        seen(command, str(folder), width=80)
    seen("mbtrain pretrain llama_tiny dataset.blend=[text] checkpoint.save=base train.train_iters=60", str(folder), width=80)


PREPARED = {"conversion": _model, "training": _sources, "finetuning": _examples}


def main(subject: str, picture: str) -> None:
    """Run the commands, conversions on a 1B shape, training on the standard library's sources, and draw what was seen."""
    width = WIDTH[subject]
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        PREPARED[subject](Path(folder))
        for command in COMMANDS[subject]:
            console.print(Text.assemble(("$ ", "green"), (command, "bold")))
            for line in seen(command, folder, width=width):
                if line.strip():
                    console.print(Text.from_ansi(line))
            console.print()
    console.save_svg(picture, title="mbconvert" if subject == "conversion" else "mbtrain", theme=MONOKAI, code_format=_FORMAT)


if __name__ == "__main__":
    main(*sys.argv[1:])
