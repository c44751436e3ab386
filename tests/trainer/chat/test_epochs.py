"""How often examples are seen: `train.num_epochs` times in training, and once in an evaluation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from formats.errors import UserError
from tests.trainer import small, witness
from tests.trainer.chat.packed import Drawn, Given
from trainer.config import DatasetConfig
from trainer.data.chat.dataset import ExampleDataset

EXAMPLES = 5
"""Of held-out data: with a batch of 4, one is in the second batch alone."""

FROZEN = {"optimizer__lr": 0.0, "optimizer__min_lr": 0.0, "train__train_iters": 1, "scheduler__lr_warmup_iters": 0}


def evaluated(folder, iterations, changes):
    """The loss over held-out examples of a run that changes no weight."""
    given = Given(count=EXAMPLES, packed=False)
    settings = {"dataset": given, "validation__eval_iters": iterations, **FROZEN, **changes}
    return small.train(folder, settings).evaluations


def by_transformers(folder):
    """The mean over the learned tokens of all examples, each seen once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = count = 0.0
    for words, trained in (Drawn(EXAMPLES)[number] for number in range(EXAMPLES)):
        logits = model(torch.from_numpy(words)[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(words[1:]), reduction="none")
        learned = torch.from_numpy(trained[1:])
        total, count = total + each[learned].sum().item(), count + int(learned.sum())
    return total / count


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("iterations", [10, None], ids=["more than there is", "all"])
def test_an_evaluation_sees_each_held_out_example_once(iterations, world, ranks, model_folder):
    folder = str(model_folder("gqa"))
    expected = by_transformers(folder)
    changes = {"train__micro_batch_size": 1}
    for evaluations in ranks.run(evaluated, world, folder, iterations, changes):
        assert evaluations == [("validation", pytest.approx(expected, rel=1e-5)), ("test", pytest.approx(expected, rel=1e-5))]


def test_an_evaluation_of_fewer_batches_sees_the_first_examples(ranks, model_folder):
    folder = str(model_folder("gqa"))
    ((first, _),) = ranks.run(evaluated, 1, folder, 1, {})
    assert first[1] != pytest.approx(by_transformers(folder), rel=1e-3)


def test_a_blend_does_not_say_how_many_samples_all_are():
    from trainer.data.one_epoch import limit_to_one_epoch

    with pytest.raises(UserError) as refused:
        limit_to_one_epoch(small.FixedTokens(64).build(None, 64, (1, 1, 1))[1], iterations=None, global_batch_size=4)
    assert str(refused.value) == (
        "`validation.eval_iters` is `None`, and the dataset does not say how many samples an epoch has\n\n"
        "hint: set `validation.eval_iters` to a number of global batches"
    )


def tuned(folder, changes):
    """A run of two epochs; how often it saw each row, and its learning rates."""
    from trainer.loop import pretrain

    seen = witness.Witness()
    given = Given(count=EXAMPLES * 2, packed=False)
    settings = small.settings(Path(folder), dataset=given, train__num_epochs=2, train__train_iters=1, **changes)
    pretrain(settings, seen.forward_step, callbacks=[seen])
    return Counter(map(tuple, seen.seen)), seen.rates


def test_epochs_are_counted_from_the_data_and_the_schedule_ends_with_them(ranks, model_folder):
    changes = {"scheduler__lr_decay_style": "linear", "scheduler__lr_warmup_iters": 2, "optimizer__min_lr": 0.0}
    ((rows, rates),) = ranks.run(tuned, 1, str(model_folder("gqa")), changes)
    assert sorted(rows.values()) == [2] * (EXAMPLES * 2)
    assert len(rates) == EXAMPLES  # 20 samples, 4 a step
    assert rates[-1] == pytest.approx(3e-3 / 3)  # three steps down from step 2, of which this is the last but one


def test_steps_go_on_until_the_last_epoch_is_whole():
    """Of rows that are packed anew in each epoch."""
    store = Drawn(200)
    examples = ExampleDataset(store, np.arange(200), sequence_length=48, packed=True, seed=3)
    ends = [examples.until(epochs) for epochs in (1, 2, 3)]
    assert ends[0] == examples.per_epoch
    examples.take(ends[2])
    for first, last in zip([0, *ends], ends, strict=False):
        learned = sum(int(examples[number]["loss_mask"].sum()) for number in range(first, last))
        assert learned == sum(int(store[number][1][1:].sum()) for number in range(200))


def test_epochs_of_data_that_has_none_are_refused(ranks, model_folder):
    with pytest.raises(UserError) as refused:
        ranks.run(small.train, 1, str(model_folder("gqa")), {"train__num_epochs": 3})
    assert str(refused.value) == (
        "`train.num_epochs` is `3`, and the dataset does not say how many samples an epoch has\n\n"
        "hint: leave it out, and set `train.train_iters`"
    )


def test_the_trainers_own_documents_have_epochs(ranks, model_folder, tmp_path, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from tests.trainer import prepared

    prefix = prepared.write(tmp_path / "a", documents=12)
    data = DatasetConfig(sequence_length=prepared.LENGTH, blend=[prefix], split="1,0,0", num_workers=0)
    changes = {"dataset": data, "train__num_epochs": 2, "train__micro_batch_size": 1, "model__vocab_size": 1000}
    monkeypatch.setenv("RANK", "0")  # else megatron-core warns that it does not know
    source = IndexedDataset(prefix)
    per_epoch = (int(source.sequence_lengths.sum()) - 1) // prepared.LENGTH
    (history,) = ranks.run(small.train, 1, str(model_folder("gqa")), {**changes, "checkpoint__pretrained_checkpoint": None})
    assert len(history.losses) == -(-2 * per_epoch // small.BATCH)
