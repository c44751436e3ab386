"""Generated text is transformers': token for token without sampling, by the same distributions with it."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.errors import UserError
from tests.programs import run_module
from tests.trainer import small
from trainer.generation.sampling import NOT_FINITE, Sampling, filter_logits, sample_token

NEW = 24
PROMPTS = ["Tiny real models", "a tokenizer trained on the spot, saved as people save them", "from"]
TP2 = ("model.tensor_model_parallel_size=2",)
PP2 = ("model.pipeline_model_parallel_size=2",)
LAYOUTS = {
    "tp1": (1, ()),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "vpp2": (2, (*PP2, "model.virtual_pipeline_model_parallel_size=2")),
    "tp2_pp2": (4, (*TP2, *PP2)),
}


def answers(source: str, overrides: tuple[str, ...] = (), options: dict[str, Any] | None = None) -> Any:
    """Of this rank of an open world: what is generated, where it is the rank that speaks; what is wrong, if anything."""
    from trainer import parallel
    from trainer.generation import checkpoint

    options = dict(options or {})
    prompts, pieces, generated = options.pop("prompts", PROMPTS), [], []
    try:
        settings = checkpoint.make_run(source, ("dist.device=cpu", *overrides), world_size=parallel.world_size())
        checkpoint.run(
            source,
            lambda: prompts,
            settings=settings,
            max_new_tokens=options.pop("max_new_tokens", NEW),
            sampling=Sampling(**options),
            tell=pieces.append,
            done=lambda answers, _: generated.extend(asdict(answer) for answer in answers),
        )
    except UserError as error:
        return str(error)
    assert "".join(pieces) == "".join(answer["text"] for answer in generated)
    return generated


def transformers_tokens(folder: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    generated = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        generated.append(tokens[0, asked.shape[1] :].tolist())
    return generated


def tokens(generated: Any) -> list[list[int]]:
    return [answer["tokens"] for answer in generated]


def copied(folder: Path, target: Path, **changes: dict[str, Any]) -> Path:
    """A model directory with other values in its JSON files; None takes one out."""
    shutil.copytree(folder, target)
    for name, values in changes.items():
        file = target / f"{name}.json"
        document = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return target


@pytest.mark.parametrize(
    ("variant", "layouts"),
    [
        ("gqa", tuple(LAYOUTS)),
        ("padded_vocab", ("tp1", "tp2")),  # the vocabulary is divided among tensor-parallel ranks
        ("tied", ("tp1", "pp2")),  # embeddings are on the first stage and the last
        ("rope31", ("tp1",)),
    ],
)
def test_without_sampling_the_tokens_are_those_of_transformers(variant, layouts, ranks, model_folder):
    folder = model_folder(variant)
    expected = transformers_tokens(folder)
    for world, overrides in (LAYOUTS[name] for name in layouts):
        generated = ranks.run(answers, world, str(folder), overrides)[-1]
        assert tokens(generated) == expected
        assert [answer["prompt"] for answer in generated] == PROMPTS
        assert not any(answer["finished"] for answer in generated)


def test_a_sliding_window_holds_for_kept_keys_too(ranks, model_folder):
    folder = model_folder("gqa", family="mistral", sliding_window=8)
    (generated,) = ranks.run(answers, 1, str(folder))
    assert tokens(generated) == transformers_tokens(folder)


def test_a_converted_checkpoint_and_a_trained_one_go_on_as_the_directory_does(ranks, model_folder, tmp_path):
    from converter.convert import hf_to_mcore

    folder = model_folder("padded_vocab")
    expected = transformers_tokens(folder)
    hf_to_mcore(folder, tmp_path / "converted", tp=2)
    # A step that changes nothing, so that what was saved is known.
    rate = {"optimizer__lr": 0.0, "optimizer__min_lr": 0.0, "train__train_iters": 1, "scheduler__lr_warmup_iters": 0}
    ranks.run(
        small.train,
        2,
        str(folder),
        {**rate, "checkpoint__save": str(tmp_path / "trained"), "model__tensor_model_parallel_size": 2},
    )
    for name in ("converted", "trained"):
        (generated,) = ranks.run(answers, 1, str(tmp_path / name))
        assert tokens(generated) == expected


def test_a_seed_gives_the_same_text_at_every_layout(ranks, model_folder):
    folder = str(model_folder("padded_vocab"))
    how = {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "seed": 7}
    by_layout = [tokens(ranks.run(answers, world, folder, overrides, how)[-1]) for world, overrides in LAYOUTS.values()]
    assert all(rows == by_layout[0] for rows in by_layout)
    assert tokens(ranks.run(answers, 1, folder, (), {**how, "seed": 8})[0]) != by_layout[0]
    # A prompt's text does not depend on the others.
    assert tokens(ranks.run(answers, 1, folder, (), {**how, "prompts": PROMPTS[:1]})[0]) == by_layout[0][:1]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.3, "top_k": 10},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 2.0, "top_p": 1.0},
        {"temperature": 1.1, "top_k": 40, "top_p": 0.5},
    ],
)
def test_what_is_sampled_from_is_what_transformers_samples_from(how):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    made = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 4 * torch.randn(389, generator=made)
        logits[100:110] = logits[0]  # as likely as each other
        expected = TemperatureLogitsWarper(how["temperature"])(None, logits[None])
        if "top_k" in how:
            expected = TopKLogitsWarper(how["top_k"])(None, expected)
        if "top_p" in how:
            expected = TopPLogitsWarper(how["top_p"])(None, expected)
        assert torch.equal(filter_logits(logits, Sampling(**how)), expected[0])


def test_tokens_come_as_often_as_they_are_likely():
    logits, draws = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    how = Sampling(temperature=1.0, top_k=3)
    counts = torch.bincount(torch.tensor([sample_token(logits, how, draws) for _ in range(4000)]), minlength=4)
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    # Four standard deviations of a binomial share are at most 4 · √(0.25 / 4000).
    assert torch.allclose(counts[:3] / 4000, expected, atol=0.032)
    assert counts[3] == 0


def test_logits_that_are_no_numbers_choose_nothing():
    assert sample_token(torch.tensor([0.0, torch.nan]), Sampling(), torch.Generator()) == NOT_FINITE


@pytest.mark.parametrize("name", ["generation_config", "tokenizer_config"])
def test_a_text_ends_where_the_files_of_the_model_say(name, ranks, model_folder, tmp_path):
    expected = transformers_tokens(model_folder("gqa"))[1]
    end = expected[1]
    from tokenizers import Tokenizer

    word = Tokenizer.from_file(str(model_folder("gqa") / "tokenizer.json")).id_to_token(end)
    changes = {"eos_token_id": [2, end]} if name == "generation_config" else {"eos_token": word}
    folder = copied(model_folder("gqa"), tmp_path / "model", **{name: changes})
    (generated,) = ranks.run(answers, 1, str(folder), (), {"prompts": PROMPTS[1:2]})
    assert generated[0]["tokens"] == expected[:1]
    assert generated[0]["finished"]


def test_a_text_ends_with_the_longest_sequence_of_the_model(ranks, model_folder):
    (generated,) = ranks.run(answers, 1, str(model_folder("gqa")), (), {"prompts": ["from " * 250], "max_new_tokens": 100})
    assert len(generated[0]["tokens"]) == 6
    assert not generated[0]["finished"]


def test_what_a_tokenizer_begins_texts_with_is_put_before_prompts(ranks, model_folder, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = copied(model_folder("gqa"), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (generated,) = ranks.run(answers, 1, str(folder))
    assert tokens(generated) == transformers_tokens(folder) != transformers_tokens(model_folder("gqa"))


def test_an_empty_prompt_begins_with_the_token_that_the_model_names(ranks, model_folder):
    (generated,) = ranks.run(answers, 1, str(model_folder("gqa")), (), {"prompts": ["", "<s>"]})
    assert generated[0]["tokens"] == generated[1]["tokens"]


def test_a_prompt_that_is_too_long_is_told_with_both_lengths(ranks, model_folder):
    message = (
        "prompt 2 has `256` tokens, and the model's longest sequence is `256`\n\n"
        "hint: shorten it to 255 tokens or fewer: generated tokens count too"
    )
    assert ranks.run(answers, 2, str(model_folder("gqa")), PP2, {"prompts": ["from", "from " * 256]}) == [message, message]


def test_an_empty_prompt_needs_a_token_to_begin_with(ranks, model_folder, tmp_path):
    folder = copied(
        model_folder("gqa"), tmp_path / "model", config={"bos_token_id": None}, generation_config={"bos_token_id": None}
    )
    (message,) = ranks.run(answers, 1, str(folder), (), {"prompts": [""]})
    assert message == "prompt 1 is empty, and the tokenizer has no begin token\n\nhint: give a prompt with some text"


def test_a_model_without_a_tokenizer_says_how_to_name_one(ranks, model_folder, tmp_path):
    folder = copied(model_folder("gqa"), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (message,) = ranks.run(answers, 1, str(folder))
    assert message == f"`{folder}` has no tokenizer\n\nhint: name a folder that has one: `tokenizer.tokenizer_model=DIR`"
    (generated,) = ranks.run(answers, 1, str(folder), (f"tokenizer.tokenizer_model={model_folder('gqa')}",))
    assert tokens(generated) == transformers_tokens(model_folder("gqa"))


def test_a_tokenizer_of_another_model_is_refused(ranks, model_folder):
    (message,) = ranks.run(answers, 1, str(model_folder("gqa", vocab_size=16)))
    assert message.startswith("prompt 1 has the token id `")
    assert message.endswith(
        ", and the model's vocabulary ends at `15`\n\n"
        "hint: the tokenizer is another model's: name the right one with `tokenizer.tokenizer_model=DIR`"
    )


def test_processes_that_would_only_repeat_the_work_are_refused(ranks, model_folder):
    message = ranks.run(answers, 2, str(model_folder("gqa")))[0]
    assert message == (
        "`2` processes would hold `2` copies of the model, and prompts run one after another\n\n"
        "hint: start 1, or shard the model: `model.tensor_model_parallel_size=2`, for example"
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "`temperature` is `-1.0`\n\nhint: choose 0 or more"),
        ({"temperature": 1.0, "top_k": 0}, "`top_k` is `0`\n\nhint: choose 1 or more"),
        ({"temperature": 1.0, "top_p": 1.5}, "`top_p` is `1.5`\n\nhint: choose more than 0, and 1 at most"),
        (
            {"top_p": 0.9},
            (
                "`top_p` is `0.9`, but `temperature` is `0`, which always takes the most likely token\n\n"
                "hint: set `temperature`, for example to 1, or leave `top_p` out"
            ),
        ),
    ],
)
def test_sampling_that_means_nothing_is_refused(how, message):
    with pytest.raises(UserError) as caught:
        Sampling(**how)
    assert str(caught.value) == message


class Generating(small.History):
    """Generates at every third step, and looks at what that changed."""

    def on_step(self, run: Any, step: Any) -> None:
        super().on_step(run, step)
        if len(self.losses) % 3 == 0:
            from trainer import tokenizers
            from trainer.generation.text import generate

            before = _states(run)
            generated = generate(run.chunks, tokenizers.load(run.config.model.hf_source), PROMPTS[:2], max_new_tokens=4)
            assert all(len(answer.tokens) == 4 for answer in generated)
            assert _states(run) == before


def _states(run: Any) -> Any:
    """Random states, and everything plain that modules and their configuration hold."""
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    trackers = {name: state.tolist() for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()}
    modules = [module for chunk in run.chunks for module in chunk.modules()]
    plain = [
        [(name, value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str, type(None)))]
        for module in (*modules, run.config.model)
    ]
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), trackers, plain


def train_and_generate(folder: str, changes: dict[str, Any], history: type[small.History]) -> small.History:
    from trainer.loop import pretrain

    precision, seen = changes.pop("precision", "fp32"), history()
    # Not a multiple of three: an overlapped gather leaves weights stale after the last step, and generating completes it.
    config = small.settings(Path(folder), train__train_iters=7, **changes)
    config.mixed_precision = precision
    pretrain(config, callbacks=[seen])
    return seen


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"precision": "bf16_mixed"}),
        (2, {"ddp__use_distributed_optimizer": True, "ddp__overlap_grad_reduce": True, "ddp__overlap_param_gather": True}),
        (4, {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2}),
    ],
)
def test_training_goes_on_bit_for_bit_after_generating(world, changes, ranks, model_folder):
    folder, dropout = str(model_folder("gqa")), {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
    plain, generating = (
        ranks.run(train_and_generate, world, folder, dropout | changes, kind) for kind in (small.History, Generating)
    )
    for expected, actual in zip(plain, generating, strict=True):
        assert expected.losses == actual.losses
        assert all(torch.equal(expected.weights[name], actual.weights[name]) for name in expected.weights)


def mbtrain(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return run_module("trainer", "generate", *arguments, said=stdin, env={"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_the_command_reads_prompts_from_lines_and_writes_json(model_folder):
    folder = model_folder("gqa")
    done = mbtrain(
        str(folder), "--prompt", PROMPTS[0], "--prompt-file", "-", "--max-new-tokens", str(NEW), "--nproc", "2", "--json",
        "model.tensor_model_parallel_size=2", "dist.device=cpu", stdin=f"{PROMPTS[1]}\n\n{PROMPTS[2]}\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    generated = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in generated] == PROMPTS
    assert tokens(generated) == transformers_tokens(folder)
    assert f"{3 * NEW} tokens in" in done.stderr


def test_the_command_writes_text_alone_for_one_prompt(model_folder):
    done = mbtrain(str(model_folder("gqa")), "--prompt", PROMPTS[0], "--max-new-tokens", "4", "dist.device=cpu")
    assert done.returncode == 0, done.stderr
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(model_folder("gqa") / "tokenizer.json")).decode
    assert done.stdout == decode(transformers_tokens(model_folder("gqa"))[0][:4]) + "\n"


def test_the_command_wants_a_prompt():
    done = mbtrain("anything")
    assert done.returncode == 1
    assert done.stderr == (
        "error: there is no prompt\n\nhint: give one with `--prompt TEXT`, or several with `--prompt-file FILE`\n"
    )
