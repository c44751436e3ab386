"""From documents to the `.bin` and `.idx` files of Megatron-LM, written by megatron-core.

Knows how work is shared among processes without changing a byte of the output, and when the output becomes visible. Memory
grows with the number of workers and the longest document; and, in megatron-core's writer, by some 100 bytes per document.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converter.execution import Reporter
from formats.errors import TransientError, UserError
from formats.home import expanded
from formats.staging import sync
from trainer import tokenizers
from trainer.data import hub, parent_watchdog, readers
from trainer.data.records import Record

_MAGIC = b"MMIDIDX\x00\x00"  # an index of Megatron's begins so
_PIECE = 2**20  # bytes of documents that a process gets at a time: small against memory, large against the cost of sending


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was made."""

    prefix: str
    documents: int
    empty: int
    """Documents without a token, left out."""

    tokens: int
    dtype: str
    input_bytes: int
    output_bytes: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The documents of a piece, one after the other."""

    numbers: np.ndarray
    lengths: list[int]
    empty: int
    size: int


def prepare(
    inputs: Sequence[Path | str],
    prefix: Path,
    *,
    tokenizer: str,
    key: str = "text",
    workers: int = 1,
    append_eod: bool = True,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Summary:
    """Tokenize all documents of `inputs` into `prefix`.bin and `prefix`.idx, in order.

    The bytes do not depend on `workers`. Raises UserError, and leaves nothing, if an input is unreadable or the output exists.
    """
    from megatron.core.datasets.indexed_dataset import DType  # noqa: PLC0415 - brings torch

    reporter, started = reporter or Reporter(), time.monotonic()
    prefix = Path(expanded(prefix))
    before = _check_target(prefix, overwrite=overwrite)
    paths = readers.files([hub.local(expanded(one), None) for one in inputs])
    dtype = DType.optimal_dtype(tokenizers.load(tokenizer).vocab_size)
    reporter.start(sum(map(readers.size, paths)))
    work = partial(_tokenize, key=key, append_eod=append_eod, dtype=np.dtype(dtype).name)
    totals = dict.fromkeys(("documents", "empty", "tokens"), 0)
    with _output(prefix, dtype, before) as builder, _processes(tokenizer, workers) as submit:
        for tokens in _in_order(submit, work, _pieces(readers.read(paths, key=key)), ahead=2 * workers):
            _write(builder, tokens, totals)
            reporter.progress(tokens.size)
    seconds = time.monotonic() - started
    return Summary(
        prefix=str(prefix),
        **totals,
        dtype=np.dtype(dtype).name,
        input_bytes=sum(map(readers.size, paths)),
        output_bytes=sum(path.stat().st_size for path in _pair(prefix)),
        seconds=seconds,
        tokens_per_second=totals["tokens"] / seconds,
    )


def _write(builder: Any, tokens: _Tokens, totals: dict[str, int]) -> None:
    start = 0
    for length in tokens.lengths:
        builder.add_document(tokens.numbers[start : start + length], [length])
        start += length
    totals["documents"] += len(tokens.lengths)
    totals["tokens"] += start
    totals["empty"] += tokens.empty


def _pieces(found: Iterable[Record]) -> Iterator[list[Record]]:
    piece, size = [], 0
    for raw in found:
        piece.append(raw)
        size += raw.size
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


# What runs in the worker processes. They import neither torch nor megatron-core.

_tokenizer: tokenizers.Tokenizer | None = None  # one per process: it cannot be sent


def _begin(name: str) -> None:
    global _tokenizer  # noqa: PLW0603
    _tokenizer = tokenizers.load(name)


def _begin_process(name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent_watchdog.end_with_parent()
    _begin(name)


def _tokenize(piece: list[Record], *, key: str, append_eod: bool, dtype: str) -> _Tokens:
    assert _tokenizer is not None
    parts, empty = [], 0
    for raw in piece:
        numbers = _tokenizer.encode(readers.text(raw, key=key))
        empty += not numbers
        if numbers:
            parts.append(np.array(numbers + [_tokenizer.eod] * append_eod, dtype=dtype))
    joined = np.concatenate(parts) if parts else np.empty(0, dtype)
    return _Tokens(joined, [len(part) for part in parts], empty, sum(raw.size for raw in piece))


type _Submit = Callable[..., Future[_Tokens]]


@contextmanager
def _processes(tokenizer: str, workers: int) -> Generator[_Submit]:
    """A function that starts work: in `workers` processes, or here and now if it is one."""
    if workers == 1:
        _begin(tokenizer)
        yield _now
        return
    # Not `fork`: this process has torch's threads. A pool starts its processes as work comes in.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process, initargs=(tokenizer,))
    try:
        yield pool.submit
    except BrokenProcessPool:
        raise TransientError(
            "a worker process ended unexpectedly", hint="if memory ran out, use fewer `--workers`; the kernel's log tells"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _now(work: Callable[..., _Tokens], piece: list[Record]) -> Future[_Tokens]:
    done: Future[_Tokens] = Future()
    done.set_result(work(piece))
    return done


def _in_order(submit: _Submit, work: Callable[..., _Tokens], pieces: Iterable[list[Record]], *, ahead: int) -> Iterator[_Tokens]:
    """Results in the order of the pieces. No more than `ahead` pieces are read before they are needed."""
    waiting: deque[Future[_Tokens]] = deque()
    for piece in pieces:
        waiting.append(submit(work, piece))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _pair(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


type _Standing = list[tuple[int, int, int] | None]
"""What tells whether the files of a pair are what they were; None for one that is not there."""


def _standing(prefix: Path) -> _Standing:
    statuses = [path.stat() if path.exists() else None for path in _pair(prefix)]
    return [status and (status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses]


def _check_target(prefix: Path, *, overwrite: bool) -> _Standing:
    """What stands at a prefix. Raises UserError unless that is nothing, or Megatron's and may be replaced."""
    if prefix.suffix in (".bin", ".idx"):
        raise UserError(f"`{prefix}` is a file's name, not a prefix", hint=f"give `{prefix.with_suffix('')}`")
    there = [path for path in _pair(prefix) if path.exists()]
    if there and not overwrite:
        raise UserError(f"`{there[0]}` already exists", hint="choose another prefix, or replace it with `--overwrite`")
    if there and not _is_index(_pair(prefix)[1]):
        raise UserError(
            f"`{there[0]}` has no index of Megatron's in `{_pair(prefix)[1]}`, so `--overwrite` does not replace it",
            hint="choose another prefix, or remove it yourself",
        )
    return _standing(prefix)


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


@contextmanager
def _output(prefix: Path, dtype: Any, before: _Standing) -> Generator[Any]:
    """A builder whose files get their names when all went well. Until then there is nothing to read at `prefix`, or what was
    there `before`; TransientError if something else is there by then."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: PLC0415 - brings torch

    hidden = _pair(prefix.with_name(f"{prefix.name}.partial-{secrets.token_hex(4)}"))
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(hidden[0]), dtype)
        with contextlib.closing(builder.data_file):
            yield builder
        if not builder.sequence_lengths:
            raise UserError("the inputs hold no text at all", hint="nothing was written")
        builder.finalize(str(hidden[1]))
        if _standing(prefix) != before:
            raise TransientError(f"`{prefix}` appeared or changed while it was being made", hint="look at it, then run it again")
        _reveal(hidden, _pair(prefix))
    except OSError as error:
        raise UserError(f"cannot write `{prefix}`: {error.strerror}", hint="nothing readable was left there") from error
    finally:
        for path in hidden:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _reveal(hidden: tuple[Path, Path], named: tuple[Path, Path]) -> None:
    for path in hidden:
        sync(path)
    named[1].unlink(missing_ok=True)  # an old index must never stand beside new data
    for path, name in zip(hidden, named, strict=True):
        path.replace(name)
    sync(named[0].parent)
