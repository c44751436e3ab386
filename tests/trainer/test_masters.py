"""A checkpoint whose fp32 masters do not round to its weights is not resumed from."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from converter import check
from formats.errors import UserError
from tests.trainer import small
from tests.trainer.shifting import WIDE, as_before
from trainer.checkpoints import masters

DISTRIBUTED = {"ddp__use_distributed_optimizer": True}
SHORT = {
    "mixed_precision": "bf16_mixed",
    "train__train_iters": 3,
    "train__exit_interval": 2,
    "scheduler__lr_warmup_iters": 1,
}
KINDS = {
    "plain": {},
    "fully_reshardable": DISTRIBUTED,
    "dp_reshardable": {**DISTRIBUTED, "checkpoint__optim_sharding": "dp_reshardable"},
}


class _Spoil(small.History):
    """Changes a master on one rank after the second step, without its weight."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def on_step(self, run, step):
        import torch.distributed as dist

        from trainer import optim

        if run.progress.iteration == 2 and dist.get_rank() == self.rank:
            for optimizer in optim.distributed(run.parts.optimizer):
                optimizer.shard_fp32_from_float16_groups[0][0].data.add_(1)
            for optimizer in optim.unsharded(run.parts.optimizer):
                optimizer.fp32_from_float16_groups[0][0].data.add_(1)


def _train_spoiled(folder, changes, rank):
    from trainer import pretrain

    pretrain(small.settings(Path(folder), **changes), callbacks=[_Spoil(rank)])


def _train_as_before(folder, changes):
    """Save with megatron-core as it is."""
    with as_before():
        small.train(folder, changes)


@pytest.fixture
def refused(ranks, model_folder, tmp_path):
    """Save with that function, and resume: the weight that is named, and how many others. `mbconvert` finds the same."""

    def run(world, changes, function, *args):
        settings = {**SHORT, **changes, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
        ranks.run(function, world, str(model_folder("gqa")), settings, *args)
        with pytest.raises(UserError) as error:
            ranks.run(small.train, world, str(model_folder("gqa")), settings)
        match = re.fullmatch(
            rf"`{tmp_path}/iter_0000002` was written wrong: the fp32 master of `(\S+)` does not round to the weight"
            r"(?:, and those of (\d+) more do not)?\n\nhint: its weights are whole, its optimizer state is not "
            r"\(megatron-core 0\.15 to 0\.19\.2 could shift it\); start from the weights: "
            rf"`checkpoint\.pretrained_checkpoint={tmp_path}/iter_0000002` with another `checkpoint\.save`",
            str(error.value),
        )
        assert match, str(error.value)
        if "checkpoint__optim_sharding" not in changes:
            judged = check(tmp_path)
            assert min(judged.wrong_masters) == match[1]
            assert len(judged.wrong_masters) == 1 + int(match[2] or 0)
        return match[1], int(match[2] or 0)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_master_is_named(kind, refused):
    name, others = refused(1, KINDS[kind], _train_spoiled, 0)
    assert name.endswith("weight")
    assert others == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_master_agrees_where_its_rounding_has_the_bits_of_the_weight(dtype):
    """To nearest even, also of numbers that are halfway, subnormal or too large; a single bit of a single weight is enough."""
    step = torch.finfo(dtype).eps
    odd = torch.tensor([1 + step / 2, 1 + 3 * step / 2, torch.finfo(dtype).tiny / 2, 1e38, -0.0, 0.0])
    master = torch.cat([odd, torch.randn(1000, generator=torch.Generator().manual_seed(1))])
    weight = torch.nn.Parameter(torch.cat([master[:7], master]).to(dtype))
    assert masters._Pair(weight, slice(7, None), master).agrees
    for number in (0, 5, 1005):
        spoiled = weight.detach().clone()
        spoiled.view(torch.int32 if dtype is torch.float32 else torch.int16)[7 + number] ^= 1
        assert not masters._Pair(torch.nn.Parameter(spoiled), slice(7, None), master).agrees
    swapped = weight.detach().clone()
    swapped[7 + 4] = 0.0  # where the master is -0.0
    assert not masters._Pair(torch.nn.Parameter(swapped), slice(7, None), master).agrees


def test_all_ranks_refuse_what_one_finds(refused):
    assert refused(2, DISTRIBUTED, _train_spoiled, 1)[1] == 0


def test_adapters_are_compared_too_and_the_hint_is_theirs(ranks, model_folder, tmp_path):
    from trainer.peft import LoRA

    folder, first = str(model_folder("gqa")), tmp_path / "first"
    changes = {**SHORT, **DISTRIBUTED, "peft": LoRA(dim=4)}
    settings = {**changes, "checkpoint__save": str(first), "checkpoint__load": str(first)}
    ranks.run(_train_spoiled, 1, folder, settings, 0)
    with pytest.raises(UserError, match=rf"start from the weights: `checkpoint\.pretrained_adapter={first}/iter_0000002` with"):
        ranks.run(small.train, 1, folder, settings)
    ranks.run(small.train, 1, folder, {**changes, "checkpoint__pretrained_adapter": f"{first}/iter_0000002"})


@pytest.mark.parametrize("precision", ["bf16_mixed", "fp32"])
def test_state_that_megatron_core_shifted_is_refused_and_the_hint_works(precision, refused, ranks, model_folder, tmp_path):
    name, others = refused(1, {**WIDE, **SHORT, "mixed_precision": precision}, _train_as_before)
    assert name.startswith("decoder.")
    assert others > 10
    start = {**SHORT, "mixed_precision": precision, "checkpoint__pretrained_checkpoint": f"{tmp_path}/iter_0000002"}
    (again,) = ranks.run(small.train, 1, str(model_folder("gqa")), start)
    assert len(again.losses) == 2


def _notes(folder, changes, freeze):
    """What a run says."""
    from megatron.core.models.gpt import GPTModel

    made, output = GPTModel.__init__, io.StringIO()

    def frozen(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.embedding.requires_grad_(not freeze)

    with mock.patch.object(GPTModel, "__init__", frozen), contextlib.redirect_stderr(output):
        small.train(folder, changes)
    return [line for line in output.getvalue().splitlines() if "masters" in line]


NOTES = {
    "everything": (DISTRIBUTED, False, None),
    "frozen": (DISTRIBUTED, True, "frozen weights"),
    "read into": (
        {**KINDS["dp_reshardable"], "mixed_precision": "fp32"},
        False,
        "fp32 weights, which `dp_reshardable` state is read into",
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_was_not_compared_is_said_once(case, ranks, model_folder, tmp_path):
    changes, freeze, reason = NOTES[case]
    settings = {**SHORT, **changes, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    assert ranks.run(_notes, 1, str(model_folder("gqa")), settings, freeze) == [[]]
    (notes,) = ranks.run(_notes, 1, str(model_folder("gqa")), settings, freeze)
    named = f"`{tmp_path}/iter_0000002`"
    assert notes == ([f"note: weights of {named} that were not held against fp32 masters: {reason}"] if reason else [])


@pytest.mark.parametrize(("first", "then", "noted"), [("bf16_mixed", "fp32", True), ("fp32", "bf16_mixed", False)])
def test_weights_that_were_saved_in_another_dtype_are_no_reason_to_refuse(first, then, noted, ranks, model_folder, tmp_path):  # noqa: PLR0917
    settings = {**SHORT, **DISTRIBUTED, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    ranks.run(small.train, 1, str(model_folder("gqa")), {**settings, "mixed_precision": first})
    (notes,) = ranks.run(_notes, 1, str(model_folder("gqa")), {**settings, "mixed_precision": then}, False)
    assert [note.partition("masters: ")[2] for note in notes] == (["weights that are in another dtype there"] if noted else [])


def test_rows_that_only_pad_the_vocabulary_are_no_reason_to_refuse(ranks, model_folder, tmp_path):
    """384 rows are 384 on one tensor-parallel rank, and 512 on two."""
    settings = {**SHORT, **DISTRIBUTED, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    ranks.run(small.train, 1, str(model_folder("gqa")), settings)
    sharded = {**settings, "model__tensor_model_parallel_size": 2}
    assert ranks.run(_notes, 2, str(model_folder("gqa")), sharded, False) == [[], []]
