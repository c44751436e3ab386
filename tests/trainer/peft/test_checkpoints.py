"""A run of adapters: what it saves, how it goes on, and which model it belongs to."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from formats.errors import UserError
from tests.trainer import witness

STEPS, STOPPED = 8, 3
TP2 = {"model__tensor_model_parallel_size": 2}
PP2 = {"model__pipeline_model_parallel_size": 2}
DISTRIBUTED = {"ddp__use_distributed_optimizer": True}
PLAN = {"train__train_iters": STEPS, "validation__eval_iters": 1, "validation__eval_interval": 2, "logger__log_interval": 2}


def _method(kind, **settings):
    from trainer.peft import DoRA, LoRA

    return {"lora": LoRA, "dora": DoRA}[kind](**{"dim": 4, "alpha": 8, **settings})


@pytest.fixture
def run(ranks, model_folder):
    """Train adapters, with `PLAN` and these changes, on the ranks of a layout."""

    def train(world, changes, variant="gqa"):
        return ranks.run(witness.train, world, str(model_folder(variant)), {**PLAN, **changes})

    return train


def _there(folder):
    return {"checkpoint__save": str(folder), "checkpoint__load": str(folder)}


@pytest.mark.parametrize(
    ("kind", "world", "changes"),
    [
        ("lora", 1, {}),
        ("dora", 2, TP2),
        ("lora", 2, {**PP2, "checkpoint__async_save": True}),
        ("dora", 2, DISTRIBUTED),
    ],
)
def test_adapters_resume_bit_for_bit(kind, world, changes, run, tmp_path):
    changes = {**changes, "peft": _method(kind, dropout=0.1, canonical=kind == "lora", lora_plus_ratio=4.0)}
    whole = run(world, changes)
    run(world, {**changes, **_there(tmp_path), "train__exit_interval": STOPPED})
    for expected, actual in zip(whole, run(world, {**changes, **_there(tmp_path)}), strict=True):
        assert actual.losses == expected.losses[STOPPED:]
        assert actual.grad_norms == expected.grad_norms[STOPPED:]
        assert actual.rates == expected.rates[STOPPED:]
        assert witness.differences(expected.left, actual.left) == []


@pytest.mark.parametrize(
    ("before", "after"), [((1, {}), (2, TP2)), ((2, {**TP2, **DISTRIBUTED}), (2, {**PP2, **DISTRIBUTED})), ((2, PP2), (2, {}))]
)
def test_adapters_go_on_at_another_layout(before, after, run, tmp_path):
    changes = {"peft": _method("dora")}
    (whole,) = run(1, changes)
    run(before[0], {**changes, **before[1], **_there(tmp_path), "train__exit_interval": STOPPED})
    for resumed in run(after[0], {**changes, **after[1], **_there(tmp_path)}):
        assert resumed.losses == pytest.approx(whole.losses[STOPPED:], abs=1e-4)  # fp32 sums in another order
        assert resumed.grad_norms == pytest.approx(whole.grad_norms[STOPPED:], rel=1e-4)


def test_a_checkpoint_holds_adapters_alone_and_names_its_base(run, model_folder, tmp_path):
    from converter.adapters.fingerprint import fingerprint
    from formats.folder import LocalFolder
    from formats.torch_dist import TorchDistReader

    run(2, {**TP2, "peft": _method("lora", target_modules=["*.layers.1.*.linear_proj", "linear_fc1"]), **_there(tmp_path)})
    base = model_folder("gqa")
    iteration = tmp_path / f"iter_{STEPS:07d}"
    description = json.loads((iteration / "adapter.json").read_text())
    assert description["base"] == {"name": str(base), "fingerprint": fingerprint(str(base))}
    reader = TorchDistReader(LocalFolder(iteration))
    modules = {"decoder.layers.1.self_attention.linear_proj", *(f"decoder.layers.{n}.mlp.linear_fc1" for n in range(4))}
    assert set(reader.specs) == {f"{module}.adapter.linear_{end}.weight" for module in modules for end in ("in", "out")}
    reader.close()


def test_the_base_is_found_from_every_folder(model_folder, monkeypatch):
    from converter.adapters.adapter import base_name

    folder = model_folder("gqa")
    monkeypatch.chdir(folder.parent)
    assert base_name(folder.name) == str(folder)
    assert base_name("org/name") == "org/name"


def test_a_resumed_run_has_the_tokenizer_that_its_checkpoint_carries(run, model_folder, tmp_path):
    from tests.trainer.small import settings
    from trainer.checkpoints.contents import tokenizer_of, tokenizer_of_run

    folder = model_folder("gqa")
    run(1, {"peft": _method("lora"), **_there(tmp_path), "train__exit_interval": 1})
    config = settings(folder, checkpoint__pretrained_checkpoint=None, checkpoint__load=str(tmp_path))
    config.model.hf_source = None
    tokenizer = tokenizer_of_run(config)
    assert tokenizer is not None
    assert tokenizer.encode("some words") == tokenizer_of(str(folder)).encode("some words")


def test_a_trained_adapter_says_in_peft_what_it_says_here(run, model_folder, tmp_path):
    """Loss of the held-out samples, by PEFT on transformers' model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from converter.adapters.convert import adapter_to_hf
    from tests.trainer.small import FixedTokens

    (seen,) = run(1, {"peft": _method("dora", canonical=True), "checkpoint__save": str(tmp_path / "run")})
    adapter_to_hf(str(tmp_path / "run"), str(tmp_path / "peft"))
    base = AutoModelForCausalLM.from_pretrained(model_folder("gqa"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    _, held_out, _ = FixedTokens(384).build(None, 384, (0, 4, 0))
    batch = {name: torch.stack([held_out[number][name] for number in range(4)]) for name in ("tokens", "labels")}
    with torch.no_grad():
        logits = model(batch["tokens"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert dict(seen.evaluations)["validation"] == pytest.approx(loss.item(), abs=1e-4)
    assert seen.losses[-1] < seen.losses[0]


def test_a_run_starts_from_peft_s_adapters(run, model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from converter.adapters.convert import adapter_to_mcore
    from tests.trainer.small import FixedTokens

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder("gqa"), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    adapter_to_mcore(str(tmp_path / "peft"), str(tmp_path / "adapter"), base=str(model_folder("gqa")))
    train, _, _ = FixedTokens(384).build(None, 384, (4, 0, 0))
    batch = {name: torch.stack([train[number][name] for number in range(4)]) for name in ("tokens", "labels")}
    with torch.no_grad():
        logits = model(batch["tokens"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    changes = {"peft": _method("lora", canonical=True), "checkpoint__pretrained_adapter": str(tmp_path / "adapter")}
    for world, layout in ((1, {}), (2, TP2), (2, PP2)):
        assert run(world, {**changes, **layout})[0].losses[0] == pytest.approx(loss.item(), abs=1e-5)


def _refusal(run, changes):
    with pytest.raises(UserError) as caught:
        run(1, changes)
    return str(caught.value)


def test_what_does_not_belong_together_is_refused(run, model_folder, tmp_path):
    changes = {"peft": _method("lora"), **_there(tmp_path)}
    run(1, {**changes, "train__exit_interval": STOPPED})
    other = shutil.copytree(model_folder("gqa"), tmp_path / "other")
    _nudge(other / "model.safetensors")
    assert "is another model" in _refusal(run, {**changes, "checkpoint__pretrained_checkpoint": str(other)})
    assert "holds adapters, and `peft` is `none`" in _refusal(run, {**changes, "peft": None})
    assert "was trained with `alpha` `8`, and `peft` has `4`" in _refusal(run, {**changes, "peft": _method("lora", alpha=4)})
    assert "was trained with `method` `lora`, and `peft` has `dora`" in _refusal(run, {**changes, "peft": _method("dora")})
    fewer = {**changes, "peft": _method("lora", target_modules=["linear_qkv"])}
    assert "which the model does not have" in _refusal(run, fewer)
    assert "cannot be resumed from" in _refusal(run, {**changes, "peft": _method("lora", lora_plus_ratio=4.0)})
    nowhere = {"peft": _method("lora"), "checkpoint__save": str(tmp_path / "new"), "checkpoint__pretrained_checkpoint": None}
    assert "adapters of random weights cannot be saved" in _refusal(run, nowhere)
    named = {"peft": _method("lora"), "checkpoint__pretrained_checkpoint": str(tmp_path)}
    assert "is an adapter without its model" in _refusal(run, named)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    theirs = {"peft": _method("lora"), "checkpoint__pretrained_adapter": str(tmp_path / "peft")}
    assert "is a PEFT adapter" in _refusal(run, theirs)
    without = {"peft": None, "checkpoint__pretrained_adapter": str(tmp_path)}
    assert "`peft` is `none`" in _refusal(run, without)
    ill = {"peft": _method("lora", target_modules=["linear_fc1"]), "checkpoint__pretrained_adapter": str(tmp_path)}
    assert "which the model does not have" in _refusal(run, ill)


def _nudge(file):
    """A model that one layer's training has changed a little."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
