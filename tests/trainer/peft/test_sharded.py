"""Adapters in megatron-core's checkpoints: saved at one layout and loaded at another, under their own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer import small
from tests.trainer.peft.runs import ALPHA, DIM, LAYOUTS, ONE_STEP, Watched, run, whole

BOTH = LAYOUTS["tp2"][1] | LAYOUTS["pp2"][1]
WAYS = [("LoRA", {}), ("LoRA", {"canonical": True}), ("DoRA", {}), ("DoRA", {"canonical": True})]


def _adapters(run):
    """The adapters' part of the model's sharded state, with a number per layer."""
    from megatron.core import parallel_state

    from trainer.model import unwrap

    metadata = {"non_homogeneous_layers": True, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {}
    for chunk in run.chunks:
        state |= unwrap(chunk).sharded_state_dict(metadata=metadata)
    return {name: tensor for name, tensor in state.items() if ".adapter." in name}


class _Saved(Watched):
    def __init__(self, folder, begin_with_noise):
        super().__init__()
        self.folder, self.noise = folder, begin_with_noise

    def on_start(self, run):
        from megatron.core import dist_checkpointing

        from trainer.model import unwrap
        from trainer.peft import trainable

        super().on_start(run)
        if self.noise:
            for _, parameter in trainable(run.chunks):
                torch.nn.init.normal_(parameter)
                if not parameter.tensor_model_parallel:  # copies are the same on all tensor-parallel ranks
                    parameter.data.fill_(parameter.shape[0] / 7)
            dist_checkpointing.save(_adapters(run), self.folder)
        else:
            loaded = dist_checkpointing.load(_adapters(run), self.folder)
            for chunk in run.chunks:
                names = unwrap(chunk).state_dict().keys()
                unwrap(chunk).load_state_dict({name: tensor for name, tensor in loaded.items() if name in names}, strict=False)
        self.parts = {
            name: (
                parameter.detach().clone(),
                parameter.tensor_model_parallel,
                parameter.partition_dim,
                parameter.partition_stride,
            )
            for name, parameter in trainable(run.chunks)
        }


def _at(folder, kept, changes, way, noise):
    from trainer import peft
    from trainer.loop import pretrain

    config = small.settings(Path(folder), **(ONE_STEP | changes))
    kind, settings = way
    config.peft = getattr(peft, kind)(**({"dim": DIM, "alpha": ALPHA} | settings))
    history = _Saved(kept, noise)
    pretrain(config, callbacks=[history])
    return history.parts


@pytest.mark.parametrize(("kind", "settings"), WAYS)
def test_adapters_of_four_ranks_are_those_of_one(kind, settings, ranks, model_folder, tmp_path):
    from megatron.core.dist_checkpointing import load_tensors_metadata

    from trainer import tensor_properties

    folder, kept = str(model_folder("gqa")), str(tmp_path)
    spread = ranks.run(_at, 4, folder, kept, BOTH, (kind, settings), True)
    (alone,) = ranks.run(_at, 1, folder, kept, {}, (kind, settings), False)
    by_stage = [{name: whole([rank[name] for rank in stage]) for name in stage[0]} for stage in (spread[:2], spread[2:])]
    saved = by_stage[0] | by_stage[1]
    assert saved.keys() == alone.keys()
    for name, (tensor, *_) in alone.items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    with tensor_properties.without_strides():
        stored = load_tensors_metadata(kept)
    assert {name: tensor.global_shape for name, tensor in stored.items()} == {
        name: tuple(part[0].shape) for name, part in alone.items()
    }
    assert "decoder.layers.3.mlp.linear_fc2.adapter.linear_in.weight" in stored


def _keys(folder, kind):
    from trainer import model, parallel, peft
    from trainer.peft.attach import attach
    from trainer.settings.resolve import resolve

    config = resolve(small.settings(Path(folder)), world_size=1, device="cpu").config
    with parallel.session(config, "cpu"):
        chunks = model.build(config.model)
        before = {name: getattr(tensor, "key", None) for name, tensor in chunks[0].sharded_state_dict().items()}
        plain = set(chunks[0].state_dict())
        if kind:
            attach(chunks, getattr(peft, kind)())
        after = {name: getattr(tensor, "key", None) for name, tensor in chunks[0].sharded_state_dict().items()}
        added = set(chunks[0].state_dict()) - plain
        assert {name: key for name, key in after.items() if ".adapter." not in name} == before
        assert plain <= set(chunks[0].state_dict())
        return sorted(added), sorted(after.keys() - before.keys())


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_the_model_keeps_its_names_and_adapters_have_their_own(kind, ranks, model_folder):
    ((added, sharded),) = ranks.run(_keys, 1, str(model_folder("gqa")), kind)
    assert added == sharded
    ends = {"linear_in.weight", "linear_out.weight"} | ({"weight_magnitude"} if kind == "DoRA" else set())
    assert {name.partition(".adapter.")[2] for name in added} == ends


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_run_goes_on_at_another_layout(kind, ranks, model_folder, tmp_path):
    """With LoRA+, whose parameter groups differ in their learning rates alone."""
    folder, settings, length = str(model_folder("gqa")), {"lora_plus_ratio": 4.0}, {"train__train_iters": 8}
    kept = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    (alone,) = ranks.run(run, 1, folder, length, kind, settings)
    ranks.run(run, 2, folder, length | kept | LAYOUTS["tp2"][1] | {"train__exit_interval": 5}, kind, settings)
    for changes, world in (({}, 1), (LAYOUTS["pp2"][1], 2)):
        for resumed in ranks.run(run, world, folder, length | kept | changes | {"checkpoint__save": None}, kind, settings):
            assert resumed["losses"] == pytest.approx(alone["losses"][5:], abs=1e-4)
            assert resumed["grad_norms"] == pytest.approx(alone["grad_norms"][5:], rel=1e-3)
