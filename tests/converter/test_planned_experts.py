"""A model of 198,915 tensors, nearly all of experts, is planned within bounds: imported, exported and resharded.

Its files are holes, but for headers and what planning reads: the index, the common state and side files.
"""

from __future__ import annotations

import pytest

from benchmarks.headers import SMALL_EXPERTS, make_headers
from benchmarks.plan import SHARD_BYTES, TARGETS, run
from converter import Reporter
from converter.importing import ImportOptions, plan_import
from converter.sources import huggingface_source
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.spec import Document

pytestmark = pytest.mark.slow

TENSORS = 198_915
MEMORY = TARGETS[200_000][1] << 20
"""Bytes, a bound of `benchmarks.plan`."""

SIZES = {"tp": 2, "pp": 8, "etp": 1, "make_vocab_size_divisible_by": 1}
"""Of every layout here; expert-parallel sizes differ."""

COMMON = "__0_0.distcp"
"""The file of the first rank, which has the common state."""


def write_holes(folder, conversion):
    """Write the output of a conversion without the data of its tensors, and what is around that in one file alone."""
    output, writer = conversion.plan.output, conversion.plan.writer
    documents = {output.inside(name): Document.of(data) for name, data in output.documents.items()} | writer.documents
    contents = {name: document.blocks() for name, document in documents.items()}
    contents |= {output.inside(name): file.bands() for name, file in conversion.copies.items()}
    contents |= {name: [data] for name, data in writer.markers.items()}
    for name, blocks in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(blocks))
    for name, size in writer.files.items():
        with (folder / name).open("wb") as file:
            for span in writer.spans(name) if name.endswith(COMMON) else ():
                file.seek(span.start)
                file.write(span.known or b"")
            file.truncate(size)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of the model in both formats, with the command that reads each and its options."""
    folder = tmp_path_factory.mktemp("experts")
    huggingface, megatron = folder / "hf", folder / "megatron"
    assert make_headers(huggingface, SMALL_EXPERTS, shard_bytes=SHARD_BYTES) == TENSORS
    wanted = ImportOptions(**SIZES, ep=8, vpp=1, pp_layout=None, dtype="keep", integrity=False)
    write_holes(megatron, plan_import(huggingface_source(HuggingFaceReader(LocalFolder(huggingface))), wanted, Reporter()))
    return {"import": (huggingface, SIZES | {"ep": 8}), "export": (megatron, {}), "reshard": (megatron, SIZES | {"ep": 4})}


@pytest.mark.parametrize("command", ["import", "export", "reshard"])
def test_it_is_planned_in_little_memory(models, tmp_path, command):
    source, options = models[command]
    figures = run(what=command, source=str(source), target=str(tmp_path / "nothing"), options=options | {"dry_run": True})
    assert 0 < figures["peak"] <= MEMORY
    assert not list(tmp_path.iterdir())
