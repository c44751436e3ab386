"""Optimizer state in checkpoints of NeMo, whose trainer keeps the step and the parameter groups in `common.pt`.

Made of what megatron-core 0.8.0 wrote, laid out as NeMo's sources say (`formats/lightning.py`): keys under NeMo's roots, and in
`common.pt` Lightning's dictionary, with megatron-core's state of the optimizer as the only item of a list.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from converter import Reporter, UserError, inspect, mcore_to_hf, reshard
from formats.detect import open_megatron
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from tests.converter.test_kinds import LLAMA
from tests.formats.test_optimizer import values
from tests.golden.kinds import unpacked

SMALL = {**LLAMA, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
FLATTENED, PLAIN, ZARR = "zarr_distributed_optimizer_flattened", "zarr_as_torch_dist", "zarr_distributed_optimizer"
STATES = ("exp_avg", "exp_avg_sq", "fp32_param")
SCHEDULE = {"warmup_steps": 1, "max_steps": 9, "min_lr": 0.0, "base_lrs": [1e-3], "last_epoch": 2, "_step_count": 3}


def lightning(common: dict, word: str, **more: object) -> dict:
    """What Lightning keeps of a run, with megatron-core's state of the optimizer under one of NeMo's words."""
    return {
        "epoch": 0, "global_step": common["iteration"], "pytorch-lightning_version": "2.4.0", "state_dict": {},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.5), "best_model_path": Path("a")}},
        "optimizer_states": [], "lr_schedulers": [SCHEDULE], word: [common["optimizer"]], **more,
    }  # fmt: skip


def rooted(name: str, root: str) -> str:
    """A key under a root, or that of a state of the optimizer of it. Objects beside the weights keep their names."""
    for state in STATES:
        if name.startswith(start := f"optimizer.state.{state}."):
            return f"{start}{root}{name.removeprefix(start)}"
    return f"{root}{name}" if name.startswith(("decoder", "embedding", "output_layer")) else name


def rename_keys(weights: Path, root: str) -> None:
    """Put all keys of a `torch_dist` or `zarr` folder under a root."""
    if not (weights / ".metadata").exists():
        for array in [path for path in weights.iterdir() if path.is_dir()]:
            array.rename(weights / rooted(array.name, root))
        return
    index = pickle.loads((weights / ".metadata").read_bytes())
    index.state_dict_metadata = {rooted(name, root): entry for name, entry in index.state_dict_metadata.items()}
    stored = index.storage_data.items()
    index.storage_data = {dataclasses.replace(key, fqn=rooted(key.fqn, root)): info for key, info in stored}
    index.mcore_data = {rooted(name, root): entry for name, entry in index.mcore_data.items()}
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def nemo(name: str, folder: Path, version: int, **more: object) -> Path:
    """Make a checkpoint of NeMo 1 or 2 of a golden one."""
    root, inner, word = [("model.", "model_weights", "optimizer_states"), ("module.", "weights", "optimizer")][version - 1]
    weights = folder / "nemo" / inner
    shutil.move(next(unpacked(name, folder).glob("iter_*")), weights)
    rename_keys(weights, root)
    common = torch.load(weights / "common.pt", weights_only=False)
    torch.save(lightning(common, word, **more), weights / "common.pt")
    settings = folder / "nemo" / ("model_config.yaml" if version == 1 else "context/model.yaml")
    settings.parent.mkdir(exist_ok=True)
    settings.write_text("precision: bf16\n")
    return folder / "nemo"


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "config"


def optimizer_of(root: Path):
    return open_optimizer(open_megatron(LocalFolder(root)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", [FLATTENED, PLAIN, ZARR])
def test_state_and_groups_are_those_of_the_same_checkpoint_of_megatron(tmp_path, name, version):
    twin = unpacked(name, tmp_path / "twin")
    expected, made = optimizer_of(twin), optimizer_of(nemo(name, tmp_path, version))
    assert values(made) == values(expected)
    assert made.kind == expected.kind
    assert made.groups == expected.groups
    assert {"lr", "betas", "eps", "weight_decay", "step"} <= set(made.groups[0][0])


@pytest.mark.parametrize("version", [1, 2])
def test_a_reshard_keeps_what_the_checkpoint_of_megatron_keeps(tmp_path, config, version):
    notes: list[str] = []
    source = nemo(FLATTENED, tmp_path, version)
    reporter = Reporter(note=notes.append)
    reshard(source, tmp_path / "m", pp=2, hf_config=config, make_vocab_size_divisible_by=32, verify=True, reporter=reporter)
    twin = open_megatron(LocalFolder(unpacked(FLATTENED, tmp_path / "twin")))
    made, expected = optimizer_of(tmp_path / "m"), open_optimizer(twin)
    assert values(made) == values(expected)
    assert made.groups == expected.groups
    assert open_megatron(LocalFolder(tmp_path / "m")).common_state()["iteration"] == twin.common_state()["iteration"]
    assert (tmp_path / "m" / "iter_0000002").is_dir()
    assert any("the schedule of NeMo's trainer is not read" in note for note in notes)
    assert inspect(source).state.iteration == 2


def test_a_trainer_whose_state_names_code_stands_in_the_way_of_groups_alone(tmp_path, config):
    source = nemo(FLATTENED, tmp_path, 2, callbacks={"x": functools.partial(print, "a")})
    with pytest.raises(UserError) as refused:
        reshard(source, tmp_path / "m", hf_config=config)
    assert "without the hyper-parameters of its groups: the state of NeMo's trainer is not read" in str(refused.value)
    assert "the pickle names `functools.partial`, which no checkpoint needs" in str(refused.value)
    assert "hint: `--weights-only` leaves the state out" in str(refused.value)
    mcore_to_hf(source, tmp_path / "hf", hf_config=config, values_from="master")
    reshard(source, tmp_path / "m", hf_config=config, weights_only=True)


@pytest.mark.parametrize("more", [{"optimizer": []}, {"optimizer": [1, 2]}, {"optimizer": "x"}, {"optimizer": [[]]}], ids=str)
def test_a_trainer_that_keeps_no_optimizer_or_another_has_no_groups(tmp_path, config, more):
    source = nemo(FLATTENED, tmp_path, 2, **more)
    assert not optimizer_of(source).groups
    with pytest.raises(UserError, match="has optimizer state without the hyper-parameters of its groups\n"):
        reshard(source, tmp_path / "m", hf_config=config)
