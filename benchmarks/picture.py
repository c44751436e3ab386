"""Real conversions in a terminal, as the picture in the README.

python benchmarks/picture.py docs/conversion.svg
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from benchmarks.convert import SHAPES, make_model

WIDTH = 112
COMMANDS = (
    "hf-to-mcore Llama-3.2-1B megatron --tp 8 --pp 4 --verify",
    "inspect megatron",
    "inspect megatron --check",
    "mcore-to-hf megatron Llama-back",
    "verify Llama-back megatron",
    "hf-to-mcore Llama-3.2-1B again --tp 3",
)
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


def seen(words: list[str], folder: str) -> list[str]:
    """The lines a terminal shows at the end of a command: of a bar, its last state."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    process = subprocess.Popen(
        [sys.executable, "-m", "converter", *words], cwd=folder, stdout=theirs, stderr=theirs, env=environment
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


def main(picture: str) -> None:
    """Run the commands on a 1B shape and draw what was seen."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "Llama-3.2-1B", SHAPES["1b"])
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "green"), (f"mbconvert {command}", "bold")))
            for line in seen(command.split(), folder):
                if line.strip():
                    console.print(Text.from_ansi(line))
            console.print()
    console.save_svg(picture, title="mbconvert", theme=MONOKAI, code_format=_FORMAT)


if __name__ == "__main__":
    main(*sys.argv[1:])
