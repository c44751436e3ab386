"""The loss of layers of multi-token prediction (MTP), and what it does to weights, beside transformers' `MtpModel`."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from converter import hf_to_mcore, mcore_to_hf
from formats.errors import UserError
from tests import megatron_cpu
from tests.converter import prediction
from tests.family_models import build
from tests.megatron_cpu import load_strictly
from tests.models import model_tree
from tests.trainer import small
from trainer.settings import architecture
from trainer.settings.checks import check_packed
from trainer.settings.precision import Machine

SEQUENCE, LAYERS, FACTOR = 24, 2, 0.3
OWN = {"enorm": "enorm", "eh_proj": "eh_proj", "mtp_model_layer.input_layernorm": "mtp_block.input_layernorm"}
"""Modules whose gradients are compared: megatron-core's names and transformers'."""


def batch() -> dict[str, torch.Tensor]:
    """Two rows, of which some tokens do not count."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 384, (2, SEQUENCE + 1), generator=generator)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": (torch.rand(2, SEQUENCE, generator=generator) > 0.3).float(),
        "position_ids": torch.arange(SEQUENCE)[None].expand(2, -1),
        "attention_mask": torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1),
    }


def trained(rank: int, config: dict, iteration: str) -> tuple[Any, ...]:
    """The loss of one microbatch, those of the layers ahead, and gradients by name."""
    from trainer import cpu_backend

    with cpu_backend.activate():  # for the streams of token dispatchers
        return _trained(config, iteration)


def _trained(config: dict, iteration: str) -> tuple[Any, ...]:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from trainer.loss import forward_step

    (chunk,) = build(config, mtp_loss_scaling_factor=FACTOR)
    load_strictly([chunk], iteration)
    output, loss_function = forward_step(iter([batch()]), chunk.train())
    total, tokens, _ = loss_function(output)
    (total / tokens).backward()
    layers = enumerate(chunk.mtp.layers)
    gradients = {f"{number}.{name}": layer.get_submodule(name).weight.grad for number, layer in layers for name in OWN}
    gradients |= {"embedding": chunk.embedding.word_embeddings.weight.grad, "output": chunk.output_layer.weight.grad}
    return (total / tokens).item(), MTPLossLoggingHelper.tracker["loss_values"].tolist(), gradients


def expected(folder: Any) -> tuple[Any, ...]:
    """The same of transformers' layers: a loss for each, of the tokens that count, beside the model's own."""
    main, further = prediction.opened(folder, LAYERS)
    given = batch()
    labels, mask, losses = given["labels"], given["loss_mask"], []
    for logits in prediction.logits(main, further, given["tokens"]):
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        losses.append((each * mask).sum() / mask.sum())
        labels, mask = (torch.nn.functional.pad(tensor[:, 1:], (0, 1)) for tensor in (labels, mask))
    (losses[0] + FACTOR / LAYERS * sum(losses[1:])).backward()
    layers = enumerate(further.layers)
    gradients = {
        f"{number}.{name}": layer.get_submodule(own).weight.grad for number, layer in layers for name, own in OWN.items()
    }
    gradients |= {"embedding": main.get_input_embeddings().weight.grad, "output": main.lm_head.weight.grad}
    return losses[0].item(), [loss.item() for loss in losses[1:]], gradients


def test_losses_and_gradients_are_those_of_transformers_layers(ranks, tmp_path) -> None:
    folder = prediction.save(tmp_path / "hf", *prediction.made("deepseek_v3", LAYERS))
    hf_to_mcore(folder, tmp_path / "m")
    config, iteration = json.loads((folder / "config.json").read_text()), str(tmp_path / "m" / "iter_0000000")
    ((loss, ahead, gradients),) = megatron_cpu.Ranks(ranks).run(trained, 1, config, iteration)
    own, further, theirs = expected(folder)
    assert loss == pytest.approx(own, rel=1e-5)
    assert ahead == pytest.approx(further, rel=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with one layer of multi-token prediction."""
    return prediction.save(tmp_path_factory.mktemp("prediction") / "hf", *prediction.made("deepseek_v3"))


PP2 = {"model__pipeline_model_parallel_size": 2}
FEW = {"train__train_iters": 4, "scheduler__lr_warmup_iters": 0, "model__moe_router_bias_update_rate": 0.0}


def test_steps_are_the_same_in_one_stage_and_in_two(folder, ranks) -> None:
    """At PP2 the last stage has an embedding of its own, which stays that of the first."""
    (whole,) = ranks.run(small.train, 1, str(folder), FEW)
    assert len(set(whole.losses)) == 4
    for history in ranks.run(small.train, 2, str(folder), {**FEW, **PP2}):
        assert history.losses == pytest.approx(whole.losses, abs=1e-4)
        assert history.grad_norms[:2] == pytest.approx(whole.grad_norms[:2], rel=1e-4)


def test_what_a_run_saves_is_exported_with_its_layers_and_their_copies(folder, ranks, tmp_path) -> None:
    still = {**FEW, "train__train_iters": 1, "optimizer__lr": 0.0, "optimizer__min_lr": 0.0}
    ranks.run(small.train, 2, str(folder), {**still, "checkpoint__save": str(tmp_path / "run"), **PP2})
    mcore_to_hf(tmp_path / "run", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_packed_rows_are_refused_on_the_cpu(folder) -> None:
    config = small.settings(folder, dataset=SimpleNamespace(packed=True, sequence_length=32))
    with pytest.raises(UserError, match=r"`model\.mtp_num_layers` is `1`, and on the CPU tokens ahead would be those of other"):
        check_packed(config, Machine("cpu"))


GROUPS = {"moe_router_group_score": 2, "moe_router_num_groups": 4, "moe_router_group_topk": 2}


@pytest.mark.parametrize(("fields", "message"), [
    ({**GROUPS, "moe_router_fusion": True}, "the fused kernel does not rate groups by their `2` best experts"),
    ({**GROUPS, "moe_router_num_groups": None, "moe_router_group_topk": None}, "`model.moe_router_num_groups` is `None`"),
])  # fmt: skip
def test_groups_that_the_router_would_rate_otherwise_are_refused(folder, fields, message) -> None:
    config = small.settings(folder, **{f"model__{name}": value for name, value in fields.items()})
    with pytest.raises(UserError, match=message):
        architecture.check(config)
