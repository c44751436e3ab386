"""Verify directories that exist: compare two checkpoints, or check one against its hashes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from blake3 import blake3

from converter import masters, provenance
from converter.comparison import CheckpointView, Comparison, compare
from converter.execution import Reporter
from converter.keywords import other_names
from converter.plan import TensorPlan, pieces
from converter.run import PIECE_BYTES, PieceBuffers, in_threads
from converter.sources import check_unchanged, open_source, workers_for
from converter.values import CHOICES
from converter.views import huggingface_view, open_views
from converter.workers import check_workers
from formats import integrity
from formats.arrays import as_bytes
from formats.detect import detect, open_huggingface, open_megatron
from formats.disk import user_errors
from formats.errors import UserError
from formats.folder import Folder
from formats.integrity import Check
from formats.iterations import find_iteration
from formats.json_objects import read_json
from formats.spec import Reader


@other_names(cast="cast_to")
@user_errors()
def verify_checkpoints(
    one: str | Path,
    other: str | Path,
    *,
    cast_to: str | None = None,
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Compare two checkpoints tensor by tensor, bit for bit, in any two formats and layouts.

    `cast_to` (bf16, fp16 or fp32) casts both before comparing. Raises UserError if one is damaged or not a checkpoint.

    >>> verify_checkpoints("Llama-3.2-1B", "megatron").same
    True
    """
    check_workers(workers)
    reporter, folders = reporter or Reporter(), [open_source(one), open_source(other)]
    workers = workers_for(workers, folders)
    if cast_to is not None and cast_to not in CHOICES[1:]:
        raise UserError(f"dtype `{cast_to}` is not one of {', '.join(CHOICES[1:])}")
    sides = open_views(*folders)
    with closing(sides[0].reader), closing(sides[1].reader):
        reporter.start(_compared_bytes(*sides))
        comparison = compare(*sides, cast=cast_to, workers=workers, progress=reporter.progress)
        check_unchanged(folders)
        return comparison


def _compared_bytes(one: CheckpointView, other: CheckpointView) -> int:
    return sum(tensor_plan.spec.nbytes for name, tensor_plan in one.tensor_plans.items() if name in other.tensor_plans)


@user_errors()
def check_checkpoint(path: str | Path, *, workers: int | None = None, reporter: Reporter | None = None) -> Check:
    """Compare a checkpoint with the hashes stored in it.

    In a Megatron iteration: every file with `integrity.json`, and every weight with the fp32 master in the optimizer state. In
    a Hugging Face directory: every tensor with `conversion.json`. Raises UserError if there is nothing to compare with.

    >>> check_checkpoint("megatron").whole
    True
    """
    check_workers(workers)
    reporter, folder = reporter or Reporter(), open_source(path)
    workers = workers_for(workers, [folder])
    with closing(folder):
        if detect(folder).is_megatron:
            result = _check_iteration(find_iteration(folder), workers, reporter)
        else:
            result = _check_tensors(folder, workers, reporter)
        check_unchanged([folder])
        return result


def _check_iteration(iteration: Folder, workers: int, reporter: Reporter) -> Check:
    """Check the files, and if none is damaged the masters."""
    hashed = iteration.has(integrity.FILE)
    result = _check_files(iteration, workers, reporter) if hashed else Check("files", 0, "the files", [], [], [])
    check_unchanged([iteration])
    if result.whole:
        result = masters.check(open_megatron(iteration), result, workers=workers, reporter=reporter)
    if not (hashed or result.masters):
        reason = f"; not compared with fp32 masters: {result.without_masters[0]}" if result.without_masters else ""
        raise UserError(
            f"`{iteration.label}` has no `{integrity.FILE}`: there are no hashes to check it against{reason}",
            hint="`mbconvert verify A B` compares it with another checkpoint of the same weights",
        )
    return result


def _check_files(iteration: Folder, workers: int, reporter: Reporter) -> Check:
    listed = integrity.read(iteration)
    reporter.start(sum(iteration.size(name) for name in listed if iteration.has(name)))
    return integrity.check(iteration, listed, workers=workers, progress=reporter.progress)


def _check_tensors(folder: Folder, workers: int, reporter: Reporter) -> Check:
    listed = _recorded(folder)
    view = huggingface_view(open_huggingface(folder, any_dtype=True))
    tensor_plans, reader = view.tensor_plans, view.reader
    reporter.start(sum(tensor_plan.spec.nbytes for tensor_plan in tensor_plans.values()))
    hashes: dict[str, str] = {}

    def start() -> Callable[[TensorPlan], None]:
        buffers = PieceBuffers()

        def hash_tensor(tensor_plan: TensorPlan) -> None:
            hashes[tensor_plan.spec.name] = _hash(tensor_plan, buffers, reader, reporter)

        return hash_tensor

    in_threads(tensor_plans.values(), start, workers=workers)
    changed = sorted(name for name, digest in hashes.items() if listed.get(name, digest) != digest)
    missing, unlisted = sorted(listed.keys() - hashes.keys()), sorted(hashes.keys() - listed.keys())
    return Check("tensors", len(hashes), "config.json and other side files", changed, missing, unlisted)


def _hash(tensor_plan: TensorPlan, buffers: PieceBuffers, reader: Reader, reporter: Reporter) -> str:
    digest = blake3()
    for piece in pieces([tensor_plan], limit=PIECE_BYTES):
        digest.update(as_bytes(buffers.make(piece, reader)))
        reporter.progress(piece.nbytes)
    return digest.hexdigest()


def _recorded(folder: Folder) -> dict[str, str]:
    """Return the hashes of tensors that `conversion.json` lists. Raises UserError if it lists none."""
    if not folder.has(provenance.FILE):
        raise UserError(
            f"`{folder.label}` has no `{provenance.FILE}`: there are no hashes to check it against",
            hint="`mbconvert verify A B` compares it with another copy of the same weights",
        )
    document = read_json(folder, provenance.FILE)
    hashes: Any = document.get("blake3")
    if hashes is None and "blake3" in document:
        raise UserError(
            f"`{provenance.FILE}` lists no hashes of tensors: it was written with `--no-integrity`",
            hint="`mbconvert verify SRC DST` compares it with what it was made from",
        )
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in cast("dict[str, Any]", hashes).values()):
        raise UserError(f"`{provenance.FILE}` lists no hashes of tensors", hint="it was not written by mbconvert, or is damaged")
    return cast("dict[str, str]", hashes)
