"""Write everything of an output that is not tensor data, and at the end what makes the output readable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan
from formats import integrity
from formats.outputs import Outputs
from formats.spec import Document


def write_documents(conversion: Conversion, outputs: Outputs, files: Iterable[str], tensors: Mapping[str, str]) -> dict[str, str]:
    """Write the bytes around tensor data, copies, documents, `conversion.json` and metadata; return their sha256 by name.

    `files` are all of the output's; `tensors` are the hashes that `conversion.json` lists.
    """
    plan, hashes = conversion.plan, dict[str, str]()
    output = plan.output
    _write_frames(plan, outputs)
    for name, file in conversion.copies.items():
        path = output.inside(name)
        hashes[path] = _write(outputs, path, file.size, file.bands())
    documents = {output.inside(name): Document.of(data) for name, data in output.documents.items()}
    documents |= {output.record: plan.provenance.document(tensors, files), **plan.writer.documents}
    for name, document in documents.items():
        hashes[name] = _write(outputs, name, document.size, document.blocks())
    return hashes


def write_markers(plan: ConversionPlan, outputs: Outputs, files: Iterable[str], hashes: Mapping[str, str]) -> None:
    """Write `integrity.json` with the sha256 of every file, then the files by which a checkpoint is found."""
    output, markers = plan.output, dict[str, bytes]()
    if output.integrity:
        listed = {name.removeprefix(output.folder): hashes[name] for name in output.listed(files)}
        markers[output.inside(integrity.FILE)] = integrity.make(listed)
    for name, data in {**markers, **plan.writer.markers}.items():
        _write(outputs, name, len(data), [data])


def _write_frames(plan: ConversionPlan, outputs: Outputs) -> None:
    """Write what is around the data in each file that holds tensors."""
    for file in plan.writer.files:
        for span in plan.writer.spans(file):
            if span.known:
                outputs.put(file, span.start, span.known)


def _write(outputs: Outputs, name: str, size: int, blocks: Iterable[bytes | memoryview]) -> str:
    """Write a file from its first byte to its last; return its sha256."""
    digest, offset = hashlib.sha256(), 0
    outputs.begin(name, size)
    for block in blocks:
        digest.update(block)
        outputs.put(name, offset, block)
        offset += len(block)
    return digest.hexdigest()
