"""Weights that an offset moves come back to the bit, whatever rounding their dtype does, until training changes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import average_checkpoints, extend_vocab, families, hf_to_mcore, mcore_to_hf, reshard, verify
from converter.originals import original_name
from formats.errors import UserError
from tests.converter.family_suite import save_small
from tests.models import model_tree

NORM = "model.layers.{}.linear_attn.norm.weight"
LINEAR = (0, 2, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_small("qwen3_next", tmp_path_factory.mktemp("saved") / "hf")


def with_norms(saved, folder, make):
    """The model with other norms of delta nets, `make(layer)`."""
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors |= {NORM.format(layer): make(layer).clone() for layer in LINEAR}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_bits(layer):
    """24 numbers of bf16 of any size and sign: not-a-numbers, infinities and the smallest among them."""
    bits = np.random.default_rng(layer).integers(0, 2**16, 24, np.uint16)
    bits[:8] = (0x0001, 0x8001, 0x8000, 0x0000, 0x7F80, 0xFF80, 0x7FC1, 0x0080)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}], ids=["one rank", "more ranks"])
def test_any_bits_of_a_norm_come_back(saved, tmp_path, layout):
    folder = with_norms(saved, tmp_path / "hf", random_bits)
    hf_to_mcore(folder, tmp_path / "m", verify=True, **layout)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)
    assert verify(folder, tmp_path / "m").same


MOVED = [name for name in families.names() if any(rule.offset for rule in families.find(name).RULES)]


@pytest.mark.parametrize("family", MOVED)
def test_another_layout_keeps_them(tmp_path, family):
    folder = save_small(family, tmp_path / "hf", dtype="float32")
    hf_to_mcore(folder, tmp_path / "m", tp=2)
    reshard(tmp_path / "m", tmp_path / "pp", pp=2, verify=True)
    mcore_to_hf(tmp_path / "pp", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_an_average_and_another_vocabulary_keep_them(saved, tmp_path):
    hf_to_mcore(saved, tmp_path / "m")
    average_checkpoints([tmp_path / "m", tmp_path / "m"], tmp_path / "average")
    extend_vocab(tmp_path / "m", tmp_path / "extended", to=400)
    before = load_file(saved / "model.safetensors")
    for name in ("average", "extended"):
        mcore_to_hf(tmp_path / name, tmp_path / f"{name}-back")
        after = load_file(tmp_path / f"{name}-back" / "model.safetensors")
        assert all(after[NORM.format(layer)].equal(before[NORM.format(layer)]) for layer in LINEAR)


def test_a_cast_takes_the_original_numbers(saved, tmp_path):
    tiny = torch.full((24,), 1e-3, dtype=torch.bfloat16)
    hf_to_mcore(with_norms(saved, tmp_path / "hf", lambda _: tiny), tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back", dtype="fp32")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[NORM.format(0)], tiny.float())


def test_numbers_that_were_trained_are_computed_and_the_others_are_the_original_ones(saved, tmp_path):
    """Each number by itself: 0.3 is stored as -0.69921875 in bf16, which says 0.30078125."""
    before = torch.full((24,), 0.3, dtype=torch.bfloat16)
    hf_to_mcore(with_norms(saved, tmp_path / "hf", lambda _: before), tmp_path / "m")
    extras = tmp_path / "m" / "iter_0000000" / "huggingface" / "extras.safetensors"
    travelled = load_file(extras)
    assert {*travelled} == {original_name(NORM.format(layer)) for layer in LINEAR}
    other = before.clone()
    other[5:] = 0.5
    save_file({name: other.clone() for name in travelled}, extras)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    exported = load_file(tmp_path / "back" / "model.safetensors")[NORM.format(0)]
    assert torch.equal(exported[:5], before[:5])
    assert (exported[5:] == 0.30078125).all()


def test_what_travelled_of_another_shape_is_refused(saved, tmp_path):
    hf_to_mcore(saved, tmp_path / "m")
    extras = tmp_path / "m" / "iter_0000000" / "huggingface" / "extras.safetensors"
    save_file({name: tensor[:8].clone() for name, tensor in load_file(extras).items()}, extras)
    with pytest.raises(UserError, match=r"as_stored` has the shape \[8\], and .* \[24\]"):
        mcore_to_hf(tmp_path / "m", tmp_path / "back")
