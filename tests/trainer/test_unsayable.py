"""What a run trains and no `config.json` can say is told of, kept in `run_config.yaml`, and never exported as a plain model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from converter import UserError, mcore_to_hf
from trainer.arguments import read_run
from trainer.settings.resolve import resolve

NOTE = "which no `config.json` can say: checkpoints have none, and `mbconvert mcore-to-hf` refuses them"
SETTINGS = {
    "rotary_interleaved": True, "softmax_scale": 5.0, "no_rope_freq": [1, 0, 1, 0], "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0, "qk_l2_norm": True, "layernorm_zero_centered_gamma": True,
    "softmax_type": "off-by-one",
}  # fmt: skip


def resolved(*overrides: str):
    return resolve(read_run("llama_tiny", overrides=overrides), world_size=1, device="cpu")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_says_at_its_start_what_its_checkpoints_cannot(name: str) -> None:
    value = SETTINGS[name]
    assert not resolved().warnings
    warnings = resolved(f"model.{name}={json.dumps(value)}").warnings
    assert warnings == (f"`model.{name}` is `{'[1, 0, 1, 0]' if name == 'no_rope_freq' else value}`, {NOTE}",)


def train(root: str, *words: str) -> list[str]:
    """One step; what the run said on the way."""
    from trainer import loop

    messages: list[str] = []
    small = [
        "model.num_layers=2", "train.train_iters=1", "train.micro_batch_size=1", "train.global_batch_size=1",
        "dataset.sequence_length=16", "dataset.num_workers=0", "validation.eval_iters=0", f"checkpoint.save={root}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module in ("trainer.loop", "trainer.setup"):
            patch.setattr(f"{module}.say", messages.append)
        loop.pretrain(read_run("llama_tiny", overrides=[*small, *words]))
    return messages


def refusal(act, *arguments) -> str:
    with pytest.raises(UserError) as error:
        act(*arguments)
    return str(error.value)


def train_and_go_on(root: str) -> list[str]:
    """From checkpoints of what no `config.json` says: with the same settings, without them, and the reverse."""
    train(f"{root}/special", "model.rotary_interleaved=true", "model.softmax_scale=0.5")
    train(f"{root}/nothing", "model.rotary_interleaved=true", "~model.hf_config")
    train(f"{root}/plain")
    start = "checkpoint.pretrained_checkpoint="
    train(f"{root}/again", "model.rotary_interleaved=true", "model.softmax_scale=0.5", f"{start}{root}/special")
    train(f"{root}/special", f"checkpoint.load={root}/special", "model.rotary_interleaved=true", "model.softmax_scale=0.5")
    resumed = refusal(train, f"{root}/special", f"checkpoint.load={root}/special", "model.softmax_scale=0.5")
    without = refusal(train, f"{root}/none", "model.rotary_interleaved=true", f"{start}{root}/special")
    return [resumed, without, *train(f"{root}/new", "model.rotary_interleaved=true", f"{start}{root}/plain")]


def test_what_no_config_json_says_is_kept_and_never_exported_or_forgotten(ranks, tmp_path: Path) -> None:
    [[resumed, without, *notes]] = ranks.run(train_and_go_on, 1, str(tmp_path))
    assert without == (
        f"`model.softmax_scale` is `None`, and the weights at `{tmp_path}/special` were made with `0.5`\n\n"
        "hint: set `model.softmax_scale=0.5`, or name other weights"
    )
    assert resumed == (
        f"`model.rotary_interleaved` is `False`, and the weights at `{tmp_path}/special/iter_0000001` were made with `True`\n\n"
        "hint: set `model.rotary_interleaved=True`, or name other weights"
    )
    assert "note: `model.rotary_interleaved` is `True`; the weights were made without" in notes
    mcore_to_hf(tmp_path / "plain", tmp_path / "exported")
    for name in ("special", "nothing", "again", "new"):
        iteration = tmp_path / name / "iter_0000001"
        assert not (iteration / "huggingface" / "files" / "config.json").exists()
        assert yaml.safe_load((iteration / "run_config.yaml").read_text())["model"]["rotary_interleaved"] is True
        for given in (None, tmp_path / "exported"):
            with pytest.raises(
                UserError, match=r"`run_config.yaml` has `(rotary_interleaved: True|softmax_scale: 0.5)`, which no"
            ):
                mcore_to_hf(tmp_path / name, tmp_path / "out", hf_config=given)
