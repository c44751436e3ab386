"""A run that stopped and went on is the run that never stopped."""

from __future__ import annotations

import json

import pytest

from formats.errors import UserError
from tests.trainer import small, witness

STEPS, STOPPED = 8, 3

TP2 = {"model__tensor_model_parallel_size": 2}
PP2 = {"model__pipeline_model_parallel_size": 2}
DISTRIBUTED = {"ddp__use_distributed_optimizer": True}
SGD = {"optimizer__optimizer": "sgd"}
LAYOUTS = {"tp1": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2), "dp2_distributed": (2, DISTRIBUTED), "tp2_sgd": (2, {**TP2, **SGD})}
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
PLAN = {
    "train__train_iters": STEPS,
    "validation__eval_iters": 1,
    "validation__eval_interval": 2,
    "logger__log_interval": 2,  # the stop is in the middle of an interval
}


@pytest.fixture
def run(ranks, model_folder):
    """Train, with `PLAN` and these changes, on the ranks of a layout."""

    def train(world, changes, variant="gqa"):
        return ranks.run(witness.train, world, str(model_folder(variant)), {**PLAN, **changes})

    return train


def _in_two(run, world, changes, folder, **second):
    """Stop after three steps, then go on; what the second part saw."""
    saving = {**changes, "checkpoint__save": str(folder), "checkpoint__load": str(folder)}
    run(world, {**saving, "train__exit_interval": STOPPED})
    return run(second.pop("world", world), {**saving, **second})


def _same(whole, resumed, at=STOPPED):
    for expected, actual in zip(whole, resumed, strict=True):
        assert actual.losses == expected.losses[at:]
        assert actual.grad_norms == expected.grad_norms[at:]
        assert actual.rates == expected.rates[at:]
        assert actual.evaluations == expected.evaluations[-len(actual.evaluations) :]
        assert witness.differences(expected.left, actual.left) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(layout, run, tmp_path):
    world, changes = LAYOUTS[layout]
    changes = {**changes, **DROPOUT}
    whole = run(world, {**changes, "checkpoint__save": str(tmp_path / "whole")})
    resumed = _in_two(run, world, changes, tmp_path / "parts", checkpoint__async_save=layout == "pp2")
    _same(whole, resumed)
    assert witness.metrics(tmp_path / "parts") == witness.metrics(tmp_path / "whole")


def test_a_blend_of_examples_goes_on_and_each_held_out_set_is_told_by_its_name(run, tmp_path):
    from trainer.config import FinetuningDatasetConfig

    files = [tmp_path / f"{name}.jsonl" for name in ("sums", "products", "held", "other")]
    for factor, file in enumerate(files, 1):
        pairs = [{"prompt": f"{n} times {factor} is ", "completion": str(n * factor)} for n in range(20)]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sums, products, *held_out = map(str, files)
    dataset = FinetuningDatasetConfig(
        blend=[0.3, sums, 0.7, products], validation_path=held_out, sequence_length=64, split="90,0,10", num_workers=0
    )
    changes = {"dataset": dataset, "tokenizer__tokenizer_model": "byte"}
    changes |= {"validation__sample_interval": STEPS, "validation__sample_tokens": 2}
    whole = run(1, {**changes, "checkpoint__save": str(tmp_path / "whole")})
    _same(whole, _in_two(run, 1, changes, tmp_path / "parts"))
    assert witness.metrics(tmp_path / "parts") == witness.metrics(tmp_path / "whole")
    asked = [line["prompt"] for line in witness.metrics(tmp_path / "whole") if line["kind"] == "sample"]
    assert asked == ["0 times 3 is ", "1 times 3 is "]  # of the first held-out set
    (history,) = whole
    splits = [split for split, _ in history.evaluations]
    assert splits == ["validation/held", "validation/other"] * (STEPS // 2) + ["test/sums", "test/products"]
    assert len({loss for _, loss in history.evaluations}) == len(splits)


def test_the_order_of_real_data_goes_on_across_an_epochs_end(run, tmp_path):
    from trainer.config import DatasetConfig
    from trainer.data.prepare import prepare

    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number:02}.txt").write_text(f"This is document {number}. " * 12)
    prepare([text], tmp_path / "data", tokenizer="byte")
    # 12 documents of about 280 tokens are fewer than 40 training samples after the split: the run reads them again.
    changes = {
        "tokenizer__tokenizer_model": "byte",
        "validation__eval_iters": 0,
        "train__train_iters": 24,
        "train__exit_interval": 10,
        "logger__log_interval": 4,
    }

    def data():
        return DatasetConfig(sequence_length=64, blend=[str(tmp_path / "data")], num_workers=0, split="90,10,0")

    plain = {name: value for name, value in changes.items() if name != "train__exit_interval"}
    whole = run(1, {**plain, "dataset": data(), "checkpoint__save": str(tmp_path / "whole")})
    saving = {"dataset": data(), "checkpoint__save": str(tmp_path / "parts"), "checkpoint__load": str(tmp_path / "parts")}
    run(1, {**changes, **saving})
    resumed = run(1, {**plain, **saving})
    _same(whole, resumed, at=10)
    assert witness.metrics(tmp_path / "parts") == witness.metrics(tmp_path / "whole")


PAIRS = {
    "tp1 to tp2": ((1, {}), (2, TP2)),
    "tp2 to pp2": ((2, TP2), (2, PP2)),
    "pp2 to dp2": ((2, PP2), (2, {})),
    "pp2 to dp2, distributed optimizer": ((2, {**PP2, **DISTRIBUTED}), (2, DISTRIBUTED)),
    "dp2 to tp2, distributed optimizer": ((2, DISTRIBUTED), (2, {**TP2, **DISTRIBUTED})),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_goes_on_at_another_layout(pair, run, tmp_path):
    (world, before), (other_world, after) = PAIRS[pair]
    saving = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    (whole, *_) = run(1, {})
    run(world, {**before, **saving, "train__exit_interval": STOPPED})
    for resumed in run(other_world, {**after, **saving}):
        assert resumed.losses == pytest.approx(whole.losses[STOPPED:], abs=1e-4)  # fp32 sums in another order
        assert resumed.grad_norms == pytest.approx(whole.grad_norms[STOPPED:], abs=1e-4)
        assert resumed.rates == whole.rates[STOPPED:]


BF16 = {**DISTRIBUTED, "mixed_precision": "bf16_mixed"}
IN_BF16 = {
    "dp2 to dp1": ((2, {}), (1, {})),
    "dp1 to dp2": ((1, {}), (2, {})),
    "tp1 to tp2": ((1, {}), (2, TP2)),
    "dp2 to dp1, dp_reshardable": ((2, {"checkpoint__optim_sharding": "dp_reshardable"}), (1, {})),
}


@pytest.mark.parametrize("pair", IN_BF16)
def test_a_run_in_bf16_with_the_distributed_optimizer_goes_on_at_another_layout(pair, run, tmp_path):
    (world, before), (other_world, after) = IN_BF16[pair]
    saving = {**BF16, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    (whole, *_) = run(1, BF16)
    run(world, {**before, **saving, "train__exit_interval": STOPPED})
    for resumed in run(other_world, {**after, **saving}):
        # bf16 keeps 8 bits: sums in another order differ by 1e-3 of the loss's 6. Without Adam's state it is 2e-2 and more.
        assert resumed.losses == pytest.approx(whole.losses[STOPPED:], abs=1e-2)
        assert {float(step) for name, step in resumed.left.items() if name.endswith(".step")} == {STEPS}


def _own_model(folder, steps):
    """examples/model.py in bf16 with the distributed optimizer."""
    from examples import model
    from trainer import pretrain

    config = model.settings(steps=steps, save=folder)
    config.mixed_precision, config.ddp.use_distributed_optimizer, config.dist.device = "bf16_mixed", True, "cpu"
    seen = small.History()
    pretrain(config, callbacks=[seen])
    return seen.losses


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_model_of_ones_own_in_bf16_goes_on_with_another_number_of_ranks(before, after, ranks, tmp_path):
    (whole,) = ranks.run(_own_model, 1, None, 6)
    ranks.run(_own_model, before, str(tmp_path), 3)
    for losses in ranks.run(_own_model, after, str(tmp_path), 6):
        assert losses == pytest.approx(whole[3:], abs=1e-3)  # fp32 sums of gradients in another order, rounded to bf16


def _fails(run, world, changes, text):
    with pytest.raises(UserError) as error:
        run(world, changes)
    assert str(error.value) == text


def test_another_kind_of_optimizer_is_an_error_that_names_both(run, tmp_path):
    saving = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    run(1, {**saving, "train__exit_interval": 1})
    _fails(
        run,
        1,
        {**saving, **DISTRIBUTED},
        f"`{tmp_path}/iter_0000001` was saved by megatron-core's `FP32Optimizer`, this run has `DistributedOptimizer`\n\n"
        "hint: resume with `ddp.use_distributed_optimizer` and `mixed_precision` as they were, or start from the weights alone: "
        f"`checkpoint.pretrained_checkpoint={tmp_path}` with another `checkpoint.save`",
    )


def test_state_that_reshards_over_data_parallel_ranks_alone_says_so_at_another_tp(run, tmp_path):
    changes = {**DISTRIBUTED, "checkpoint__optim_sharding": "dp_reshardable"}
    (whole, *_) = run(2, changes)
    changes |= {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    run(2, {**changes, "train__exit_interval": STOPPED})
    _fails(
        run,
        2,
        {**changes, **TP2},
        f"`{tmp_path}/iter_0000003` was saved `dp_reshardable` at TP 1, PP 1; this run has TP 2, PP 1\n\n"
        "hint: resume at the same TP and PP, or save with `checkpoint.optim_sharding=fully_reshardable`",
    )
    (resumed,) = run(1, changes)
    assert resumed.losses == pytest.approx(whole.losses[STOPPED:], abs=1e-4)


def test_a_changed_batch_size_goes_on_at_the_next_sample(run, tmp_path):
    saving = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    run(1, {**saving, "train__exit_interval": STOPPED})
    (resumed,) = run(1, {**saving, "train__global_batch_size": 2, "train__train_iters": 5})
    assert resumed.left["samples"] == STOPPED * small.BATCH + 2 * 2
    twelve = small.FixedTokens(384).build(None, 0, (16, 0, 0))[0]
    assert resumed.seen == [twelve[number]["tokens"].tolist() for number in range(12, 16)]


def _as_earlier(folder, changes):
    """A run whose checkpoints are as earlier versions wrote them: a schedule that counts samples, a layout of three sizes."""
    from trainer.checkpoints import state_dict

    now = state_dict.state_dict

    def before(*arguments, loading, **further):
        state = now(*arguments, loading=loading, **further)
        if not loading:
            state["opt_param_scheduler"]["num_steps"] *= small.BATCH
            state["mbtrain"]["layout"] = list(state["mbtrain"]["layout"].values())[:3]
        return state

    state_dict.state_dict = before
    return witness.train(folder, changes)


@pytest.mark.parametrize("wrote", [witness.train, _as_earlier])
def test_the_learning_rate_goes_on_where_it_was_whatever_the_batch_size(wrote, ranks, model_folder, tmp_path):
    plan = {
        **PLAN,
        "scheduler__lr_decay_style": "linear",
        "scheduler__start_weight_decay": 0.0,
        "scheduler__end_weight_decay": 0.1,
    }
    plan |= {"scheduler__weight_decay_incr_style": "linear", "validation__eval_iters": 0}
    saving = {**plan, "checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    (whole,) = ranks.run(witness.train, 1, str(model_folder()), plan)
    ranks.run(wrote, 1, str(model_folder()), {**saving, "train__exit_interval": STOPPED})
    (resumed,) = ranks.run(witness.train, 1, str(model_folder()), {**saving, "train__global_batch_size": 16})
    assert resumed.rates == whole.rates[STOPPED:]
    decays = [
        {name: group["weight_decay"] for name, group in history.left.items() if isinstance(group, dict)}
        for history in (whole, resumed)
    ]
    assert decays[0] == decays[1]


def _experts(folder, changes):
    """examples/moe.py with two experts on each of two ranks."""
    from examples import moe
    from trainer import pretrain

    config, seen = moe.settings(ep=2, save=folder), witness.Witness()
    config.checkpoint.load, config.dist.device, config.train.train_iters = folder, "cpu", 4
    for name, value in changes.items():
        setattr(config.train, name, value)
    pretrain(config, seen.forward_step, callbacks=[seen])
    return seen


def test_each_rank_of_experts_gets_its_own_random_numbers_back(ranks, tmp_path):
    whole = ranks.run(_experts, 2, str(tmp_path / "whole"), {})
    drawn = [str(rank.left["tracker expert-parallel-rng"].tolist()) for rank in whole]
    assert drawn[0] != drawn[1]
    ranks.run(_experts, 2, str(tmp_path / "parts"), {"exit_interval": 2})
    _same(whole, ranks.run(_experts, 2, str(tmp_path / "parts"), {}), at=2)


def test_a_resumed_run_follows_its_own_settings_not_those_that_were_saved(run, tmp_path):
    for name, layout in {"plain": {}, "distributed": DISTRIBUTED}.items():
        saving = {**layout, "checkpoint__save": str(tmp_path / name), "checkpoint__load": str(tmp_path / name)}
        run(1, {**saving, "train__exit_interval": STOPPED})
        (resumed,) = run(1, {**saving, "optimizer__lr": 1e-5, "optimizer__min_lr": 1e-6, "optimizer__adam_beta2": 0.9})
        assert max(resumed.rates) <= 1e-5
        assert {group["betas"] for name, group in resumed.left.items() if isinstance(group, dict) and "betas" in group} == {
            (0.9, 0.9)
        }


def test_a_run_that_is_done_does_nothing_when_it_is_started_again(run, tmp_path):
    saving = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path), "train__train_iters": 5}
    run(1, saving)
    before = _tree(tmp_path)
    (again,) = run(1, saving)
    assert again.losses == []
    assert _tree(tmp_path) == before


def _tree(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_model_of_another_shape_is_an_error_that_names_the_checkpoint(run, tmp_path):
    saving = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path)}
    run(2, {**saving, "train__exit_interval": STOPPED})
    with pytest.raises(UserError, match=r"iter_0000003` cannot be resumed from: `decoder.*` is `.*` there, and `.*512"):
        run(2, {**saving, "model__ffn_hidden_size": 256})
