"""On GPUs with Transformer Engine: every family's checkpoint is loaded strictly, and its logits are transformers'. Left out by
`make test`; `-s` prints the figures."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from converter import families, hf_to_mcore
from tests.converter.family_suite import TOKENS, auto_class, small_model
from tests.converter.remote_code import TWINS

pytestmark = pytest.mark.gpu

TRAINED = [name for name in families.names() if families.find(name).trains and name not in TWINS]
TP1, TP2 = {}, {"tensor_model_parallel_size": 2}
PRECISIONS = {"fp32": "float32", "bf16_mixed": "bfloat16"}


Tokens = list[list[int]]


def logits_of_each(work: str, names: list[str], settings: dict[str, Any], tokens: Tokens = TOKENS) -> dict[str, Any]:
    """Of every family and precision: logits of the model that `mbtrain` builds, or what went wrong."""
    logits = {}
    for name in names:
        for precision in PRECISIONS:
            try:
                logits[name, precision] = _logits(Path(work) / name, precision, settings, tokens)
            except Exception:
                logits[name, precision] = traceback.format_exc()
    return logits


def _logits(folder: Path, precision: str, settings: dict[str, Any], tokens: Tokens) -> torch.Tensor:
    from tests.megatron_cpu import load_strictly
    from trainer import model, parallel
    from trainer.config import RunConfig
    from trainer.model import from_hf_config
    from trainer.settings.resolve import resolve

    run = RunConfig(model=from_hf_config(json.loads((folder / "hf" / "config.json").read_text())), mixed_precision=precision)
    run.optimizer.lr, run.dataset.sequence_length = 1e-4, len(tokens[0])
    for name, value in settings.items():
        setattr(run.model, name, value)
    resolved = resolve(run, world_size=parallel.world_size(), device="gpu").config
    with parallel.session(resolved, "gpu"), torch.no_grad():
        (chunk,) = model.build(resolved.model)
        chunk = chunk.to(resolved.model.params_dtype).eval()
        left = load_strictly([chunk], str(folder / f"megatron_{precision}" / "iter_0000000"))
        assert not left, left
        ids = torch.tensor(tokens, device="cuda")
        positions = torch.arange(ids.shape[1], device="cuda").expand_as(ids)
        return chunk(ids, positions, None, runtime_gather_output=True).float().cpu()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small model of each family in bf16 and in fp32, converted."""
    folder = tmp_path_factory.mktemp("families")
    for name in TRAINED:
        small_model(name).save_pretrained(folder / name / "hf")
        for precision, dtype in (("fp32", "fp32"), ("bf16_mixed", "keep")):
            hf_to_mcore(folder / name / "hf", folder / name / f"megatron_{precision}", tp=2, dtype=dtype)
    return folder


@pytest.fixture(scope="module", params=["tp1", "tp2"])
def measured(request, ranks, work):
    """The logits of all families at a layout."""
    settings = {"tp1": TP1, "tp2": TP2}[request.param]
    world = 2 if settings else 1
    if torch.cuda.device_count() < world:
        pytest.skip("needs two GPUs")
    return request.param, ranks.run(logits_of_each, world, str(work), TRAINED, settings)[0]


def skip_without_kernels(errors: list[str]) -> None:
    """Skip a family whose layers need a package that is not installed."""
    if any("flash-linear-attention" in text for text in errors):
        pytest.skip("needs flash-linear-attention")


def by_transformers(folder: Path, dtype: str, tokens: Tokens = TOKENS) -> torch.Tensor:
    from transformers import AutoConfig

    kind = auto_class(AutoConfig.from_pretrained(folder))
    model = kind.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").cuda().eval()
    with torch.no_grad():
        return model(torch.tensor(tokens, device="cuda")).logits.float().cpu()


@pytest.mark.parametrize("name", TRAINED)
def test_logits_are_those_of_transformers(name, measured, work):
    layout, logits = measured
    wrong = [text for key, text in logits.items() if key[0] == name and not isinstance(text, torch.Tensor)]
    skip_without_kernels(wrong)
    assert not wrong, wrong
    exact = by_transformers(work / name / "hf", "float32")
    fp32, bf16 = (logits[name, precision][..., : exact.shape[-1]] for precision in PRECISIONS)
    theirs = (by_transformers(work / name / "hf", "bfloat16") - exact).abs()
    ours, largest = (bf16 - exact).abs(), exact.abs().max().item()
    difference = (fp32 - exact).abs().max().item()
    print(
        f"\n{name} {layout}: fp32 {difference / largest:.1e} of the largest logit; bf16 mean error {ours.mean():.2e}, "
        f"transformers' own {theirs.mean():.2e}; ratio {ours.mean() / theirs.mean():.2f}"
    )
    assert difference < 1e-3 * largest
    assert ours.mean() <= theirs.mean() * 1.1
