"""What must hold before a conversion starts: its options, its paths, and tensors that must be equal or zero.

What a family or a format asks for is checked where it is planned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from converter.execution import ExecutionOptions
from converter.hybrid import GPT, HYBRID
from converter.plan import TensorPlan, pieces
from converter.run import PIECE_BYTES
from converter.state_dicts import IMPLEMENTATIONS
from converter.values import CHOICES, KEEP, MASTERS, SOURCES
from converter.workers import check_workers
from formats.arrays import same_bits
from formats.dtypes import QUANTIZED
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.iterations import WRITTEN
from formats.replacement import Rule
from formats.spec import Reader, dtype_name, extent
from formats.target import check_target
from formats.urls import is_remote, without_secrets


def check_execution(options: ExecutionOptions) -> None:
    """Raise TypeError for a keyword that no conversion takes, UserError for a number of threads out of bounds."""
    for name in options:
        if name not in ExecutionOptions.__optional_keys__:
            raise TypeError(f"a conversion takes no keyword argument `{name}`")
    check_workers(options.get("workers"))


def check_options(*, dtype: str, **counts: int | None) -> None:
    """Raise UserError for a dtype that is not one of the choices, or a count below 1. The command line checks both itself."""
    if dtype not in CHOICES:
        raise UserError(f"dtype `{dtype}` is not one of {', '.join(CHOICES)}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"`{name}` is {count}, which should be 1 or more")


def check_layout(layout: str | None) -> None:
    """Raise UserError for a layout that is not one of the choices."""
    if layout not in (None, GPT, HYBRID):
        raise UserError(f"layout `{layout}` is not one of {GPT}, {HYBRID}")


def check_format(ckpt_format: str, transformer_impl: str) -> None:
    """Raise UserError for a format of Megatron checkpoints, or layers, that are not one of the choices."""
    if ckpt_format not in WRITTEN:
        raise UserError(f"ckpt_format `{ckpt_format}` is not one of {', '.join(WRITTEN)}")
    if transformer_impl not in IMPLEMENTATIONS:
        raise UserError(f"transformer_impl `{transformer_impl}` is not one of {', '.join(IMPLEMENTATIONS)}")


def check_quantize(quantize: str | None, dtype: str) -> None:
    """Raise UserError for a method that is not one of the choices, or one beside a dtype for the same weights."""
    if quantize is not None and quantize not in QUANTIZED:
        raise UserError(f"quantize `{quantize}` is not one of {', '.join(QUANTIZED)}")
    if quantize is not None and dtype not in (KEEP, "bf16"):
        raise UserError(f"`--quantize {quantize}` is for weights in bf16, `--dtype` is {dtype}", hint="leave out one of both")


def check_values_from(values_from: str, quantize: str | None = None) -> None:
    """Raise UserError for values from anything but the choices, or from masters that are then quantized."""
    if values_from not in SOURCES:
        raise UserError(f"values_from `{values_from}` is not one of {', '.join(SOURCES)}")
    if values_from == MASTERS and quantize:
        raise UserError(
            f"`--quantize {quantize}` is for weights in bf16, which are what masters round to",
            hint="leave out `--from master`",
        )


def check_locations(target: str, sources: Sequence[Folder], options: ExecutionOptions) -> None:
    """Raise UserError if writing to `target` would harm a source or something else, or cannot work there."""
    if not is_remote(target):
        paths = [source.path for source in sources if isinstance(source, LocalFolder)]
        check_target(Path(target), *paths, rule=replacement_rule(options))
        return
    from formats.remote.upload import TARGETS  # noqa: PLC0415 - the clients of object stores

    kind = target.partition("://")[0].lower()
    if kind not in TARGETS:
        raise UserError(f"`{kind}://` cannot be written to", hint="a directory, s3:// and gs:// can")
    if options.get("resume") or options.get("verify"):
        raise UserError(
            f"`--{'resume' if options.get('resume') else 'verify'}` needs a directory as target, "
            f"`{without_secrets(target)}` is not one",
            hint="nothing can be read there before all of it is; afterwards `mbconvert verify SRC DST` compares",
        )
    for source in sources:
        if _prefix(source.label).startswith(_prefix(without_secrets(target))):
            raise UserError(
                f"the source `{source.label}` is inside `{without_secrets(target)}`, where the output is to be written",
                hint="choose another target",
            )


def _prefix(url: str) -> str:
    """Return what the names of all objects below a URL begin with."""
    kind, _, path = url.partition("://")
    bucket, _, folder = path.partition("/")
    return f"{kind}://{bucket}/{folder.strip('/')}".rstrip("/") + "/"


def replacement_rule(options: ExecutionOptions, planned: Collection[str] | None = None) -> Rule | None:
    """Return the rule for what may be replaced at the target, given the `planned` files once they are known; None without
    `overwrite`."""
    if not options.get("overwrite"):
        return None
    from converter.ownership import replaceable  # noqa: PLC0415 - knows every format's names, and is seldom needed

    return replaceable(planned)


def check_equal(reader: Reader, name: str, other: str) -> None:
    """Raise UserError unless two tensors hold the same bytes. Reads both, a piece at a time."""
    difference = _first_difference(reader, name, other)
    if difference:
        raise UserError(
            f"`{name}` differs from `{other}`, though `config.json` ties them: {difference}",
            hint="set `tie_word_embeddings` to false in `config.json` to keep both",
        )


def _first_difference(reader: Reader, name: str, other: str) -> str:
    """Return how two tensors differ, in words; nothing if they do not."""
    spec, like = reader.specs[name], reader.specs[other]
    if (spec.shape, spec.dtype) != (like.shape, like.dtype):
        one, two = (f"{dtype_name(each.dtype)} {list(each.shape)}" for each in (spec, like))
        return f"they are {one} and {two}"
    for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES):
        left, right = (np.empty(extent(piece.region), spec.dtype) for _ in range(2))
        reader.read(name, piece.region, left)
        reader.read(other, piece.region, right)
        if not same_bits(left, right):
            differs = left.reshape(-1).view(np.uint8) != right.reshape(-1).view(np.uint8)
            first = np.unravel_index(int(differs.argmax()) // spec.dtype.itemsize, left.shape)
            element = [part.start + int(index) for part, index in zip(piece.region, first, strict=True)]
            return f"at {element} they are {float(left[first]):.9g} and {float(right[first]):.9g}"
    return ""


def check_filled(reader: Reader, name: str, value: float) -> None:
    """Raise UserError unless all values of a tensor are those that Megatron's has where Hugging Face has no such tensor."""
    if is_filled(reader, name, value):
        return
    if value:
        raise UserError(
            f"`{name}` is not {value:g} everywhere any more, but `config.json` has no place for it",
            hint="models of this family have no such weights: this one cannot be exported as one of them",
        )
    raise UserError(
        f"`{name}` is not zero any more, but `config.json` has no place for it",
        hint="set `attention_bias` and `mlp_bias` to true in the `config.json` given with `--hf-config`",
    )


def is_filled(reader: Reader, name: str, value: float, *, start: int = 0) -> bool:
    """Return whether all rows of a tensor from row `start` on hold one value. Reads them, a piece at a time."""
    spec = reader.specs[name]
    for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES):
        if piece.rows.stop > start:
            data = np.empty(extent(piece.region), spec.dtype)
            reader.read(name, piece.region, data)
            if np.any(data[max(0, start - piece.rows.start) :] != value):
                return False
    return True
