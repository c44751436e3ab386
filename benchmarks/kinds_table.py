"""What is read and written of each kind of checkpoint, as a page of Markdown: read off the code, and off small checkpoints.

python -m benchmarks.kinds_table            print it
python -m benchmarks.kinds_table --write    put it into docs/checkpoints.md

Which optimizer state is read is found by opening the checkpoints of tests/golden, which megatron-core and Megatron-LM wrote.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from converter.cli import cli
from converter.report import Report, inspect_checkpoint
from converter.sources import open_source
from formats.detect import Format, detect
from formats.errors import UserError
from formats.foreign import FORMATS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "checkpoints.md"
GOLDEN = ROOT / "tests" / "golden"

HEADER = """\
# Kinds of checkpoints

Made by `python -m benchmarks.kinds_table --write`; a test checks that it is current. [checkpoint.md](checkpoint.md) describes the
files that `mbconvert` writes, and by what each kind is recognized.

The files decide, not the folder's name. `mbconvert inspect` says which kind a checkpoint is, with its layout, its writer and what
it holds of a training run. `checkpoint.pretrained_checkpoint` of `mbtrain` takes what `mcore-to-hf` or `hf-to-mcore` reads.

*Optimizer* lists how optimizer state that is read may be stored, in megatron-core's words: Adam's moments and the fp32 masters.
`inspect --check` compares masters with weights, `mcore-to-hf --from master` exports them, and `reshard` writes all of it for
another layout. Each was tried on a small checkpoint in `tests/golden`; NeMo's were made of these, as its sources lay them out.
Weights are read whatever the optimizer state is.

"""
COLUMNS = ("kind, as `inspect` calls it", "read by", "written by", "optimizer")

REFUSED = """
## Recognized and refused

`inspect` and every other command name these, and say how to get weights that can be read.

"""

_MEGATRON = ("mcore-to-hf", "verify", "inspect", "reshard", "merge", "average", "extend-vocab")
_MODEL = ("hf-to-mcore", "verify", "inspect", "merge", "average", "extend-vocab")
_ADAPTER = ("adapter-to-mcore", "inspect", "merge")
_OWN_NAMES = {"torch": Format.RANK_FILES}
"""The formats that `inspect` calls otherwise than Megatron-LM's `--ckpt-format`."""

_WITHOUT_GOLDEN = {Format.NEMO: "as the `torch_dist` or `zarr` in it, but for the schedule"}
"""Megatron's kinds of which no checkpoint is in tests/golden; `tests/converter/test_nemo_optimizer.py` makes some."""


def main() -> None:
    """Print the page, or write it."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page(), end="")


def page() -> str:
    """Return the whole page. Takes a few seconds: it opens every small checkpoint."""
    reports = list(_reports())
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_row(kind, reports) for kind in Format)]
    refused = dict.fromkeys(known.what for known in FORMATS)
    return (
        HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows) + REFUSED + "".join(f"- {refusal}\n" for refusal in refused)
    )


def _reports() -> Iterator[Report]:
    """Yield what `inspect` says of each small checkpoint of Megatron's."""
    for archive in sorted(GOLDEN.glob("*/*.tar.xz")):
        with TemporaryDirectory() as folder, tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
            root = next(Path(folder).iterdir())
            if _is_megatron(root):
                yield inspect_checkpoint(root)


def _is_megatron(root: Path) -> bool:
    try:
        return detect(open_source(root)).is_megatron
    except UserError:
        return False  # an archive of several checkpoints


def _row(kind: Format, reports: Iterable[Report]) -> list[str]:
    optimizers = {
        report.state.optimizer for report in reports if report.format == kind.value and report.optimizer_state and report.state
    }
    return [
        f"`{kind.value}`",
        ", ".join(f"`{command}`" for command in _readers(kind)),
        ", ".join(f"`{command}`" for command in _writers(kind)),
        ", ".join(f"`{state}`" if state else "not read" for state in sorted(optimizers)) or _WITHOUT_GOLDEN.get(kind, ""),
    ]


def _readers(kind: Format) -> tuple[str, ...]:
    if kind.is_megatron:
        return _MEGATRON
    return _ADAPTER if kind is Format.PEFT else _MODEL


def _writers(kind: Format) -> Iterator[str]:
    """Yield the commands that write a kind."""
    match kind:
        case Format.HUGGINGFACE:
            yield from ("mcore-to-hf", "merge", "average", "extend-vocab")
        case Format.PEFT:
            yield "adapter-to-hf"
        case Format.TORCH_DIST:
            yield from ("hf-to-mcore", "reshard", "merge", "average", "extend-vocab", "adapter-to-mcore", "mbtrain")
        case _:
            yield from (f"hf-to-mcore --ckpt-format {name}" for name in _ckpt_formats() if _named(name) is kind)


def _ckpt_formats() -> list[str]:
    """Return the formats that `hf-to-mcore` has a choice of."""
    option = next((flag for flag in cli.commands["hf-to-mcore"].params if flag.name == "ckpt_format"), None)
    return list(option.type.choices) if option and isinstance(option.type, click.Choice) else []


def _named(name: str) -> Format:
    return _OWN_NAMES.get(name) or Format(f"Megatron {name}")


if __name__ == "__main__":
    main()
