"""Several examples in a row learn what each learns alone."""

from __future__ import annotations

import contextlib
import functools
import io
import json

import pytest
import torch

from tests.trainer import witness
from tests.trainer.chat import packed
from trainer.config import FinetuningDatasetConfig

TP2 = {"model__tensor_model_parallel_size": 2}
PP2 = {"model__pipeline_model_parallel_size": 2}
PP4 = {"model__pipeline_model_parallel_size": 4}
VPP2 = {**PP2, "model__virtual_pipeline_model_parallel_size": 2}
RECOMPUTE = {
    "model__recompute_granularity": "full",
    "model__recompute_method": "uniform",
    "model__recompute_num_layers": 1,
}
LAYOUTS = {
    "one": (1, {}), "two_rows_at_once": (1, {"train__micro_batch_size": 2}), "recompute": (1, RECOMPUTE), "tp2": (2, TP2),
    "pp2": (2, PP2), "pp4": (4, PP4), "vpp2": (2, VPP2), "dp2": (2, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(ranks, model_folder):
    """What each rank of a layout saw, with examples in rows or each alone; once for each."""

    @functools.cache
    def run(layout, in_rows):
        world, changes = LAYOUTS[layout]
        return ranks.run(packed.train, world, str(model_folder("gqa")), in_rows, changes)

    return run


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name == "pp4")) for name in LAYOUTS])
def test_packed_losses_and_gradients_are_those_of_examples_alone(layout, trained):
    for expected, actual in zip(trained(layout, False), trained(layout, True), strict=True):
        assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
        assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert actual.evaluations == [(split, pytest.approx(loss, rel=1e-5)) for split, loss in expected.evaluations]
        assert actual.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def _logits(folder: str, rows: list[list[int]], ids: list[list[int]] | None) -> torch.Tensor:
    """Of the running model, `[rows, sequence, vocabulary]`; examples kept apart where `ids` says which they are."""
    from pathlib import Path

    from tests.trainer import small
    from trainer import model, parallel, segments
    from trainer.checkpoints import live
    from trainer.settings.resolve import resolve

    config = resolve(small.settings(Path(folder)), world_size=1, device="cpu").config
    with parallel.session(config, "cpu"), torch.no_grad():
        (chunk,) = model.build(config.model)
        live.load([chunk.eval()], folder)
        tokens = torch.tensor(rows)
        mask = segments.attention_mask(torch.tensor(ids, dtype=torch.int32)) if ids else None
        return chunk(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), mask)


def test_an_example_does_not_depend_on_its_neighbours(ranks, model_folder):
    folder = str(model_folder("gqa"))
    ours, first, second = [7, 8, 9, 10, 11], [1, 2, 3], [40, 50, 60]
    ids = [[0] * 3 + [1] * 5 + [2] * 3, [0] * 3 + [1] * 5 + [-1] * 3]
    (together,) = ranks.run(_logits, 1, folder, [first + ours + second, second + ours + first], ids)
    (alone,) = ranks.run(_logits, 1, folder, [ours], None)
    assert torch.equal(together[0, 3:8], together[1, 3:8])
    torch.testing.assert_close(together[0, 3:8], alone[0], rtol=1e-5, atol=1e-5)
    (seen,) = ranks.run(_logits, 1, folder, [first + ours], None)
    assert not torch.allclose(seen[0, 3:], alone[0], atol=1e-2)  # as it were if they saw each other


def test_work_is_what_examples_multiply(trained):
    from tests import models
    from tests.trainer.settings import LLAMA
    from tests.trainer.test_flops import counted
    from trainer.estimate.flops import flops_of_packed
    from trainer.model import from_hf_config

    for first, second in zip(*(trained(layout, True) for layout in ("dp2", "pp2")), strict=True):
        assert first.work == second.work  # every rank knows, whatever the layout
    lengths = packed.Drawn(96).lengths[:16].tolist()
    tokens, squares = first.work[0]
    assert (tokens, squares) == (sum(lengths), sum(length**2 for length in lengths))
    model = models.build("gqa")
    model.set_attn_implementation("eager")
    assert flops_of_packed(from_hf_config(LLAMA), tokens, squares) == pytest.approx(
        sum(counted(model, length) for length in lengths), rel=1e-12
    )


def test_speeds_count_the_work_of_packed_rows():
    from trainer.logging.metrics import Interval, Measure

    measure = Measure(
        flops_per_token=1e9, tokens_per_step=1000, num_gpus=2, train_iters=9,
        flops_of_packed=lambda tokens, squares: 1e9 * tokens + 1e6 * squares,
    )  # fmt: skip
    first = Interval()
    first.add(1.0, work=(300.0, 5000.0))
    interval = Interval.from_state_dict(first.state_dict())
    interval.add(1.0, work=(500.0, 7000.0))
    fields = {"iteration": 2, "seconds": 4.0, "lr": 1.0, "consumed_samples": 1, "consumed_tokens": 1, "memory_gib": 1.0}
    step = measure.step(interval, timed_steps=2, **fields)
    assert step.tflops_per_gpu == pytest.approx((800e9 + 12000e6) / 4 / 2 / 1e12)
    unpacked = Interval()
    unpacked.add(1.0)
    assert measure.step(unpacked, timed_steps=1, **fields).tflops_per_gpu == pytest.approx(1000e9 / 4 / 2 / 1e12)


@pytest.fixture
def data(tmp_path):
    """Prompts and completions, some of which fill rows of 96 bytes."""
    path = tmp_path / "examples.jsonl"
    words = [{"prompt": f"Question {number}? ", "completion": "yes " * (1 + number % 9)} for number in range(60)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in words))
    return path


def tuned(data, **settings):
    """Settings of a run over real files."""
    config = FinetuningDatasetConfig(sequence_length=96, path=str(data), num_workers=0, **settings)
    return {"dataset": config, "tokenizer__tokenizer_model": "byte", "logger__log_interval": 4}


def test_the_order_of_examples_goes_on_across_an_epochs_end_and_with_another_batch_size(ranks, model_folder, data, tmp_path):
    changes = {**tuned(data), "train__train_iters": 18, "train__global_batch_size": 4, "validation__eval_iters": 0}
    folder = str(model_folder("gqa"))
    whole = ranks.run(witness.train, 2, folder, {**changes, "checkpoint__save": str(tmp_path / "whole")})
    checkpoints = {"checkpoint__save": str(tmp_path / "parts"), "checkpoint__load": str(tmp_path / "parts")}
    ranks.run(witness.train, 2, folder, {**changes, **checkpoints, "train__exit_interval": 5})
    rest = ranks.run(witness.train, 2, folder, {**changes, **checkpoints})
    for expected, actual in zip(whole, rest, strict=True):
        assert actual.losses == expected.losses[5:]
        assert actual.seen == expected.seen[10:]
        assert witness.differences(expected.left, actual.left) == []
    assert witness.metrics(tmp_path / "parts") == witness.metrics(tmp_path / "whole")
    rows = 18 * 4
    epoch = json.loads((data.parent / "examples.jsonl.cache").glob("*/about.json").__next__().read_text())["tokens"] / 96
    assert rows > 2 * epoch  # the run went over the end of an epoch twice

    (two,) = ranks.run(
        witness.train, 1, folder, {**changes, "checkpoint__save": str(tmp_path / "other"), "train__exit_interval": 5}
    )
    resumed = {"checkpoint__load": str(tmp_path / "other"), "train__global_batch_size": 2, "train__train_iters": 31}
    (further,) = ranks.run(witness.train, 1, folder, {**changes, **resumed})
    halves = [sorted(rank.seen) for rank in whole]
    assert sorted(two.seen + further.seen) == sorted(halves[0] + halves[1])


def test_a_resume_with_other_examples_is_told(ranks, model_folder, data, tmp_path):
    folder = str(model_folder("gqa"))
    changes = {"train__train_iters": 2, "validation__eval_iters": 0, "scheduler__lr_warmup_iters": 0}
    changes["checkpoint__save"] = str(tmp_path / "run")
    ranks.run(witness.train, 1, folder, {**tuned(data), **changes})
    again = {**changes, "train__train_iters": 3, "checkpoint__load": str(tmp_path / "run")}
    (output,) = ranks.run(_said, 1, folder, {**tuned(data, packed=False), **again})
    assert "note: `dataset.packed` was True, now False: the samples to come are others" in output
    assert "60 examples of 1 file: " in output


def _said(folder: str, changes: dict) -> str:
    """What the run told people."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        witness.train(folder, changes)
    return stderr.getvalue()


def _heard(folder: str, changes: dict) -> str:
    """What a run says to people."""
    import io
    from contextlib import redirect_stderr

    with redirect_stderr(io.StringIO()) as heard:
        witness.train(folder, changes)
    return heard.getvalue()


def test_an_example_that_cannot_be_used_ends_every_rank(ranks, model_folder, data):
    with data.open("a") as file:
        file.write('{"prompt": "no completion"}\n')
    changes = {**tuned(data), "train__train_iters": 2, "scheduler__lr_warmup_iters": 0}
    for message in ranks.run(_refused, 2, str(model_folder("gqa")), changes):
        assert message.startswith(f"`{data}`, line 61 cannot be used: ")


def _refused(folder: str, changes: dict) -> str:
    from formats.errors import UserError

    try:
        witness.train(folder, changes)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def test_settings_that_packed_rows_cannot_have_are_refused(model_folder, data):
    from pathlib import Path

    from formats.errors import UserError
    from tests.trainer import small
    from trainer.settings.resolve import resolve

    def message(**changes):
        with pytest.raises(UserError) as caught:
            resolve(small.settings(Path(model_folder("gqa")), **tuned(data), **changes), world_size=1, device="cpu")
        return caught.value.args[0]

    assert message(model__window_size=(8, 0)) == (
        "`model.window_size` is `(8, 0)`, and megatron-core's attention on the CPU cannot keep packed examples apart too"
    )
    config = tuned(data)["dataset"]
    config.pad_to_multiple_of = 5
    with pytest.raises(UserError, match=r"`96`, which is not divisible by `dataset.pad_to_multiple_of`, `5`"):
        resolve(small.settings(Path(model_folder("gqa")), dataset=config), world_size=1, device="cpu")


def test_fine_tuning_weighs_tokens_alike_and_pads_examples_for_context_parallel_ranks(model_folder, data):
    from pathlib import Path

    from tests.trainer import small
    from trainer.settings.precision import Machine
    from trainer.settings.resolve import resolve

    plain = resolve(small.settings(Path(model_folder("gqa")), **tuned(data)), world_size=1, device="cpu").config
    assert plain.model.calculate_per_token_loss
    assert plain.dataset.pad_to_multiple_of is None
    gpu = Machine(device="gpu", capability=None, transformer_engine=None)
    changes = {"model__context_parallel_size": 2, "dist__device": "gpu", **tuned(data), "train__micro_batch_size": 1}
    cut = resolve(small.settings(Path(model_folder("gqa")), **changes), world_size=2, device="gpu", machine=gpu).config
    assert cut.dataset.pad_to_multiple_of == 4
