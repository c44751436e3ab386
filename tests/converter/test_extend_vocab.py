"""More tokens or fewer: rows of tokens that stay are kept bit for bit, and transformers computes the same logits for them."""

from __future__ import annotations

import json
import re
import tarfile

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from converter import check_checkpoint, extend_vocab, families, hf_to_mcore, mcore_to_hf, verify
from converter.cli import cli
from converter.execution import Reporter
from converter.vocabulary import resized_config
from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from tests.converter import family_suite
from tests.converter.test_kinds import LLAMA
from tests.models import build as build_llama
from tests.models import files_made, save, tree

TOKENS = torch.tensor([[1, 5, 300, 17, 42, 7, 383, 2]])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with an output layer of its own, in bf16 and several files, and one without, in fp32."""
    root = tmp_path_factory.mktemp("models")
    untied, tied = build_llama(dtype="bfloat16", vocab_size=389), build_llama("tied", vocab_size=389)
    return {
        "untied": save(untied, root / "untied", max_shard_size="60KB"),
        "tied": save(tied, root / "tied"),
    }


@pytest.fixture
def notes():
    return []


@pytest.fixture
def reporter(notes):
    return Reporter(note=notes.append)


def tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def in_transformers(folder, size):
    """The tensors and the configuration that transformers' own way gives, whose new rows are another matter."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model.state_dict(), model.config


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("size", [500, 384])
def test_rows_and_sizes_are_those_of_transformers(models, tmp_path, kind, size, notes):
    extend_vocab(models[kind], tmp_path / "made", to=size, verify=True, reporter=Reporter(note=notes.append))
    made, (wanted, config) = tensors(tmp_path / "made"), in_transformers(models[kind], size)
    kept = min(size, 389)
    for name, value in made.items():
        rows = kept if value.shape[:1] == (size,) else None
        assert value.shape == wanted[name].shape
        assert torch.equal(value[:rows], wanted[name][:rows])
    assert f"`config.json` changed: `vocab_size` from `389` to `{size}`" in notes
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made").config.vocab_size == config.vocab_size == size
    assert torch.equal(logits(tmp_path / "made")[..., :kept], logits(models[kind])[..., :kept])
    unchanged = [name for name in files_made(models[kind]) if not name.endswith((".safetensors", "config.json", "index.json"))]
    assert {name: files_made(tmp_path / "made")[name] for name in unchanged} == {
        name: files_made(models[kind])[name] for name in unchanged
    }
    assert files_made(tmp_path / "made").keys() == files_made(models[kind]).keys()


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("init", ["zero", "mean"])
def test_new_rows_are_zeros_or_the_mean_of_all_tokens(models, tmp_path, kind, init):
    extend_vocab(models[kind], tmp_path / "made", to=400, init=init)
    before, made = tensors(models[kind]), tensors(tmp_path / "made")
    for name in [name for name in made if made[name].shape[0] == 400]:
        row = before[name].double().mean(0).float().to(made[name].dtype) * (init == "mean")
        assert torch.equal(made[name][389:], row.expand(11, -1))


def new_rows(path, **shapes):
    torch.manual_seed(3)
    rows = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(rows, path)
    return rows


def test_new_rows_are_read_from_one_tensor(models, tmp_path):
    rows = new_rows(tmp_path / "rows.safetensors", rows=(11, 64))["rows"]
    extend_vocab(models["untied"], tmp_path / "made", to=400, init=tmp_path / "rows.safetensors", verify=True)
    made = tensors(tmp_path / "made")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(made[name][389:], rows.to(torch.bfloat16))


def test_new_rows_are_read_from_a_tensor_for_each(models, tmp_path):
    names = {"model.embed_tokens.weight": (11, 64), "lm_head.weight": (11, 64)}
    rows = new_rows(tmp_path / "rows.safetensors", **names)
    hf_to_mcore(models["untied"], tmp_path / "m", tp=2)
    extend_vocab(models["untied"], tmp_path / "made", to=400, init=tmp_path / "rows.safetensors")
    extend_vocab(tmp_path / "m", tmp_path / "megatron", to=400, init=tmp_path / "rows.safetensors")
    made = tensors(tmp_path / "made")
    assert all(torch.equal(made[name][389:], rows[name].to(torch.bfloat16)) for name in names)
    assert verify(tmp_path / "made", tmp_path / "megatron").same


LAYOUT = {"tp": 2, "pp": 2, "pp_layout": [3, 1], "make_vocab_size_divisible_by": 32}


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize(("size", "init"), [(500, "mean"), (384, "mean"), (400, "zero")])
def test_a_checkpoint_gets_the_files_of_an_import_of_the_extended_model(models, tmp_path, kind, size, init):
    hf_to_mcore(models[kind], tmp_path / "m", **LAYOUT)
    extend_vocab(tmp_path / "m", tmp_path / "made", to=size, init=init, verify=True)
    extend_vocab(models[kind], tmp_path / "model", to=size, init=init)
    hf_to_mcore(tmp_path / "model", tmp_path / "expected", **LAYOUT)
    assert files_made(tmp_path / "made") == files_made(tmp_path / "expected")
    mcore_to_hf(tmp_path / "made", tmp_path / "back")
    assert files_made(tmp_path / "back") == files_made(tmp_path / "model")


def test_padding_rows_of_the_source_are_not_taken_for_tokens(models, tmp_path):
    """Training changes them: here they are rows that settings no longer count."""
    extend_vocab(models["tied"], tmp_path / "more", to=500)
    hf_to_mcore(tmp_path / "more", tmp_path / "m", tp=2)
    for name in ("huggingface/files/config.json", "run_config.yaml"):
        path = tmp_path / "m" / "iter_0000000" / name
        path.write_text(re.sub(r"(\bvocab_size\"?: )500", r"\g<1>389", path.read_text()))
    for init in ("zero", "mean"):
        extend_vocab(tmp_path / "m", tmp_path / f"made-{init}", to=450, init=init)
        extend_vocab(models["tied"], tmp_path / init, to=450, init=init)
        assert verify(tmp_path / f"made-{init}", tmp_path / init).same


@pytest.mark.parametrize("family", ["phi", "gptj", "qwen2_moe", "gemma3", "bloom", "mamba2"])
def test_every_tensor_with_a_row_for_each_token_goes_along(tmp_path, family):
    """With biases of the output layer, towers and other names; transformers finds rows as it wants them."""
    source = family_suite.save_small(family, tmp_path / "hf")
    before = AutoModelForCausalLM.from_pretrained(source)
    tokens = before.get_input_embeddings().weight.shape[0]
    extend_vocab(source, tmp_path / "made", to=tokens + 7, verify=True)
    hf_to_mcore(source, tmp_path / "m")
    extend_vocab(tmp_path / "m", tmp_path / "megatron", to=tokens + 7)
    assert verify(tmp_path / "made", tmp_path / "megatron").same
    after, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(loaded.values())
    with torch.no_grad():
        expected, actual = (model.float().eval()(TOKENS % tokens).logits for model in (before, after))
    assert actual.shape[-1] == tokens + 7
    assert torch.equal(actual[..., :tokens], expected)


def test_the_rules_of_a_family_pad_what_has_a_row_for_each_token():
    for name in families.names():
        for rule in families.find(name).RULES:
            assert rule.padded == any("vocab" in dims for dims in rule.parts), (name, rule.megatron)
            assert not (rule.padded and (rule.is_moved or rule.parts[0][0] != "vocab"))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def with_config(model, folder, **fields):
    for name, data in tree(model).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({**config_of(model), **fields}))
    return folder


def test_tokens_that_settings_name_are_not_left_out(models, tmp_path):
    source = with_config(models["tied"], tmp_path / "source", eos_token_id=[2, 388], pad_token_id=387, bos_token_id=1)
    with pytest.raises(
        UserError, match=r"`config.json` names tokens that 387 rows do not hold: `eos_token_id` 388, `pad_token_id` 387"
    ):
        extend_vocab(source, tmp_path / "made", to=387)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 388}))
    (source / "config.json").write_text(json.dumps(config_of(models["tied"])))
    with pytest.raises(UserError, match=r"`generation_config.json` names tokens that 387 rows do not hold: `eos_token_id` 388"):
        extend_vocab(source, tmp_path / "made", to=387)
    extend_vocab(source, tmp_path / "made", to=389 + 1)


def test_the_tokenizers_size_is_said_where_it_has_more_tokens(models, tmp_path, notes, reporter):
    extend_vocab(models["tied"], tmp_path / "made", to=10, reporter=reporter)
    assert any(note.startswith("the tokenizer's files are copied as they are: they have ") for note in notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": 389}, "the model has 389 tokens already"),
        ({"to": 0}, "`to` is 0, which should be 1 or more"),
        ({"to": 300, "init": "zero"}, "`--to 300` adds no token, so that `--init` has no effect"),
        ({"to": 400, "init": "nothing"}, "`nothing` is not `zero`, not `mean`, and no file"),
        ({"to": 400, "hf_config": "."}, "`--hf-config` is for a source without a `config.json`"),
    ],
)
def test_options_that_cannot_be_met_are_refused(models, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        extend_vocab(models["tied"], tmp_path / "made", **options)
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"rows": (10, 64)},
            r"`rows` in `rows.safetensors` is fp32 of shape \[10, 64\]; the new rows of .* have shape \[11, 64\]",
        ),
        ({"lm_head.weight": (11, 64)}, "`rows.safetensors` lacks the new rows of `model.embed_tokens.weight`"),
        (
            {"model.embed_tokens.weight": (11, 64), "lm_head.weight": (11, 64), "more": (1,)},
            "`rows.safetensors` holds `more`, which have no place",
        ),
    ],
)
def test_new_rows_have_to_fit(models, tmp_path, shapes, message):
    new_rows(tmp_path / "rows.safetensors", **shapes)
    with pytest.raises(UserError, match=message):
        extend_vocab(models["untied"], tmp_path / "made", to=400, init=tmp_path / "rows.safetensors")


@pytest.mark.parametrize("kind", ["Hugging Face", "Megatron"])
def test_new_rows_that_the_dtype_cannot_hold_are_refused(models, tmp_path, kind):
    rows = torch.zeros(11, 64)
    rows[2, 3] = torch.finfo(torch.float32).max  # bf16 rounds it up
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    source = models["untied"]
    if kind == "Megatron":
        hf_to_mcore(source, tmp_path / "m", tp=2)
        source = tmp_path / "m"
    with pytest.raises(UserError, match=r"has numbers that bf16 cannot hold: up to `3\.40282e"):
        extend_vocab(source, tmp_path / "made", to=400, init=tmp_path / "rows.safetensors")
    assert not list(tmp_path.glob("made*"))


def test_a_size_by_which_a_family_tells_its_models_apart_is_refused(tmp_path):
    family = families.find("baichuan")
    config = {
        "model_type": "baichuan", "vocab_size": 64000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "model_max_length": 256, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"125696 tokens would change `.+` too in a model of this family"):
        resized_config(family, config, 125696)
    assert resized_config(family, config, 64001)["vocab_size"] == 64001


def test_the_command_says_what_it_did(models, tmp_path):
    answer = CliRunner().invoke(cli, ["extend-vocab", str(models["tied"]), str(tmp_path / "made"), "--to", "400", "--json"])
    assert json.loads(answer.stdout)["command"] == "extend-vocab"
    record = json.loads((tmp_path / "made" / "conversion.json").read_text())
    assert record["vocabulary"] == {"before": 389, "after": 400, "tensors": ["model.embed_tokens.weight"]}
    assert (record["options"]["to"], record["options"]["init"]) == (400, "mean")


@pytest.fixture
def trained(golden, tmp_path):
    """A checkpoint of Megatron-LM with 89 tokens at TP2·PP2, with optimizer state, and the folder with its `config.json`."""
    with tarfile.open(golden / "optimizer_state" / "right.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    config, small = tmp_path / "config", {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config.mkdir()
    (config / "config.json").write_text(json.dumps({**LLAMA, **small}))
    return tmp_path / "right", config


def stored(root, work):
    """All that torch reads of a checkpoint, by key."""
    dcp_to_torch_save(next(root.glob("iter_*")), work)
    return {name: value for name, value in torch.load(work, weights_only=False).items() if torch.is_tensor(value)}


@pytest.mark.parametrize(("size", "init"), [(130, "mean"), (130, "zero"), (80, "mean")])
def test_optimizer_state_goes_along(trained, tmp_path, size, init):
    root, config = trained
    extend_vocab(root, tmp_path / "made", to=size, init=init, hf_config=config, verify=True)
    before, made = (stored(each, tmp_path / "all.pt") for each in (root, tmp_path / "made"))
    kept, rows = min(size, 89), -(-size // 32) * 32
    names = ["embedding.word_embeddings.weight", "output_layer.weight"]
    weights = {name: made[name] for name in names}
    assert made.keys() >= {f"optimizer.state.{state}.{name}" for name in names for state in ("exp_avg", "exp_avg_sq", "param")}
    for name in [name for name in made if name.startswith(("optimizer.state.", "decoder.", *names))]:
        value, of = made[name], name.removeprefix("optimizer.state.").partition(".")[2]
        if of not in names and name not in names:
            assert torch.equal(value, before[name]), name
            continue
        assert value.shape == (rows, 32)
        assert torch.equal(value[:kept], before[name][:kept]), name
        assert not value[size:].any()
        new = weights[of][kept:size].float() if ".param." in name else torch.zeros(size - kept, 32)
        assert name in names or torch.equal(value[kept:size], new), name
    for name in names:
        row = before[name][:89].double().mean(0).float().to(torch.bfloat16) * (init == "mean")
        assert torch.equal(made[name][kept:size], row.expand(size - kept, -1))
    assert check_checkpoint(tmp_path / "made").wrong_masters == []


def test_args_count_the_new_tokens(trained, tmp_path):
    root, config = trained
    extend_vocab(root, tmp_path / "made", to=130, hf_config=config)
    args = [open_megatron(LocalFolder(each)).args() for each in (root, tmp_path / "made")]
    assert [arguments["vocab_size"] for arguments in args] == [89, 130]
    assert args[1]["padded_vocab_size"] == 160
    plain = {name: value for name, value in args[0].items() if isinstance(value, str | int | float)}
    assert {name for name in plain if plain[name] != args[1].get(name)} == {"vocab_size", "padded_vocab_size"}


def test_random_numbers_stay_where_the_layout_does(trained, tmp_path, notes, reporter):
    root, config = trained
    extend_vocab(root, tmp_path / "made", to=130, hf_config=config, reporter=reporter)
    assert not [note for note in notes if "random numbers" in note]
    made, before = (open_megatron(LocalFolder(each)).container for each in (tmp_path / "made", root))
    names = [name for name in before.object_names if name.startswith("rng_state")]
    assert len(names) == 4
    assert all(made.archive(name).data() == before.archive(name).data() for name in names)


def test_optimizer_state_may_be_left_out(trained, tmp_path):
    root, config = trained
    extend_vocab(root, tmp_path / "made", to=130, hf_config=config, weights_only=True)
    assert not [name for name in stored(tmp_path / "made", tmp_path / "all.pt") if name.startswith("optimizer")]
