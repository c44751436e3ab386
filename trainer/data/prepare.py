"""Tokenize documents into the `.bin` and `.idx` files of Megatron-LM, written by megatron-core.

The output does not depend on the number of worker processes, and appears under its name when it is complete. Memory grows with
the number of workers and the longest document, and by about 100 bytes per document in megatron-core's writer.
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

_MAGIC = b"MMIDIDX\x00\x00"  # the first bytes of an `.idx`
_BATCH_BYTES = 2**20  # bytes of documents per task: small against memory, large against the cost of pickling


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of a finished run."""

    prefix: str
    documents: int
    empty: int
    """Documents without a token; these are left out."""

    tokens: int
    dtype: str
    input_bytes: int
    output_bytes: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a batch of documents, concatenated."""

    numbers: np.ndarray
    lengths: list[int]
    empty: int
    size: int
    """Bytes read."""


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
    """Tokenize all documents of `inputs` into `prefix`.bin and `prefix`.idx, in order, and return the figures.

    The bytes do not depend on `workers`. Raises UserError, and leaves no files, if an input is unreadable or the output exists.
    """
    from megatron.core.datasets.indexed_dataset import DType  # noqa: PLC0415 - brings torch

    reporter, started = reporter or Reporter(), time.monotonic()
    prefix = Path(expanded(prefix))
    before = _check_target(prefix, overwrite=overwrite)
    paths = readers.list_inputs([hub.local_path(expanded(source), None) for source in inputs])
    dtype = DType.optimal_dtype(tokenizers.load(tokenizer).vocab_size)
    reporter.start(sum(map(readers.input_size, paths)))
    work = partial(_tokenize, key=key, append_eod=append_eod, dtype=np.dtype(dtype).name)
    totals = dict.fromkeys(("documents", "empty", "tokens"), 0)
    with _output(prefix, dtype, before) as builder, _worker_pool(tokenizer, workers) as submit:
        for tokens in _in_order(submit, work, _batches(readers.read_documents(paths, key=key)), ahead=2 * workers):
            _write(builder, tokens, totals)
            reporter.progress(tokens.size)
    seconds = time.monotonic() - started
    return Summary(
        prefix=str(prefix),
        **totals,
        dtype=np.dtype(dtype).name,
        input_bytes=sum(map(readers.input_size, paths)),
        output_bytes=sum(path.stat().st_size for path in _bin_and_idx(prefix)),
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


def _batches(documents: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# The functions of the worker processes, which import neither torch nor megatron-core.

_tokenizer: tokenizers.Tokenizer | None = None  # one per process: it cannot be pickled


def _load_tokenizer(name: str) -> None:
    global _tokenizer  # noqa: PLW0603
    _tokenizer = tokenizers.load(name)


def _init_worker(name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent_watchdog.end_with_parent()
    _load_tokenizer(name)


def _tokenize(batch: list[Record], *, key: str, append_eod: bool, dtype: str) -> _Tokens:
    assert _tokenizer is not None
    parts, empty = [], 0
    for document in batch:
        numbers = _tokenizer.encode(readers.document_text(document, key=key))
        empty += not numbers
        if numbers:
            parts.append(np.array(numbers + [_tokenizer.eod] * append_eod, dtype=dtype))
    joined = np.concatenate(parts) if parts else np.empty(0, dtype)
    return _Tokens(joined, [len(part) for part in parts], empty, sum(document.size for document in batch))


type _Submit = Callable[..., Future[_Tokens]]


@contextmanager
def _worker_pool(tokenizer: str, workers: int) -> Generator[_Submit]:
    """Yield a function that submits work to `workers` processes, or runs it in this process if `workers` is 1."""
    if workers == 1:
        _load_tokenizer(tokenizer)
        yield _run_inline
        return
    # Not `fork`: torch's threads may hold locks. A pool starts its processes as work is submitted.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(tokenizer,))
    try:
        yield pool.submit
    except BrokenProcessPool:
        raise TransientError(
            "a worker process ended unexpectedly", hint="if memory ran out (see the kernel's log), use fewer `--workers`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _run_inline(work: Callable[..., _Tokens], batch: list[Record]) -> Future[_Tokens]:
    future: Future[_Tokens] = Future()
    future.set_result(work(batch))
    return future


def _in_order(submit: _Submit, work: Callable[..., _Tokens], batches: Iterable[list[Record]], *, ahead: int) -> Iterator[_Tokens]:
    """Yield results in the order of the batches; at most `ahead` batches are submitted and not yet yielded."""
    pending: deque[Future[_Tokens]] = deque()
    for batch in batches:
        pending.append(submit(work, batch))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _bin_and_idx(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


type _FileStats = list[tuple[int, int, int] | None]
"""The inode, size and modification time of each file of a pair, to see whether it changed; None for a missing file."""


def _file_stats(prefix: Path) -> _FileStats:
    statuses = [path.stat() if path.exists() else None for path in _bin_and_idx(prefix)]
    return [status and (status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses]


def _check_target(prefix: Path, *, overwrite: bool) -> _FileStats:
    """Return the stats of existing files at a prefix. Raises UserError if there are any, unless they are Megatron's and
    `overwrite`."""
    if prefix.suffix in (".bin", ".idx"):
        raise UserError(f"`{prefix}` is a file name, not a prefix", hint=f"give `{prefix.with_suffix('')}`")
    existing = [path for path in _bin_and_idx(prefix) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"`{existing[0]}` already exists", hint="choose another prefix, or replace it with `--overwrite`")
    if existing and not _is_index(_bin_and_idx(prefix)[1]):
        raise UserError(
            f"`{_bin_and_idx(prefix)[1]}` is not a Megatron index, so `--overwrite` does not replace `{existing[0]}`",
            hint="choose another prefix, or remove it yourself",
        )
    return _file_stats(prefix)


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


@contextmanager
def _output(prefix: Path, dtype: Any, before: _FileStats) -> Generator[Any]:
    """Yield a builder that writes temporary files; rename them to `prefix` at the end. Raises TransientError if the files at
    `prefix` are no longer those of `before`."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: PLC0415 - brings torch

    hidden = _bin_and_idx(prefix.with_name(f"{prefix.name}.partial-{secrets.token_hex(4)}"))
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(hidden[0]), dtype)
        with contextlib.closing(builder.data_file):
            yield builder
        if not builder.sequence_lengths:
            raise UserError("the inputs have no text", hint="nothing was written")
        builder.finalize(str(hidden[1]))
        if _file_stats(prefix) != before:
            raise TransientError(
                f"`{prefix}` appeared or changed while it was being written",
                hint="check which program wrote it, then run this again",
            )
        _publish(hidden, _bin_and_idx(prefix))
    except OSError as error:
        raise UserError(f"cannot write `{prefix}`: {error.strerror}", hint="no partial output was left") from error
    finally:
        for path in hidden:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _publish(hidden: tuple[Path, Path], named: tuple[Path, Path]) -> None:
    for path in hidden:
        sync(path)
    named[1].unlink(missing_ok=True)  # an old index must never be beside new data
    for path, name in zip(hidden, named, strict=True):
        path.replace(name)
    sync(named[0].parent)
