"""Megatron-LM itself loads files of ranks, strictly, and holds what `torch_dist` of the same model has."""

from __future__ import annotations

import argparse
import contextlib
import io
import json

import numpy as np
import pytest
import torch

from converter import hf_to_mcore, inspect_checkpoint, mcore_to_hf
from formats.detect import Format, detect
from formats.errors import UserError
from formats.folder import LocalFolder
from tests import megatron_cpu
from tests.converter import family_suite
from tests.converter.test_te_keys import MADE, save_zeros
from tests.megatron_cpu import Shape
from tests.megatron_lm import Arguments

RUNS = [
    pytest.param("llama", {"tie_word_embeddings": True}, {"tp": 2, "pp": 2}, id="tied_tp2_pp2"),
    pytest.param("llama", {}, {"pp": 2, "vpp": 2}, id="vpp2"),
    pytest.param("mixtral", {}, {"ep": 2}, id="ep2", marks=pytest.mark.slow),
]


def loaded_by_megatron_lm(rank, shape, root, arguments, twin):
    """Load files of ranks as Megatron-LM does, and a twin as megatron-core does; answer which weights differ."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training import checkpointing, global_vars

    init_num_microbatches_calculator(rank, None, 1, 1, 1, False)
    chunks = megatron_cpu.build(shape)
    world = {"ckpt_format": "torch", "load": root, "use_dist_ckpt": False, "finetune": False}
    global_vars.set_args(Arguments(**{**arguments, **world}))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        checkpointing.load_checkpoint(chunks, None, None, strict=True)
    values = [{name: value.clone() for name, value in chunk.named_parameters()} for chunk in chunks]
    megatron_cpu.load_strictly(chunks, twin)
    differ = [
        name
        for chunk, held in zip(chunks, values, strict=True)
        for name, value in chunk.named_parameters()
        if not torch.equal(value, held[name])
    ]
    return "load_return" in output.getvalue(), differ, sum(map(len, values))


@pytest.mark.parametrize(("family", "changes", "layout"), RUNS)
def test_megatron_lm_loads_them_strictly_and_holds_what_its_twin_does(ranks, tmp_path, family, changes, layout):
    source = family_suite.save_small(family, tmp_path / "hf", **changes)
    for name in ("torch", "torch_dist"):
        hf_to_mcore(source, tmp_path / name, ckpt_format=name, transformer_impl="local", **layout)
    first = next((tmp_path / "torch" / "release").glob("mp_rank_*"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        arguments = vars(torch.load(first / "model_optim_rng.pt")["args"])
    shape = Shape(json.loads((source / "config.json").read_text()), **layout)
    world = shape.tp * shape.pp * shape.ep
    answers = ranks.run(
        loaded_by_megatron_lm, world, shape, str(tmp_path / "torch"), arguments, str(tmp_path / "torch_dist" / "iter_0000000")
    )
    for fell_back, differ, count in answers:
        assert (fell_back, differ) == (False, [])
        assert count > 8


@pytest.mark.parametrize(("family", "layout"), [
    ("llama", {"tp": 2, "pp": 2, "pp_layout": [3, 1]}),
    ("mixtral", {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "transformer_impl": "local"}),
    ("gpt2", {"tp": 2, "pp": 2, "transformer_impl": "local"}),
    pytest.param("deepseek_v3", {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
    pytest.param("gemma3_text", {"pp": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_way_there_and_back_gives_the_same_bytes(tmp_path, family, layout):
    source = family_suite.save_small(family, tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "m", ckpt_format="torch", verify=True, **layout)
    assert detect(LocalFolder(tmp_path / "m")) is Format.RANK_FILES
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release"
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    report = inspect_checkpoint(tmp_path / "m")
    assert (report.format, report.layout["tp"], report.optimizer_state) == ("Megatron mp_rank files", layout.get("tp", 1), False)


def test_hashes_and_workers(tmp_path):
    """Files do not depend on the number of threads, and `integrity.json` has the hashes of what is there."""
    from converter import check_checkpoint

    source = family_suite.save_small("mixtral", tmp_path / "hf")
    for workers in (1, 4):
        hf_to_mcore(source, tmp_path / f"{workers}", ckpt_format="torch", tp=2, ep=2, workers=workers)
    one_thread, four_threads = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("1", "4")
    )
    assert one_thread == four_threads
    assert check_checkpoint(tmp_path / "1").whole
    hf_to_mcore(source, tmp_path / "1", ckpt_format="torch", tp=2, overwrite=True)
    assert len(list((tmp_path / "1" / "release").glob("mp_rank_*"))) == 2


REFUSED = {
    "qwen3_next": ({}, "files of ranks cannot hold `decoder.layers.0.self_attention.in_proj.weight.query`"),
    "nemotron_h": ({}, "files of ranks are of layout gpt, and this is layout hybrid"),
    "mixtral": ({"tp": 2, "etp": 1}, "files of ranks have experts divided as all else is: `--etp` is 1 and `--tp` 2"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_they_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path, family):
    layout, message = REFUSED[family]
    source = family_suite.save_small(family, tmp_path / "hf")
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "m", ckpt_format="torch", **layout)
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


ONLY_IN_STATE_DICTS = ("core_attention._extra_state", "output_layer._extra_state")
"""What megatron-core leaves out of `torch_dist`, so that the golden keys do not have it."""


def of_layers(key, rows):
    """The name in a state dict of one part of a key; `rows` are its layer, unless the key has its number, and its expert."""
    rows, (_, layers, rest) = list(rows), key.partition(".layers.")
    name = key.replace(layers, f"{layers}{rows.pop(0)}.") if layers and not rest[0].isdecimal() else key
    single = name.replace(".experts.experts.", ".experts.")
    return f"{single}{rows.pop(0)}" if single != name and single.endswith(("weight", "bias")) else single


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "deepseek_v3", "gemma3_text"])
def test_names_are_those_of_transformer_engine_s_layers(tmp_path, family):
    asked = MADE[family]
    hf_to_mcore(save_zeros(asked["config"], tmp_path / "hf"), tmp_path / "m", ckpt_format="torch", integrity=False)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model = torch.load(tmp_path / "m" / "release" / "mp_rank_00" / "model_optim_rng.pt")["model"]
    expected = set()
    for key, (shape, *_) in asked["tensors"].items():
        expected |= {of_layers(key, rows) for rows in np.ndindex(*shape[:2])}
    for name in asked["objects"]:
        key, _, shard = name.rpartition("/shard_")
        expected.add(of_layers(key, tuple(map(int, shard.split("_")[0].split(".")))))
    assert {name for name in model if not name.endswith(ONLY_IN_STATE_DICTS)} == expected
    assert {name for name, value in model.items() if value is None} == {name for name in model if name.endswith("_extra_state")}
    assert sum(name.endswith(ONLY_IN_STATE_DICTS) for name in model) == asked["config"]["num_hidden_layers"] + 1
