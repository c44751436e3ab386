"""Settings that change how a run is computed, and not what: the curves are the same. And what the loss is the mean of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from formats.errors import UserError
from tests.trainer import small
from tests.trainer.small import BATCH
from trainer.config import DatasetConfig

STEPS = 8
CLOSE = 1e-4
"""fp32 sums in another order, carried through some updates."""

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass
class SomeCount(small.FixedTokens):
    """Tokens of which each sample leaves out another share."""

    def build(self, tokenizer, vocab_size, samples):
        return tuple(_Masked(dataset) for dataset in super().build(tokenizer, vocab_size, samples))


@dataclass
class _Masked(torch.utils.data.Dataset):
    inner: torch.utils.data.Dataset

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        sample = self.inner[index]
        # 1 to 29 tokens of 32, at other places in each sample.
        keep = torch.randperm(32, generator=torch.Generator().manual_seed(index))[: 1 + 7 * (index % 5)]
        return {**sample, "loss_mask": torch.zeros(32).index_fill(0, keep, 1.0)}


def _train(folder, changes, masked=False):
    from trainer.loop import pretrain

    config = small.settings(Path(folder), train__train_iters=STEPS, **changes)
    if masked:
        config.dataset = SomeCount(config.model.vocab_size)
    history = small.History()
    pretrain(config, callbacks=[history])
    return history.losses, history.grad_norms


@pytest.mark.parametrize("how", [FULL, {"recompute_granularity": "selective"}], ids=["full", "selective"])
def test_recomputed_activations_give_the_same_numbers_to_the_bit(how, ranks, model_folder):
    folder = str(model_folder("gqa"))
    changes = {f"model__{name}": value for name, value in how.items()}
    assert ranks.run(_train, 1, folder, changes) == ranks.run(_train, 1, folder, {})


def test_recomputed_activations_give_the_same_numbers_under_tensor_and_pipeline_parallelism(ranks, model_folder):
    folder = str(model_folder("gqa"))
    layout = {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2}
    changes = {f"model__{name}": value for name, value in FULL.items()}
    assert ranks.run(_train, 4, folder, layout | changes) == ranks.run(_train, 4, folder, layout)


@pytest.mark.parametrize("world", [1, 2])
def test_the_mean_over_tokens_is_that_over_microbatches_when_all_tokens_count(world, ranks, model_folder):
    """Of the trainer's own data, which leaves nothing out, it is not chosen."""
    folder = str(model_folder("gqa"))
    mock = {"dataset": DatasetConfig(sequence_length=small.SEQUENCE, num_workers=0)}
    (losses, norms), *_ = ranks.run(_train, world, folder, {"model__calculate_per_token_loss": True, **mock})
    (plain_losses, plain_norms), *_ = ranks.run(_train, world, folder, mock)
    assert losses == pytest.approx(plain_losses, abs=CLOSE)
    assert norms == pytest.approx(plain_norms, rel=CLOSE)


def _by_transformers(folder):
    """The mean over all tokens that count in the global batch, with AdamW: losses and gradient norms."""
    from transformers import AutoModelForCausalLM

    from tests.trainer.test_parity import rate_of

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in model.parameters() if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    samples = SomeCount(model.config.vocab_size).build(None, 0, (10**6, 0, 0))[0]
    losses, norms = [], []
    for step in range(STEPS):
        batch = [samples[step * BATCH + i] for i in range(BATCH)]
        tokens, labels, mask = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels", "loss_mask"))
        each = torch.nn.functional.cross_entropy(model(tokens).logits.transpose(1, 2), labels, reduction="none")
        loss = (each * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, steps=STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize(
    "changes",
    [{}, {"ddp__use_distributed_optimizer": True}, {"train__micro_batch_size": 1}],
    ids=["dp2", "distributed", "micro1"],
)
def test_where_a_dataset_leaves_tokens_out_the_mean_is_over_all_that_count_in_the_global_batch(changes, ranks, model_folder):
    """A dataset of one's own needs to say nothing: its loss mask is enough, at any micro batch size."""
    folder = str(model_folder("gqa"))
    losses, norms = _by_transformers(folder)
    for actual, actual_norms in ranks.run(_train, 2, folder, changes, True):
        assert actual == pytest.approx(losses, abs=CLOSE)
        assert actual_norms == pytest.approx(norms, rel=1e-3)


def _without_a_count(folder):
    """A forward step whose loss function returns a mean, as megatron-core allows, and no number of tokens."""
    from trainer.loop import pretrain
    from trainer.loss import forward_step

    def step(batches, model):
        output, loss = forward_step(batches, model)

        def mean(losses):
            total, tokens, report = loss(losses)
            return total / tokens, report

        return output, mean

    pretrain(small.settings(Path(folder)), step)


def test_a_loss_function_that_counts_no_tokens_is_refused_where_gradients_are_divided_by_them(ranks, model_folder):
    with pytest.raises(UserError) as refused:
        ranks.run(_without_a_count, 1, str(model_folder("gqa")))
    assert str(refused.value) == (
        "the loss function of the forward step returns `2` values, and with `model.calculate_per_token_loss=True` it must "
        "return `3`\n\nhint: return the loss summed over the tokens that count, their number, and what to report: "
        "`trainer.loss.masked_sum`"
    )


def test_the_choice_of_the_mean_is_told_with_its_reason():
    from trainer.recipes import llama_tiny
    from trainer.settings.resolve import resolve

    config = llama_tiny.pretrain_config()
    config.dataset.eod_mask_loss = True
    resolved = resolve(config, world_size=1, device="cpu")
    (choice,) = [explanation for explanation in resolved.explanations if explanation.setting == "model.calculate_per_token_loss"]
    assert (choice.value, resolved.config.model.calculate_per_token_loss) == (True, True)
    assert choice.why == (
        "`dataset.eod_mask_loss` leaves out what follows the end of a document: the mean is over those that count in the whole "
        "batch"
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "distributed"])
def test_bf16_learns_on_a_cpu(sharded, ranks, model_folder):
    for losses in ranks.run(_in_bf16, 2, str(model_folder("gqa")), sharded):
        assert losses[-1] < losses[0] - 0.3


def _in_bf16(folder, sharded):
    from trainer.loop import pretrain

    config = small.settings(Path(folder), ddp__use_distributed_optimizer=sharded)
    config.mixed_precision, history = "bf16_mixed", small.History()
    pretrain(config, callbacks=[history])
    return history.losses


def test_batched_messages_between_two_stages_with_virtual_ones_are_refused(model_folder):
    from trainer.settings.resolve import resolve

    config = small.settings(
        model_folder("gqa"),
        model__pipeline_model_parallel_size=2,
        model__virtual_pipeline_model_parallel_size=2,
        comm_overlap__batch_p2p_comm=True,
    )
    with pytest.raises(UserError) as refused:
        resolve(config, world_size=2, device="cpu")
    assert str(refused.value) == (
        "`comm_overlap.batch_p2p_comm=true` gives wrong gradients with `2` pipeline stages and `2` virtual stages: the previous "
        "and the next rank are the same, and batched messages between them are mixed up\n\n"
        "hint: leave it out, and messages overlap with computation"
    )
