"""Megatron-LM resumes from a reshard of its own checkpoints: weights, optimizer, schedule and progress are its twin's."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from converter import Reporter, reshard
from tests import megatron_lm
from tests.converter.test_reshard_kinds import MODELS, SMALL
from tests.golden.kinds import unpacked
from tests.megatron_cpu import Shape

CASES = {
    "ranks, data parallel": ("ranks_tp2_pp2", {}),
    "ranks, virtual stages": ("ranks_pp2_vpp2", {"pp": 2, "vpp": 2}),
    "buckets, tensor parallel": ("ranks_tp2_pp2_buckets", {"tp": 2}),
    "buckets, pipeline": ("ranks_tp2_pp2_buckets", {"pp": 2}),
}


def described(config, folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(ranks, shape, *roots):
    """Do two ranks of Megatron-LM go on from each checkpoint alike?"""
    made, twin = (ranks.run(megatron_lm.resumed, 2, shape, str(root)) for root in roots)
    for (actual, steps), (reference, expected) in zip(made, twin, strict=True):
        assert (actual.iteration, actual.consumed_samples, actual.operations) == (3, 12, 12345)
        assert (actual.scheduler["num_steps"], actual.scheduler) == (actual.consumed_samples, reference.scheduler)
        assert actual.groups == reference.groups
        for name, values in actual.tensors.items():
            assert len(values) == len(reference.tensors[name])
            assert all(map(torch.equal, values, reference.tensors[name])), name
            assert any(value.any() for value in values)
        assert steps == expected


@pytest.mark.parametrize("case", CASES)
def test_megatron_lm_goes_on_from_a_reshard_as_from_its_twin(ranks, tmp_path, case):
    name, layout = CASES[case]
    twin = name.removesuffix("_buckets")
    config = MODELS.get(twin, SMALL)
    reshard(unpacked(name, tmp_path), tmp_path / "made", hf_config=described(config, tmp_path / "config"), **layout)
    shape = Shape(config, vocab_multiple=16, **layout)
    same(ranks, shape, tmp_path / "made", unpacked(f"{twin}_as_torch_dist", tmp_path))


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2, "etp": 1}], ids=str)
def test_experts_have_an_optimizer_of_their_own_where_they_are_divided_otherwise(ranks, tmp_path, layout):
    """Megatron-LM itself takes its own checkpoint at no other number of optimizers."""
    config, made = MODELS["ranks_ep2"], []
    folder = described(config, tmp_path / "config")
    for name in ("ranks_ep2", "ranks_ep2_as_torch_dist"):
        reshard(unpacked(name, tmp_path), tmp_path / "together" / name, hf_config=folder)
        made.append(tmp_path / "made" / name)
        reshard(tmp_path / "together" / name, made[-1], **layout)
    same(ranks, Shape(config, vocab_multiple=16, **layout), *made)


def generators(seed):
    """Generators of random numbers as a rank has them: of Python, numpy, torch, and for tensor-parallel ranks."""
    return (
        random.Random(seed),
        np.random.RandomState(seed),
        torch.Generator().manual_seed(seed),
        torch.Generator().manual_seed(-seed),
    )


def test_random_numbers_of_files_of_ranks_go_on_where_the_layout_is_the_same(ranks, tmp_path):
    root, expected = unpacked("ranks_tp2_pp2", tmp_path), []
    for seed, file in enumerate(sorted(root.glob("*/mp_rank_*/model_optim_rng.pt")), 1):
        python, numpy, cpu, tracked = generators(seed)
        states = {
            "random_rng_state": python.getstate(), "np_rng_state": numpy.get_state(), "torch_rng_state": cpu.get_state(),
            "cuda_rng_state": cpu.get_state(), "rng_tracker_states": {"model-parallel-rng": tracked.get_state()},
        }  # fmt: skip
        torch.save({**torch.load(file, weights_only=False), "rng_state": [states]}, file)
        drawn = (torch.rand((), generator=generator).item() for generator in (cpu, tracked))
        expected.append([python.random(), numpy.rand(), *drawn])
    config, notes = described(SMALL, tmp_path / "config"), []
    reshard(root, tmp_path / "made", hf_config=config, tp=2, pp=2, reporter=Reporter(note=notes.append))
    assert not any("random numbers" in note for note in notes)
    made = ranks.run(megatron_lm.resumed, 4, Shape(SMALL, tp=2, pp=2, vocab_multiple=16), str(tmp_path / "made"))
    in_order = (
        expected[0],
        expected[2],
        expected[1],
        expected[3],
    )  # files count pipeline ranks fastest, ranks tensor-parallel ones
    assert [state.random_numbers for state, _ in made] == list(in_order)
