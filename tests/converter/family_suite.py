"""What holds for every family, by its file alone: `test_families.py` goes through the directory, others through their files."""

from __future__ import annotations

import json
from math import lcm

import numpy as np
import torch
from safetensors import safe_open

from converter import families, hf_to_mcore, mcore_to_hf
from converter.config import TEXT, language_model, make_model, to_huggingface, to_megatron
from converter.planner import huggingface_tensors
from converter.rules import extra_names
from formats.spec import DTYPES, TensorSpec
from tests.converter import remote_code
from tests.family_models import STRICTLY, logits_of
from tests.models import BASE, model_tree

LAYOUTS = ({}, {"tp": 2, "pp": 2})
EXPERT_LAYOUTS = ({}, {"tp": 2, "pp": 2, "ep": 2, "etp": 1})
"""Of families with experts."""

MORE_LAYOUTS = ({"tp": 2},)
MORE_EXPERT_LAYOUTS = ({"tp": 2}, {"tp": 2, "pp": 2}, {"ep": 2}, {"tp": 2, "ep": 2})
"""The slow ones."""

TOKENS = np.random.default_rng(5).integers(0, 384, (2, 24)).tolist()


def small_config(family, **changes):
    """The configuration of a small model, as transformers makes it of the family's own fields and of `changes`."""
    from transformers import AutoConfig

    small = families.find(family).SMALL
    if TEXT in small:
        return AutoConfig.for_model(family, **{**small, TEXT: {**BASE, "pad_token_id": 383, **small[TEXT]}, **changes})
    fields = {**BASE, "pad_token_id": 383, **small, **changes}
    return remote_code.config_of(family, fields) if family in remote_code.TWINS else AutoConfig.for_model(family, **fields)


def auto_class(config):
    """The class of transformers that finds a model's own."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, TEXT) else AutoModelForCausalLM


def small_model(family, *, dtype="bfloat16", **changes):
    """A small model of transformers with random weights."""
    return random_model(small_config(family, **changes), dtype=dtype)


def random_model(config, *, dtype="bfloat16"):
    """A model of transformers with random weights."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0].rpartition(".")[2]  # DBRX's attention is inside `norm_attn_norm`
            parameter.normal_(1.0 if "norm" in module else 0.0, 0.3 if parameter.ndim == 1 else 0.08)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # of a router
                buffer.normal_(0.0, 0.3)
    return model


def save_small(family, folder, *, dtype="bfloat16", **changes):
    """A small model as transformers saves it: under the names that are published."""
    if family in remote_code.TWINS:
        return _save_remote(family, folder, dtype)
    small_model(family, dtype=dtype, **changes).save_pretrained(folder)
    return folder


def _save_remote(family, folder, dtype):
    from transformers import AutoConfig

    twin = remote_code.TWINS[family]
    config = AutoConfig.for_model(twin.family, **{**BASE, **twin.fields})
    random_model(config, dtype=dtype).save_pretrained(remote_code.twin_of(folder))
    remote_code.publish(family, small_config(family).to_dict(), remote_code.twin_of(folder), folder)
    return folder


def check_names(family, folder):
    """Rules name every weight of the saved model with its shape, and no other."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    definition = families.find(family).rooted(saved)
    model = make_model(definition.CONFIG, config)
    saved = {name: shape for name, shape in saved.items() if not name.startswith(definition.PASSTHROUGH_PREFIXES or "nothing")}
    source = {name: TensorSpec(name, shape, DTYPES["fp32"]) for name, shape in saved.items()}
    extras, passing = extra_names(definition.EXTRAS, model), definition.PASSTHROUGH_PREFIXES or ("no such",)
    weights = {name: shape for name, shape in saved.items() if name not in extras and not name.startswith(passing)}
    assert dict(huggingface_tensors(definition.RULES, model, source)) == weights


def check_config(family):
    """A configuration survives the way to Megatron and back: what comes back means the same to transformers."""
    definition = families.find(family)
    config = small_config(family).to_dict()
    back = to_huggingface(definition.CONFIG, to_megatron(definition.CONFIG, config))
    assert to_megatron(definition.CONFIG, back) == to_megatron(definition.CONFIG, config)
    config, back = language_model(config), language_model(back)
    rope = ("rope_theta", "rope_scaling", "rope_parameters")  # the same in Megatron; some numbers have no field there
    same = [name for name in back if config.get(name) is not None and name not in rope]
    assert {name: back[name] for name in same} == {name: _part(config[name], back[name]) for name in same}


def _part(value, written):
    """What a configuration says, of an object the fields that a family writes."""
    return {name: value.get(name) for name in written} if isinstance(written, dict) and isinstance(value, dict) else value


def check_round_trip(folder, work, *, slow=False):
    """The way there and back gives the same bytes at several layouts; the last is read back and compared as well."""
    dense, experts = (MORE_LAYOUTS, MORE_EXPERT_LAYOUTS) if slow else (LAYOUTS, EXPERT_LAYOUTS)
    layouts = experts if has_experts(folder) else dense
    for number, layout in enumerate(layouts):
        out, back = work / f"megatron{number}", work / f"back{number}"
        hf_to_mcore(folder, out, verify=layout == layouts[-1], **layout)
        mcore_to_hf(out, back)
        assert model_tree(back) == model_tree(folder), layout


def has_experts(folder):
    """Is a saved model a mixture of experts?"""
    config = json.loads((folder / "config.json").read_text())
    return bool(to_megatron(families.find(config["model_type"]).CONFIG, config).get("num_moe_experts"))


UNEVEN = "Et|tttL"
"""A pipeline whose stages have other numbers of layers, as megatron-core writes it."""

TP, PP, LAYOUT = "tensor_model_parallel_size", "pipeline_model_parallel_size", "pipeline_model_parallel_layout"
RUNS: dict[str, dict] = {"tp2 pp2 uneven": {TP: 2, PP: 2, LAYOUT: UNEVEN}}
MORE_RUNS: dict[str, dict] = {
    "tp1": {},
    "tp2": {TP: 2},
    "pp2": {PP: 2},
    "tp2 pp2 sequence parallel": {TP: 2, PP: 2, "sequence_parallel": True},
}

EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
EXPERT_RUNS: dict[str, dict] = {"tp2 ep2 etp1": {TP: 2, EP: 2, ETP: 1}}
MORE_EXPERT_RUNS: dict[str, dict] = {
    "tp2 etp1": {TP: 2, ETP: 1},
    "ep2 etp2": {EP: 2, ETP: 2},
    "tp2 ep2 etp1 all-to-all": {TP: 2, EP: 2, ETP: 1, "sequence_parallel": True, "moe_token_dispatcher_type": "alltoall"},
    "ep2 pp2 all-to-all": {EP: 2, PP: 2, LAYOUT: UNEVEN, "moe_token_dispatcher_type": "alltoall"},
}
"""Of families with experts, beside the others. gloo gathers no tensors of unequal sizes: all-to-all needs ETP1."""


def more_runs(family):
    """The slow runs of a family. megatron-core does not divide experts with biases."""
    fields = to_megatron(families.find(family).CONFIG, small_config(family).to_dict())
    if not fields.get("num_moe_experts"):
        return MORE_RUNS
    most = fields.get(ETP, 2)
    return RUNS | MORE_RUNS | {name: settings for name, settings in MORE_EXPERT_RUNS.items() if settings.get(ETP, 1) <= most}


def ranks_of(settings):
    """How many ranks a layout needs: those of its attention and its experts, in each stage."""
    tensor = settings.get(TP, 1)
    return lcm(tensor, settings.get(EP, 1) * settings.get(ETP, tensor)) * settings.get(PP, 1)


def check_logits(ranks, folder, work, *, runs=None, more="", attention="eager", load=STRICTLY):
    """The model that `mbtrain` builds loads the checkpoint strictly, whatever layouts both have, and computes what transformers
    computes.

    `more` is a folder of further families; `load` is how `family_models.logits_of` loads.
    """
    experts = has_experts(folder)
    hf_to_mcore(folder, work / "megatron", tp=2, ep=2 if experts else 1)
    config, iteration = json.loads((folder / "config.json").read_text()), str(work / "megatron" / "iter_0000000")
    expected = transformers_logits(folder, attention)
    largest = np.abs(expected).max()
    for name, settings in _cut_by_sequence(config, runs or (EXPERT_RUNS if experts else RUNS)).items():
        answers = ranks.run(logits_of, ranks_of(settings), (config, settings, str(more)), iteration, TOKENS, load)
        assert all("_extra_state" in key for left, _ in answers for key in left), name
        for logits in (output for _, output in answers if output is not None):
            np.testing.assert_allclose(logits[..., : expected.shape[-1]], expected, atol=1e-4 * largest, rtol=0, err_msg=name)


def _cut_by_sequence(config, runs):
    """The runs of a model; those of sparse attention with sequence parallelism, without which megatron-core has no TP there."""
    if to_megatron(families.find(config["model_type"]).CONFIG, config).get("experimental_attention_variant") != "dsa":
        return runs
    return {name: {**settings, "sequence_parallel": settings.get(TP, 1) > 1} for name, settings in runs.items()}


def transformers_logits(folder, attention="eager"):
    """What transformers computes of `TOKENS` in fp32; large enough to tell models apart."""
    from transformers import AutoConfig

    twin = remote_code.twin_of(folder)
    folder = twin if twin.exists() else folder
    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.ptp(expected) > 0.2, "a test of small logits proves little"
    return expected
