"""A trainer's checkpoint is a Megatron checkpoint that exports to Hugging Face with nothing else at hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import converter
from converter.adapters.fingerprint import fingerprint
from tests import models
from tests.trainer import small, witness

TP2_PP2 = {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2}
VPP2 = {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "assets/logo.svg")


def _loss(folder, batches):
    """transformers' loss over the validation samples."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = small.FixedTokens(model.config.vocab_size).build(None, 0, (0, 100, 0))[1]
    tokens, labels = (torch.stack([samples[i][name] for i in range(batches * small.BATCH)]) for name in ("tokens", "labels"))
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).item()


@pytest.mark.parametrize("case", ["tp2_pp2", "vpp2"])
def test_the_exported_model_has_the_validation_loss_and_the_sources_own_files(case, ranks, tmp_path):
    world, layout, variant = {"tp2_pp2": (4, TP2_PP2, "padded_vocab"), "vpp2": (2, VPP2, "tied")}[case]
    source = models.save(models.build(variant), tmp_path / "source")
    side = {name: (source / name).read_bytes() for name in SIDE_FILES}
    changes = {**layout, "checkpoint__save": str(tmp_path / "run"), "train__train_iters": 6, "validation__eval_iters": 2}
    if case == "vpp2":  # what travelled with a Megatron checkpoint travels on
        converter.hf_to_mcore(source, tmp_path / "megatron", tp=2, pp=1)
        changes["checkpoint__pretrained_checkpoint"] = str(tmp_path / "megatron")
    (seen, *_) = ranks.run(witness.train, world, str(source), changes)
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "megatron", ignore_errors=True)
    converter.mcore_to_hf(tmp_path / "run", tmp_path / "exported")
    assert _loss(tmp_path / "exported", 2) == pytest.approx(dict(seen.evaluations)["validation"], abs=1e-4)
    assert {name: (tmp_path / "exported" / name).read_bytes() for name in SIDE_FILES} == side


def _save_at_once(folder, changes):
    """Start a run, save it untrained, and load that strictly with megatron-core; whether a weight differs."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from trainer.loop import pretrain, save
    from trainer.model import unwrap

    differ = []

    class AtOnce(small.History):
        def on_start(self, run):
            save(run)
            run.saver.finish()
            chunks = [unwrap(chunk) for chunk in run.chunks]
            before = [{name: parameter.clone() for name, parameter in chunk.named_parameters()} for chunk in chunks]
            states = {str(n): chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}
            loaded = dist_checkpointing.load(states, str(run.saver.last_good), strict=StrictHandling.RAISE_UNEXPECTED)
            for n, weights in enumerate(before):
                differ.extend(name for name, weight in weights.items() if not torch.equal(loaded[str(n)][name], weight))

    pretrain(small.settings(Path(folder), **changes), callbacks=[AtOnce()])
    return differ


def test_what_is_saved_before_the_first_step_is_the_source(ranks, model_folder, tmp_path):
    changes = {**TP2_PP2, "checkpoint__save": str(tmp_path / "run"), "train__exit_interval": 1}
    assert ranks.run(_save_at_once, 4, str(model_folder()), changes) == [[]] * 4
    assert converter.verify(model_folder(), tmp_path / "run" / "iter_0000000").same
    assert fingerprint(tmp_path / "run") == fingerprint(model_folder())


def test_megatron_bridge_finds_what_it_reads(ranks, model_folder, tmp_path, golden):
    import yaml

    ranks.run(witness.train, 1, str(model_folder()), {"checkpoint__save": str(tmp_path), "train__train_iters": 5})
    assert fingerprint(tmp_path) != fingerprint(model_folder()), "five steps make another model of it"
    theirs = next(golden.glob("bridge_llama_tiny/megatron/**/train_state.pt"))
    ours = tmp_path / "iter_0000005" / "train_state.pt"
    read = [torch.load(path, weights_only=True) for path in (ours, theirs)]
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in read[0].items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in read[1].items()
    }
    assert (read[0]["step"], read[0]["consumed_train_samples"]) == (5, 5 * small.BATCH)
    assert (tmp_path / "latest_train_state.pt").read_bytes() == ours.read_bytes()
    assert "model" in yaml.safe_load((ours.parent / "run_config.yaml").read_text())


def _from_scratch(root):
    from trainer import arguments, loop

    words = [
        "model.num_layers=3",  # not what the recipe's `config.json` says
        "train.train_iters=2",
        "train.micro_batch_size=1",
        "train.global_batch_size=2",
        "dataset.sequence_length=16",
        "dataset.num_workers=0",
        "validation.eval_iters=0",
        f"checkpoint.save={root}",
    ]
    loop.pretrain(arguments.read_run("llama_tiny", config_file=None, overrides=words))


def test_a_model_from_scratch_exports_with_its_tokenizer(ranks, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ranks.run(_from_scratch, 1, str(tmp_path / "run"))
    converter.mcore_to_hf(tmp_path / "run", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "Grüße, 世界!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), 257)
