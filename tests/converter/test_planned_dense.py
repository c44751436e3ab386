"""Dense models of very many tensors are planned within bounds: imported, exported, resharded, and their index read alone."""

from __future__ import annotations

import pytest

from benchmarks.convert import make_model
from benchmarks.plan import SHARD_BYTES, TARGETS, layout, many, run

pytestmark = pytest.mark.slow

TENSORS = 45_000


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of a model in both formats."""
    folder, shape = tmp_path_factory.mktemp("dense"), many(TENSORS)
    make_model(folder / "hf", shape, data=False, shard_bytes=SHARD_BYTES)
    options = layout(shape) | {"integrity": False}
    run(what="import", source=str(folder / "hf"), target=str(folder / "mcore"), options=options)
    return folder


@pytest.mark.parametrize(
    ("command", "source", "options"),
    [
        ("import", "hf", layout(many(TENSORS)) | {"dry_run": True}),
        ("export", "mcore", {"dry_run": True}),
        ("reshard", "mcore", layout(many(TENSORS)) | {"tp": 1, "dry_run": True}),
        ("index", "mcore/iter_0000000", {}),
    ],
    ids=["import", "export", "reshard", "index"],
)
def test_it_is_planned_in_little_memory(models, tmp_path, command, source, options):
    figures = run(what=command, source=str(models / source), target=str(tmp_path / "nothing"), options=options)
    assert 0 < figures["peak"] <= TARGETS[TENSORS][1] << 20


def test_so_are_200_000_tensors(tmp_path):
    shape = many(200_000)
    make_model(tmp_path / "hf", shape, data=False, shard_bytes=SHARD_BYTES)
    options = layout(shape) | {"dry_run": True}
    figures = run(what="import", source=str(tmp_path / "hf"), target=str(tmp_path / "nothing"), options=options)
    assert 0 < figures["peak"] <= TARGETS[200_000][1] << 20
