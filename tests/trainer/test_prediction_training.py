"""Layers of multi-token prediction are trained as transformers' `MtpModel` and AdamW train them, on the last pipeline stage."""

from __future__ import annotations

import pytest
import torch

from formats.errors import UserError
from tests.converter import prediction
from tests.trainer import observed, small
from tests.trainer.small import BATCH, MICRO_BATCH, STEPS
from tests.trainer.test_parity import TOLERANCE, rate_of
from trainer.settings.resolve import resolve

LAYERS, FACTOR, FEW = 2, 0.6, 5
TP2, PP2 = {"model__tensor_model_parallel_size": 2}, {"model__pipeline_model_parallel_size": 2}
EP2 = {"model__expert_model_parallel_size": 2}
LAYOUTS = {
    "one": (1, {}),
    "pp2": (2, PP2),
    "uneven": (2, {**PP2, "model__pipeline_model_parallel_layout": "Ett|ttmmL"}),
    "tp2 ep2 pp2": (4, {**TP2, **EP2, **PP2, "model__expert_tensor_parallel_size": 1}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small DeepSeek-V3 with two such layers, as it is published, in fp32."""
    main, further = prediction.made("deepseek_v3", LAYERS)
    main.config.eos_token_id = main.generation_config.eos_token_id = 2
    return prediction.save(tmp_path_factory.mktemp("prediction") / "hf", main, further)


@pytest.fixture(scope="module")
def reference(folder):
    """Losses of the model and of each further layer, step by step, as transformers and AdamW train them."""
    main, further = prediction.opened(folder, LAYERS)
    parameters = [*main.parameters(), *further.layers.parameters()]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    samples = small.FixedTokens(main.config.vocab_size).build(None, 0, (10**6, 0, 0))[0]
    curves = []
    for step in range(FEW):
        optimizer.zero_grad()
        losses = _losses(main, further, [samples[step * BATCH + number] for number in range(BATCH)])
        (losses[0] + FACTOR / LAYERS * sum(losses[1:])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, steps=STEPS)
        optimizer.step()
        curves.append([loss.item() for loss in losses])
    return list(zip(*curves, strict=True))


def _losses(main, further, batch):
    """The loss of the next token, and that of each token after it; the last tokens have none."""
    tokens, labels = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels"))
    return [
        torch.nn.functional.cross_entropy(logits[:, : labels.shape[1] - ahead].flatten(0, 1), labels[:, ahead:].flatten())
        for ahead, logits in enumerate(prediction.logits(main, further, tokens))
    ]


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=[] if layout == "pp2" else pytest.mark.slow) for layout in LAYOUTS]
)
def test_losses_of_all_layers_are_those_of_transformers_and_adamw(layout, ranks, folder, reference):
    world, changes = LAYOUTS[layout]
    settings = {"train__train_iters": FEW, "scheduler__lr_decay_iters": STEPS, "model__mtp_loss_scaling_factor": FACTOR}
    for history in ranks.run(small.train, world, str(folder), {**settings, "model__moe_router_bias_update_rate": 0.0, **changes}):
        assert history.losses == pytest.approx(reference[0], abs=TOLERANCE)
        for number, losses in enumerate(reference[1:], 1):
            assert [step[f"mtp_{number}_loss"] for step in history.layers] == pytest.approx(losses, abs=TOLERANCE)
    assert BATCH // MICRO_BATCH > 1  # losses are means over microbatches too


def test_layers_of_prediction_before_the_last_stage_are_refused():
    layout = {
        "model.mtp_num_layers": 1,
        "model.pipeline_model_parallel_size": 3,
        "model.pipeline_model_parallel_layout": "Ett|m|L",
    }
    with pytest.raises(UserError) as caught:
        resolve(observed.settings(**{**layout, "train.global_batch_size": 3}), world_size=3, device="cpu")
    assert str(caught.value) == (
        "`model.pipeline_model_parallel_layout` has layers of multi-token prediction (`m`) before the last stage\n\n"
        "hint: put them with the loss, as in `...|mL`"
    )


def test_packed_examples_on_the_cpu_are_not_predicted_from_others():
    changes = {"model.mtp_num_layers": 1, "dataset.reset_attention_mask": True, "dataset.blend": ["tokens"]}
    with pytest.raises(UserError) as caught:
        resolve(observed.settings(**changes), world_size=1, device="cpu")
    assert str(caught.value) == (
        "`model.mtp_num_layers` is `1`, and on the CPU tokens ahead would be those of other packed examples\n\n"
        "hint: set `dataset.reset_attention_mask=false`"
    )
