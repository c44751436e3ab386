"""What a run starts from: the weights of a checkpoint, all of them and to the last bit, or an error that says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import converter
from formats.errors import UserError
from tests import models
from tests.quantized import plain_of, quantize
from tests.trainer import small, witness
from trainer.checkpoints import contents

TP2, PP2 = {"model__tensor_model_parallel_size": 2}, {"model__pipeline_model_parallel_size": 2}
CASES = {
    "tp1": ("gqa", 1, {}),
    "tp2_pp2": ("padded_vocab", 4, {**TP2, **PP2}),
    "vpp2": ("gqa", 2, {**PP2, "model__virtual_pipeline_model_parallel_size": 2}),
    "tied": ("tied", 2, TP2),
    "other_padding": ("padded_vocab", 2, {**TP2, "model__make_vocab_size_divisible_by": 8}),
    "bf16": ("gqa", 1, {"mixed_precision": "bf16_mixed"}),
}


def _built(folder, changes):
    """The resolved settings of a run, and a function that builds its model anew."""
    from trainer import model
    from trainer.settings.resolve import resolve

    config = resolve(small.settings(Path(folder), **changes), world_size=_world(), device="cpu").config
    return config, lambda: model.build(config.model)


def _world():
    from trainer import parallel

    return parallel.world_size()


def _weights(chunks):
    return {
        f"{n}.{name}": parameter.detach().clone()
        for n, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


def _load_both(folder, changes, sources, megatron):
    """This rank's weights as the trainer loads each of the sources, and as megatron-core loads the checkpoint itself."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from trainer import parallel
    from trainer.checkpoints import live

    config, build = _built(folder, changes)
    with parallel.session(config, "cpu"):
        loaded, messages = [], []
        for source in sources:
            chunks = build()
            messages.append(str(live.load(chunks, source)))
            loaded.append(_weights(chunks))
        chunks = build()
        states = {f"model{n}": chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}
        strict = StrictHandling.RAISE_UNEXPECTED
        states = dist_checkpointing.load(states, str(Path(megatron) / "iter_0000000"), strict=strict)
        for n, chunk in enumerate(chunks):
            chunk.load_state_dict(states[f"model{n}"])
        return loaded, _weights(chunks), messages


@pytest.fixture(scope="module")
def megatron(model_folder, tmp_path_factory):
    """A model as the converter writes it at TP2·PP2."""
    made = {}

    def make(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("megatron") / "m"
            converter.hf_to_mcore(model_folder(variant), made[variant], tp=2, pp=2)
        return made[variant]

    return make


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_megatron_cores_own_strict_load(case, ranks, model_folder, megatron):
    variant, world, changes = CASES[case]
    converted = str(megatron(variant))
    sources = [str(model_folder(variant)), converted]
    for loaded, oracle, messages in ranks.run(_load_both, world, str(model_folder(variant)), changes, sources, converted):
        for weights in loaded:
            for name, weight in weights.items():
                rows = 389 if "embedding" in name or "output_layer" in name else None  # megatron-core leaves padding as it was
                same = (weight == oracle[name])[:rows] if world == 1 and rows else weight == oracle[name]
                assert same.all() or (rows and variant == "padded_vocab" and _equal_without_padding(weight, oracle[name])), name
        huggingface, megatrons = {"tied": (38, 26)}.get(variant, (39, 27))
        for line, count in zip(messages, (huggingface, megatrons), strict=True):
            assert line.startswith(f"loaded {count} of {count} tensors, ")


def test_a_quantized_model_is_trained_as_the_plain_one_that_it_means(ranks, model_folder, tmp_path):
    source = quantize(model_folder("gqa"), tmp_path / "q", "blocks")
    short = {"train__train_iters": 2, "scheduler__lr_warmup_iters": 0}
    (ours,) = ranks.run(small.train, 1, str(source), {**short, "checkpoint__save": str(tmp_path / "run")})
    (theirs,) = ranks.run(small.train, 1, str(plain_of(source)), short)
    assert ours.losses == theirs.losses
    assert contents.describe(str(source)).dtype == contents.describe(str(plain_of(source))).dtype
    converter.mcore_to_hf(tmp_path / "run", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def _equal_without_padding(weight, expected):
    """The last rank's rows, up to where the trainer has zeros."""
    kept = weight.abs().sum(1) > 0
    return bool((weight[kept] == expected[kept]).all())


def _refused(folder, changes, source):
    """The error, and whether a weight changed before it."""
    from trainer import parallel
    from trainer.checkpoints import live

    config, build = _built(folder, changes)
    chunks = []
    try:
        with parallel.session(config, "cpu"):
            chunks = build()
            before = _weights(chunks)
            live.load(chunks, source)
    except UserError as error:
        return str(error), error.told, bool(witness.differences(before, _weights(chunks)))


HINT = "\n\nhint: the weights are of another model than `model` describes; no weight is left random"


@pytest.mark.parametrize("form", ["huggingface", "megatron"])
def test_weights_that_do_not_fit_are_an_error_on_every_rank_before_one_changes(form, ranks, model_folder, tmp_path):
    def source(name, **changes):
        folder = models.save(models.build("gqa", **changes), tmp_path / name)
        if form == "huggingface":
            return str(folder)
        converter.hf_to_mcore(folder, tmp_path / f"{name}_megatron", tp=1, pp=1)
        return str(tmp_path / f"{name}_megatron")

    short, long = source("short", num_hidden_layers=3), source("long", num_hidden_layers=5)
    wide = source("wide", intermediate_size=128)
    third, fifth = (
        f"`decoder.layers.{number}.mlp.linear_fc1.layer_norm_weight`, `decoder.layers.{number}.mlp.linear_fc1.weight`, "
        f"`decoder.layers.{number}.mlp.linear_fc2.weight` and 3 more"
        for number in (3, 4)
    )
    expected = {
        short: f"`{short}` lacks {third}, which the model has",
        long: f"`{long}` holds {fifth}, which the model does not have",
        wide: f"`decoder.layers.0.mlp.linear_fc1.weight` has shape [256, 64] in `{wide}`, in the model [192, 64]",
    }
    for path, text in expected.items():
        answers = ranks.run(_refused, 2, str(model_folder()), TP2, path)
        assert [message for message, _, _ in answers] == [text + HINT] * 2
        assert sorted(silent for _, silent, _ in answers) == [False, True]
        assert not any(changed for _, _, changed in answers)


def _bytes_read(folder, changes, source):
    """Bytes of files that loading reads."""
    from trainer import parallel
    from trainer.checkpoints import live

    config, build = _built(folder, changes)
    with parallel.session(config, "cpu"):
        chunks = build()
        before = _read_so_far()
        live.load(chunks, source)
        return _read_so_far() - before


def _read_so_far():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_each_rank_reads_its_own_rows_only(ranks, tmp_path):
    folder = models.save(models.build("gqa", hidden_size=512, vocab_size=8192), tmp_path / "model")
    size = (folder / "model.safetensors").stat().st_size
    (whole,) = ranks.run(_bytes_read, 1, str(folder), {}, str(folder))
    halves = ranks.run(_bytes_read, 2, str(folder), TP2, str(folder))
    assert size <= whole < 1.1 * size
    assert all(0.45 * size < half < 0.6 * size for half in halves)


def test_one_rank_compares_what_must_be_equal_and_all_are_told(ranks, tmp_path):
    folder = models.save(models.build("tied", hidden_size=512, vocab_size=8192), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    first, second = ranks.run(_bytes_read, 2, str(folder), {}, str(folder))
    both = 2 * head.numel() * head.element_size()
    assert first - second == pytest.approx(both, rel=0.01)
    head[0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    messages = ranks.run(_said, 2, str(folder), {})
    assert messages[0] == messages[1]
    assert "`lm_head.weight` differs from `model.embed_tokens.weight`" in messages[0]


def test_a_trainers_checkpoint_gives_its_weights_and_no_more(ranks, model_folder, tmp_path):
    changes = {"checkpoint__save": str(tmp_path), "train__train_iters": 6, **TP2}
    (first, *_) = ranks.run(witness.train, 2, str(model_folder()), changes)
    again = {"checkpoint__pretrained_checkpoint": str(tmp_path), "train__train_iters": 6, **PP2}
    (second, *_) = ranks.run(witness.train, 2, str(model_folder()), again)
    assert second.rates == first.rates  # from the beginning
    assert second.losses[0] < first.losses[0] - 0.1


def test_resuming_from_a_folder_without_checkpoints_is_an_error_unless_it_is_the_one_saved_to(ranks, model_folder, tmp_path):
    nothing = {"checkpoint__load": str(tmp_path / "nothing")}
    with pytest.raises(UserError) as error:
        ranks.run(witness.train, 1, str(model_folder()), nothing)
    assert str(error.value) == (
        f"`checkpoint.load` is `{tmp_path}/nothing`, which has no checkpoint to resume from\n\n"
        "hint: to start from weights alone use `checkpoint.pretrained_checkpoint`; a first start needs no `load`"
    )
    (seen,) = ranks.run(witness.train, 1, str(model_folder()), nothing | {"checkpoint__save": f"{tmp_path}/nothing/"})
    assert len(seen.losses) == small.STEPS
    assert json.loads((tmp_path / "nothing" / "metrics.jsonl").read_text().splitlines()[0])["iteration"] == 1


def _told(folder, changes):
    """The error of a run that cannot start, as this rank sees it."""
    from trainer.loop import pretrain

    try:
        pretrain(small.settings(Path(folder), **changes))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("setting", ["checkpoint.save", "logger.run_dir", "logger.tensorboard_dir"])
def test_a_folder_that_cannot_be_written_is_told_on_all_ranks_before_the_first_step(setting, ranks, model_folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "run"
    messages = ranks.run(_told, 2, str(model_folder()), {setting.replace(".", "__"): str(path)})
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"`{setting}` is `{path}`, which cannot be written to: Not a directory\n")


def _said(folder, changes):
    """What loading says on this rank: an error, or the notes."""
    from trainer import parallel
    from trainer.checkpoints import live

    config, build = _built(folder, changes)
    notes: list[str] = []
    with parallel.session(config, "cpu"):
        try:
            live.load(build(), config.checkpoint.pretrained_checkpoint, note=notes.append)
        except UserError as error:
            return str(error)
    return notes


def test_a_model_that_shapes_alone_cannot_tell_from_the_weights_own_is_refused(ranks, model_folder):
    folder = str(model_folder("gqa"))  # 8 heads of 8, 4 groups
    other = {"model__num_attention_heads": 4, "model__kv_channels": 16, "model__num_query_groups": 2}
    (message,) = ranks.run(_said, 1, folder, other)
    assert message == (
        f"`model.num_attention_heads` is `4`, and the weights at `{folder}` were made with `8`\n\n"
        "hint: set `model.num_attention_heads=8`, or name other weights"
    )
    (notes,) = ranks.run(_said, 1, folder, {"model__rotary_base": 999.0})
    assert notes == ["`model.rotary_base` is `999.0`; the weights were made with `10000.0`"]
    assert ranks.run(_said, 1, folder, {}) == [[]]
