"""Benchmarks that a CPU can run: that they measure, not what they measure."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bare_experts, finetune, startup, trace
from benchmarks.convert import Run
from benchmarks.expert_shapes import PRECISIONS, SHAPES, config_of, settings
from benchmarks.peft_finetune import as_transformers
from tests.trainer.settings import HOPPER

WORDS = ["tiny", "--device", "cpu", "--layers", "1", "--sequence", "64", "--steps", "2", "--warm-up", "1"]


def _measured(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, the table's last line, and what was told meanwhile."""
    with pytest.raises(SystemExit) as end:
        finetune.main([*WORDS, *words])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out.splitlines()[-1], captured.err


@pytest.mark.slow
def test_fine_tuning_is_measured_beside_peft(capsys):
    status, row, output = _measured(capsys)
    assert status == 0, output
    measured = {name: json.loads(figures) for name, figures in re.findall(r": (\w+) bf16 (\{.*\})", output)}
    assert set(measured) == {"ours", "peft"}
    assert measured["ours"]["trained"] == 32 * (256 + 512 + 256 + 256 + 256 + 1536 + 768 + 256)
    ratio = measured["ours"]["tokens_per_second"] / measured["peft"]["tokens_per_second"]
    assert f"{ratio:.3f}" in row.split()


def test_a_program_that_fails_is_told(capsys):
    status, row, output = _measured(capsys, "--only", "ours", "--setting", "peft.dim=0")
    assert status == 1
    assert "ours bf16 failed" in output
    assert "`peft.dim` is `0`" in output
    assert set(row.split()) == {"bf16", "-"}


def test_transformers_learn_the_same_tokens():
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (2, 17))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.randint(0, 2, (2, 16)).float()}
    batch["loss_mask"][:, -1] = 0  # a row's last token has no label
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    output = model(**as_transformers(batch, torch.device("cpu")))
    each = cross_entropy(output.logits.transpose(1, 2), batch["labels"], reduction="none")
    torch.testing.assert_close(output.loss, (each * batch["loss_mask"]).sum() / batch["loss_mask"].sum())


@pytest.mark.filterwarnings("ignore:Using a large number of experts:UserWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bare_loop_of_experts_has_the_settings_of_mbtrain(shape, precision):
    run = bare_experts.resolved(config_of(SHAPES[shape], 1), settings(SHAPES[shape], precision), HOPPER)
    for ours, theirs in zip((run.ddp, run.optimizer), bare_experts.sections(), strict=True):
        values = {field.name: (getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(theirs)}
        differ = {name for name, (first, second) in values.items() if first != second}
        assert differ <= {"min_lr", "fp8_recipe"}  # `None` and 0.0; which only weights in FP8 are read with


def test_a_summary_of_a_trace_has_the_times_of_torchs_own(tmp_path):
    layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    with torch.profiler.profile() as profiler:
        layers(torch.randn(4, 16)).sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    summary = trace.summary(tmp_path / "trace.json").splitlines()
    known = {event.key: event for event in profiler.key_averages()}
    rows = {words[4]: (float(words[0]), int(words[2])) for words in (line.split(maxsplit=4) for line in summary[1:])}
    for name in ("aten::addmm", "aten::mm"):
        assert rows[name] == (pytest.approx(known[name].self_cpu_time_total / 1e3, abs=0.006), known[name].count)


def test_waits_of_a_gpu_are_the_times_in_which_no_stream_runs():
    kernels = [trace.Event(0, 4, "a"), trace.Event(1, 2, "b"), trace.Event(7, 9, "c"), trace.Event(9, 10, "d")]
    assert list(trace.gaps(kernels)) == [(3, "a", "c")]


def test_starting_up_counts_the_quickest_round_and_show_beyond_its_import():
    """Commands are given the seconds here; that they run is `test_show`'s."""
    seconds = {
        "import": iter((6.0, 5.0, 7.0)),
        "--help": iter((0.2, 0.5, 0.1)),
        "recipes": iter((0.6,) * 3),
        "show": iter((6.6, 6.4, 9.0)),
    }
    order = []

    def run(command, _):
        (name,) = {name for name in seconds for word in command if name in word.split()}
        order.append(name)
        return Run(seconds=20.0, cores=next(seconds[name]))

    asked = startup.commands("llama_tiny")
    taken = startup.measure(asked, 3, run)
    assert order == [*seconds] * 3
    assert [startup.row(entry, run, taken[0]) for entry, run in zip(asked, taken, strict=True)] == [
        "| `import torch, megatron.core` | 5.00 | 20.00 | – | – |",
        "| `mbtrain --help` | 0.10 | 20.00 | 0.10 | 0.3 kept |",
        "| `mbtrain recipes` | 0.60 | 20.00 | 0.60 | 0.5 exceeded |",
        "| `mbtrain show llama_tiny` | 6.40 | 20.00 | 1.40 | 1.5 kept |",
    ]
