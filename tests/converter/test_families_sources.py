"""Sources that are not what a family's `config.json` says, whatever the family calls its tensors: named, or converted, never
dropped."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from converter import UserError, families, hf_to_mcore, mcore_to_hf
from converter.config import TEXT, make_model
from converter.planner import huggingface_tensors
from converter.recognize import refuse_unfit
from converter.rules import templates
from formats.spec import DTYPES, TensorSpec
from tests.converter import remote_code
from tests.converter.family_suite import save_small, small_config
from tests.models import model_tree

SINGLE = "model.safetensors"


@pytest.fixture(scope="module", params=families.names())
def family(request):
    return request.param


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """A small model of a family, not to be changed."""
    return save_small(family, tmp_path_factory.mktemp("family") / "hf", dtype="float32")


@pytest.fixture
def folder(saved, tmp_path):
    """The same, with `config.json` and weights to change."""
    return shutil.copytree(saved, tmp_path / "hf")


def refusal(folder, work) -> str:
    with pytest.raises(UserError) as refused:
        hf_to_mcore(folder, work / "megatron")
    return str(refused.value)


def save_as(kind, family, folder, **changes):
    torch.manual_seed(0)
    config = small_config(family)
    config.pad_token_id = 0
    kind.from_config(config, **changes).save_pretrained(folder)
    return folder


def change(folder, rewrite):
    weights = load_file(folder / SINGLE)
    save_file(rewrite(weights), folder / SINGLE, {"format": "pt"})


def set_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def set_tied(folder, tied):
    """Say so wherever `config.json` says it: a model with towers has it twice."""
    text = json.loads((folder / "config.json").read_text()).get(TEXT)
    parts = {TEXT: {**text, "tie_word_embeddings": tied}} if text and "tie_word_embeddings" in text else {}
    set_config(folder, tie_word_embeddings=tied, **parts)


def head_of(family) -> str:
    """The tensor of the output layer, if the family may have one of its own."""
    return next((rule.huggingface for rule in families.find(family).RULES if rule.tied_to), "")


def test_a_head_for_classification_is_named(family, tmp_path):
    if family not in CLASSIFIERS:
        pytest.skip("transformers has none")
    folder = save_as(AutoModelForSequenceClassification, family, tmp_path / "hf")
    heads = [name for name in load_file(folder / SINGLE) if re.match(r"score|classifier", name)]
    message = refusal(folder, tmp_path)
    assert heads
    assert f"`{heads[0]}`" in message
    assert "a head for classification, rewards" in message


def test_a_head_without_its_bias_lacks_the_bias_alone(tmp_path):
    folder = save_small("phi", tmp_path / "hf", dtype="float32")
    change(folder, lambda weights: {name: tensor for name, tensor in weights.items() if name != "lm_head.bias"})
    assert refusal(folder, tmp_path).startswith("the source lacks `lm_head.bias`")


OWN_CODE = {*remote_code.TWINS, "exaone"}
"""Families whose names are those of their repositories' code: transformers has no body of them, or saves it under other names."""


def save_body(family, folder):
    """A model without its head, as `AutoModel` saves it."""
    if family not in OWN_CODE:
        return save_as(AutoModel, family, folder)
    save_small(family, folder, dtype="float32")
    body = {name for name in load_file(folder / SINGLE) if name != head_of(family)}
    change(folder, lambda weights: {name.partition(".")[2]: weights[name] for name in body})
    return folder


def test_a_body_without_a_head_is_converted_if_tied_or_named(family, tmp_path):
    if family == "chatglm":
        pytest.skip("`AutoModel` of its repositories is the model with its head")
    folder = save_body(family, tmp_path / "hf")
    if not families.find(family).ROOTS:
        assert "saved from `AutoModel`, without the prefix" in refusal(folder, tmp_path)
        return
    if head_of(family):
        set_tied(folder, False)
        assert "has no head of a language model" in refusal(folder, tmp_path)
    set_tied(folder, True)
    hf_to_mcore(folder, tmp_path / "tied")
    mcore_to_hf(tmp_path / "tied", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)


def is_matrix(name, tensor):
    """Is it what is quantized first: the weight of a linear layer in the first layer of the model?"""
    return ".0." in name and name.endswith(".weight") and tensor.ndim == 2


@pytest.mark.parametrize("method", ["GPTQ", "int8"])
def test_quantized_weights_are_refused(family, folder, tmp_path, method):
    first = next(name for name, tensor in load_file(folder / SINGLE).items() if is_matrix(name, tensor))

    def rewrite(weights):
        whole = weights.pop(first)
        if method == "int8":
            return {**weights, first: whole.astype(np.int8)}
        parts = {name: np.ones((2, 2), "int32") for name in ("qweight", "qzeros", "g_idx")}
        return {**weights, **{f"{first.removesuffix('weight')}{name}": tensor for name, tensor in parts.items()}}

    change(folder, rewrite)
    set_config(folder, quantization_config={"quant_method": "some method"})
    assert f"`{folder}` is quantized (some method): " in refusal(folder, tmp_path)


def test_a_wrapper_s_prefix_is_named(folder, tmp_path):
    change(folder, lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()})
    message = refusal(folder, tmp_path)
    assert "`module.` is DistributedDataParallel's or DeepSpeed's" in message


def test_a_tied_head_that_differs_is_named_with_both_values(family, folder, tmp_path):
    head = head_of(family)
    if not head:
        pytest.skip("its output layer is always the embedding")
    rooted = families.find(family).rooted(set(load_file(folder / SINGLE)))
    head, embedding = next((rule.huggingface, rule.tied_to) for rule in rooted.RULES if rule.tied_to)
    set_config(folder, tie_word_embeddings=True)
    change(folder, lambda weights: {**weights, head: weights[embedding].copy()})
    hf_to_mcore(folder, tmp_path / "same")
    mcore_to_hf(tmp_path / "same", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)

    def differ(weights):
        weights[head][3, 2] += 1
        return weights

    change(folder, differ)
    in_head, in_embedding = (load_file(folder / SINGLE)[name][3, 2] for name in (head, embedding))
    assert refusal(folder, tmp_path) == (
        f"`{head}` differs from `{embedding}`, though `config.json` ties them: "
        f"at [3, 2] they are {in_head:.9g} and {in_embedding:.9g}\n\n"
        "hint: set `tie_word_embeddings` to false in `config.json` to keep both"
    )
    change(folder, lambda weights: {**weights, head: weights[embedding][:5].copy()})
    assert ": they are fp32 [5, 64] and fp32 [384, 64]\n" in refusal(folder, tmp_path)


TRAP = "raise RuntimeError('code of a checkpoint ran')\n"


def test_a_repository_with_code_is_converted_without_running_it(folder, tmp_path):
    for file in ("modeling_own.py", "configuration_own.py"):
        (folder / file).write_text(TRAP)
    set_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "configuration_own.OwnConfig"})
    hf_to_mcore(folder, tmp_path / "megatron", verify=True)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)


OTHER_WORDS = {
    "model.layers": "transformer.h", "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f",
    "lm_head": "embed_out",
}  # fmt: skip
"""What a family calls its modules that has none of Llama's words."""


def in_other_words(name: str) -> str:
    return next((name.replace(start, word, 1) for start, word in OTHER_WORDS.items() if name.startswith(start)), name)


@pytest.mark.parametrize(
    ("renamed", "cause"),
    [
        (lambda name: f"_orig_mod.{name}", "`_orig_mod.` is `torch.compile`'s"),
        (lambda name: f"model.{name}", "the prefix is `model.transformer.` instead of `transformer.`"),
        (lambda name: name.removeprefix("transformer."), "without the prefix `transformer.` and without a head"),
    ],
)
def test_prefixes_are_named_whatever_words_a_family_has(renamed, cause):
    config = {**small_config("llama").to_dict(), "model_type": "llama"}
    llama = families.find("llama")
    family = replace(llama, RULES=templates(llama.RULES, in_other_words), EXTRAS=())
    model = make_model(llama.CONFIG, config)
    names = [name for name, _ in huggingface_tensors(family.RULES, model, dict.fromkeys(range(10_000)))]
    specs = {renamed(name): TensorSpec(renamed(name), (1,), DTYPES["fp32"]) for name in names}
    with pytest.raises(UserError) as refused:
        refuse_unfit(specs, config, family, model, label="FOLDER")
    problem, _, hint = str(refused.value).partition("\n\nhint: ")
    assert cause in problem
    code = hint.partition("save_file({")[2].partition(": t for")[0]
    assert {eval(code, {"n": name}) for name in specs if name != renamed("embed_out.weight")} == {
        name for name in names if name != "embed_out.weight"
    }
