"""DeepSeek-V3 of its true sizes, in FP8 with its layer of multi-token prediction, is planned at TP8·PP16·EP64 within bounds.

Its files are headers over holes. What a plan has is counted here from the shapes alone.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.headers import BLOCK, DEEPSEEK_V3, FP8, make_headers, tensors_of, write_headers
from benchmarks.plan import TARGETS, TP8_PP16_EP64, run
from converter import Reporter, hf_to_mcore
from converter.importing import ImportOptions, plan_import
from converter.sources import huggingface_source
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from tests.converter.test_cli import mbconvert
from tests.refusal import refused

pytestmark = pytest.mark.slow

CONFIG = DEEPSEEK_V3 | FP8
MEMORY = TARGETS[200_000][1] << 20
"""Bytes, a bound of `benchmarks.plan`."""

LAYERS, DENSE, EXPERTS = 61, 3, 256
"""Of the model; its layer of multi-token prediction, number 61, is one more with experts."""

HIDDEN, FFN, EXPERT_FFN, HEADS, PADDED_VOCAB = 7168, 18432, 2048, 128, 130_048
Q_RANK, KV_RANK, ROPE, NOPE, VALUE = 1536, 512, 64, 128, 128
TP, EP, STAGES = 8, 64, (3, *(4,) * 14, 2)

EXPERT = 3 * EXPERT_FFN * HIDDEN
REPLICATED = HIDDEN * (Q_RANK + KV_RANK + ROPE) + Q_RANK + KV_RANK + 2 * HIDDEN
"""Elements of a layer's attention and norms that each tensor-parallel rank has, and the first writes."""

DIVIDED = HEADS * (Q_RANK * (NOPE + ROPE) + KV_RANK * (NOPE + VALUE) + VALUE * HIDDEN)
"""Elements of a layer's attention that tensor-parallel ranks divide."""

PROJECTIONS = [(Q_RANK, HIDDEN), (HEADS * (NOPE + ROPE), Q_RANK), (KV_RANK + ROPE, HIDDEN), (HEADS * (NOPE + VALUE), KV_RANK),
               (HIDDEN, HEADS * VALUE)]  # fmt: skip
"""The matrices of a layer's attention."""


def of_ffn(size):
    return [(size, HIDDEN), (size, HIDDEN), (HIDDEN, size)]


MATRICES = PROJECTIONS * (LAYERS + 1) + of_ffn(FFN) * DENSE + of_ffn(EXPERT_FFN) * (EXPERTS + 1) * (LAYERS + 1 - DENSE)
"""All that are in FP8, each with its scales."""

COPIES = {f"model.layers.{LAYERS}.{copy}.weight" for copy in ("embed_tokens", "shared_head.head")}
"""Of the embedding and the output layer, which are not stored again."""

HALVES = DENSE + (EXPERTS + 1) * (LAYERS + 1 - DENSE)
"""Pairs of a gate and what it multiplies, which are one tensor in Megatron."""

SCALE_BYTES = 4 * sum(-(-rows // BLOCK) * -(-columns // BLOCK) for rows, columns in MATRICES)


def rank_bytes(stage, number):
    """The bytes of tensors in the file of a rank, by its number in a stage."""
    first, layers = sum(STAGES[:stage]), STAGES[stage] + (stage == len(STAGES) - 1)
    sparse = layers - max(0, DENSE - first)
    elements = sparse * EXPERT * EXPERTS // EP
    if number < TP:
        elements += (layers * DIVIDED + (layers - sparse) * 3 * FFN * HIDDEN + sparse * EXPERT) // TP
        elements += PADDED_VOCAB * HIDDEN // TP * (stage in {0, len(STAGES) - 1})
    if number == 0:
        elements += layers * REPLICATED + sparse * EXPERTS * HIDDEN
    if stage == len(STAGES) - 1:
        elements += (2 * HIDDEN * HIDDEN // TP) * (number < TP) + 4 * HIDDEN * (number == 0)  # of prediction, and the last norm
    return 2 * elements + 4 * EXPERTS * sparse * (number == 0)  # biases of routers are fp32


def expected_files():
    """The files of ranks that hold something, with the bytes of their tensors."""
    sizes = {(stage, number): rank_bytes(stage, number) for stage in range(len(STAGES)) for number in range(EP)}
    return {f"iter_0000000/__{stage * EP + number}_0.distcp": size for (stage, number), size in sizes.items() if size}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek") / "hf"
    make_headers(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def planned(source):
    """The conversion, and the tensors of the source."""
    wanted = ImportOptions(**TP8_PP16_EP64, etp=1, vpp=1, dtype="keep",
                           make_vocab_size_divisible_by=128, integrity=True)  # fmt: skip
    reader = HuggingFaceReader(LocalFolder(source))
    return plan_import(huggingface_source(reader), wanted, Reporter()), reader.specs


def dry_run(source, target, **changes):
    options = {**TP8_PP16_EP64, "etp": 1, "dry_run": True, **changes}
    return run(what="import", source=str(source), target=str(target), options=options)


@pytest.mark.parametrize("etp", [1, 8])
def test_it_is_planned_in_little_memory(source, tmp_path, etp):
    assert 0 < dry_run(source, tmp_path / "nothing", etp=etp)["peak"] <= MEMORY
    assert not list(tmp_path.iterdir())


def test_what_is_printed_is_the_plan(source, planned):
    conversion, specs = planned
    words = [word for name, value in TP8_PP16_EP64.items() for word in (f"--{name.replace('_', '-')}", value)]
    printed = json.loads(mbconvert("hf-to-mcore", source, "nothing", *words, "--etp", 1, "--dry-run", "--json").stdout)
    assert printed["layout"] == {"tp": 8, "pp": 16, "vpp": 1, "ep": 64, "etp": 1}
    assert printed["tensors"] == len(conversion.plan.tensor_plans) == len(specs) - len(COPIES) - HALVES
    assert printed["total_bytes"] == sum(printed["files"].values())
    assert [file for file in printed["files"] if file.endswith(".distcp")] == sorted(expected_files())
    assert all(printed["files"][file] > size for file, size in expected_files().items())
    assert 0 < printed["peak_memory"] <= MEMORY, "of a conversion"


def test_every_row_of_the_source_is_used_once_or_compared(planned):
    conversion, specs = planned
    assert len(specs) == 62 * 9 + 3 * 3 + 59 * (2 + 257 * 3) + 3 + 6 + len(MATRICES) == 91_991
    rows = Counter()
    for tensor_plan in conversion.plan.tensor_plans:
        for copy in tensor_plan.copies:
            rows[copy.source] += copy.rows
    assert conversion.plan.provenance.aliases.keys() == COPIES
    assert rows == {name: spec.shape[0] for name, spec in specs.items() if name not in COPIES}


def test_every_rank_has_the_bytes_that_shapes_and_layout_say(planned):
    conversion, _ = planned
    writer = conversion.plan.writer
    written = {file: sum(span.size for span in writer.spans(file) if span.known is None) for file in writer.files}
    assert written.pop("iter_0000000/huggingface/extras.safetensors") == SCALE_BYTES
    assert written == expected_files()
    assert len(written) == 15 * 64 + 8, "the first stage has no experts"


@pytest.mark.parametrize(("changes", "message"), [
    ({"pp_layout": "Et*3|(t*4|)*14t*1mL"}, "has 16 stages and 60 layers; .* need 16, the model has 61 layers"),
    ({"pp_layout": "Et*3|(t*4|)*13t*6mL"}, "has 15 stages and 61 layers; .* need 16"),
    ({"pp_layout": "Et*3|(t*4|)*14t*2mmL"}, "has 2 layers of multi-token prediction, the model has 1"),
    ({"pp_layout": None}, "61 layers cannot be divided evenly into 16 pipeline ranks"),
    ({"ep": 48}, "expert-parallel size 48 does not divide the model's 256 experts"),
    ({"etp": 3}, "expert-tensor-parallel size 3 does not divide the experts' feed-forward size, 2048"),
])  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused(source, tmp_path, changes, message):
    refused(hf_to_mcore, source, tmp_path, message, **{**TP8_PP16_EP64, "etp": 1, **changes})


WEIGHT = f"model.layers.{LAYERS}.mlp.experts.{EXPERTS - 1}.down_proj.weight"
LACKING = {
    f"{WEIGHT}_scale_inv": f"`{WEIGHT}` is fp8_e4m3 and its `{WEIGHT}_scale_inv` is missing",
    "model.layers.60.mlp.gate.e_score_correction_bias": "the source lacks `model.layers.60.mlp.gate.e_score_correction_bias`",
    f"model.layers.{LAYERS}.eh_proj.weight": f"the source lacks `model.layers.{LAYERS}.eh_proj.weight`",
}


@pytest.mark.parametrize("name", LACKING)
def test_one_tensor_of_92_000_that_is_missing_is_named(tmp_path, name):
    write_headers(tmp_path / "hf", CONFIG, [spec for spec in tensors_of(CONFIG) if spec.name != name])
    refused(hf_to_mcore, tmp_path / "hf", tmp_path, LACKING[name], **TP8_PP16_EP64, etp=1)


def test_scales_of_another_grid_are_named_with_both_shapes(tmp_path):
    scale = f"{WEIGHT}_scale_inv"
    tensors = [replace(spec, shape=(57, 16)) if spec.name == scale else spec for spec in tensors_of(CONFIG)]
    write_headers(tmp_path / "hf", CONFIG, tensors)
    message = rf"`{scale}` has shape \[57, 16\], which is not that of blocks of 128 x 128 of `{WEIGHT}`, \[7168, 2048\]"
    refused(hf_to_mcore, tmp_path / "hf", tmp_path, message, **TP8_PP16_EP64, etp=1)
