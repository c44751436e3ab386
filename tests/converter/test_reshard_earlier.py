"""Optimizer state of megatron-core 0.8.0, which 0.16 and later refuse, goes on alike from each of the ways it was stored in.

Four checkpoints of one state, read by four readers. Megatron-LM on the current megatron-core takes five steps from each reshard.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from converter import reshard
from formats.detect import open_megatron
from formats.folder import LocalFolder
from tests import megatron_lm
from tests.converter.test_reshard_kinds import SMALL
from tests.golden.kinds import unpacked
from tests.megatron_cpu import Shape

TWINS = ("zarr_distributed_optimizer", *(f"zarr_distributed_optimizer_{how}" for how in ("flattened", "buckets", "gathered")))
MIN_LR = 0.001
RUN = {"iteration": 2, "global_batch_size": 2, "consumed_train_samples": 4, "normalization": "RMSNorm"}
"""What is so in these checkpoints: two steps of two samples each. Their `args` say LayerNorm of norms without biases."""


def complete(source: Path, settings: dict[str, Any]) -> None:
    """Say what Megatron-LM says and megatron-core alone did not: all of its settings, and the lowest rate of the groups."""
    (iteration,) = source.glob("iter_*")
    common = torch.load(iteration / "common.pt", weights_only=False)
    vars(common["args"]).update({**settings, **vars(common["args"]), **RUN})
    torch.save(with_lowest_rate(common), iteration / "common.pt")
    if (iteration / ".metadata").exists():
        _complete_objects(iteration)


def _complete_objects(iteration: Path) -> None:
    container = open_megatron(LocalFolder(iteration)).container
    index = pickle.loads((iteration / ".metadata").read_bytes())
    for number, name in enumerate(name for name in sorted(container.object_names) if ".optimizer/" in name):
        held = torch.load(io.BytesIO(container.archive(name).data()), weights_only=False)
        file = iteration / f"__{90 + number}_0.distcp"
        torch.save(with_lowest_rate(held), file)
        index.storage_data[MetadataIndex(name)] = _StorageInfo(file.name, 0, file.stat().st_size)
    (iteration / ".metadata").write_bytes(pickle.dumps(index))


def with_lowest_rate(value: Any) -> Any:
    """A state in which `min_lr` is no longer None."""
    match value:
        case {"min_lr": None, **fields}:
            return {**fields, "min_lr": MIN_LR}
        case dict():
            return {name: with_lowest_rate(each) for name, each in value.items()}
        case list():
            return [with_lowest_rate(each) for each in value]
        case _:
            return value


@pytest.fixture
def resharded(tmp_path):
    """Reshard each of the twins to a layout; return the roots."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(SMALL))

    def make(**layout):
        other = next(unpacked("ranks_tp2_pp2", tmp_path).glob("*/mp_rank_00_000")) / "model_optim_rng.pt"
        settings = vars(torch.load(other, weights_only=False)["args"])  # of a run of Megatron-LM with a model of this shape
        for name in TWINS:
            complete(source := unpacked(name, tmp_path), settings)
            reshard(source, tmp_path / "made" / name, hf_config=tmp_path / "config", **layout)
        return [tmp_path / "made" / name for name in TWINS]

    return make


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_the_next_steps_are_those_from_every_twin(ranks, resharded, layout):
    shape, roots = Shape(SMALL, vocab_multiple=16, **layout), resharded(**layout)
    first, *others = (ranks.run(megatron_lm.resumed, 2, shape, str(root)) for root in roots)
    for other in others:
        for (actual, steps), (reference, expected) in zip(first, other, strict=True):
            assert steps == expected
            assert (actual.iteration, actual.scheduler, actual.groups) == (
                reference.iteration,
                reference.scheduler,
                reference.groups,
            )
            for name, values in actual.tensors.items():
                assert all(map(torch.equal, values, reference.tensors[name])), name
    for state, steps in first:
        assert state.iteration == 2
        assert len(set(steps)) == megatron_lm.STEPS
        assert all(any(value.any() for value in values) for values in state.tensors.values())
