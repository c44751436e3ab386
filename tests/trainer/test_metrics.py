"""Records, speeds and the console line."""

from __future__ import annotations

import math
from dataclasses import replace

import click
import pytest
import torch

from trainer.estimate.peaks import peak_flops
from trainer.logging.metrics import Interval, Measure, console_line, duration, memory_gib
from trainer.logging.records import Step, evaluation

MEASURE = Measure(flops_per_token=4.8e10, tokens_per_step=4_194_304, num_gpus=64, train_iters=1000, peak_flops=989e12)


def summed(losses: list[float], **options) -> Interval:
    interval = Interval()
    for loss in losses:
        interval.add(loss, **options)
    return interval


def step(**changes) -> Step:
    record = MEASURE.step(
        summed([2.0, 3.0], grad_norm=1.234), iteration=120, seconds=11.2, timed_steps=2, lr=3e-4,
        consumed_samples=122_880, consumed_tokens=503_316_480, memory_gib=61.24,
    )  # fmt: skip
    return replace(record, **changes)


def test_the_loss_is_the_mean_over_the_intervals_steps():
    losses = torch.rand(7, dtype=torch.float32)
    assert summed(losses.tolist()).loss == losses.double().sum().item() / 7


def test_skipped_steps_are_counted_and_leave_the_mean_alone():
    interval = Interval()
    interval.add(2.0, grad_norm=0.5)
    interval.add(math.inf, skipped=True)
    assert (interval.steps, interval.loss, interval.grad_norm, interval.skipped) == (2, 2.0, 0.5, 1)


def test_an_interval_of_skipped_steps_has_no_loss():
    assert summed([1.0, 2.0], skipped=True).loss is None


def test_an_interval_carried_over_a_resume_gives_the_same_bits():
    losses = torch.rand(9, generator=torch.Generator().manual_seed(1)).tolist()
    whole, first = Interval(), Interval()
    for loss in losses:
        whole.add(loss, grad_norm=loss)
    for loss in losses[:4]:
        first.add(loss, grad_norm=loss)
    second = Interval.from_state_dict(first.state_dict())
    for loss in losses[4:]:
        second.add(loss, grad_norm=loss)
    assert second == whole


@pytest.mark.parametrize("steps", [0, 3])
def test_an_interval_of_an_earlier_version_is_read(steps):
    """As the version before wrote it; the one before that had no `work`."""
    state = {
        "steps": steps,
        "skipped": 0,
        "work": (0.0, 0.0),
        "loss": 6.0 if steps else None,
        "not_finite": 0.0,
        "grad_norm": None,
    }
    interval = Interval.from_state_dict(state)
    assert interval.state_dict() == state
    del state["work"]
    assert Interval.from_state_dict(state) == interval


def test_speeds_follow_from_seconds_and_tokens():
    record = step()
    assert record.seconds_per_step == 5.6
    assert record.tokens_per_second_per_gpu == 4_194_304 / 5.6 / 64
    assert record.tflops_per_gpu == record.tokens_per_second_per_gpu * 4.8e10 / 1e12
    assert record.mfu == record.tflops_per_gpu * 1e12 / 989e12
    assert record.time_left_s == 880 * 5.6


def test_the_console_line_of_a_step():
    assert console_line(step(), 1000) == (
        "step  120/1000  loss  2.5000  lr 3.00e-04  grad norm   1.23   5.600 s/step   11,703 tok/s/GPU   561.7 TFLOP/s/GPU"
        "  MFU 56.8 %   61.2 GiB  data wait  0 %   503 M tokens  left 1 h 22 min"
    )


def test_the_line_says_what_layers_report():
    losses = {"load_balancing_loss": 1.0234, "seq_load_balancing_loss": 1.5, "z_loss": 4.31, "mtp_1_loss": 5.25}
    line = console_line(step(layer_metrics={**losses, "max_expert_load": 1.4, "dropped_tokens": 0.0125}), 1000)
    assert (
        "  grad norm   1.23  balance 1.023  seq balance 1.500  mtp 1 5.2500  z 4.310  busiest expert 1.40×  dropped 1.2 %  "
        in line
    )


def test_what_layers_report_is_the_mean_over_the_intervals_steps_and_survives_a_resume():
    interval = Interval()
    interval.add(2.0, layer_metrics={"z_loss": 1.0})
    interval = Interval.from_state_dict(interval.state_dict())
    interval.add(2.0, layer_metrics={"z_loss": 4.0}, skipped=True)
    assert interval.layer_metrics == {"z_loss": 2.5}


def test_the_line_says_the_epoch_the_share_of_the_card_and_the_wait_for_data():
    measure = replace(MEASURE, samples_per_epoch=81_920, memory_of_gpu=80 * 2**30)
    values = {"lr": 3e-4, "consumed_samples": 122_880, "consumed_tokens": 503_316_480, "memory_gib": 60.0}
    record = measure.step(summed([2.0]), iteration=120, seconds=8.0, timed_steps=1, waited=2.0, **values)
    assert (record.epoch, record.memory_share, record.data_wait) == (1.5, 0.75, 0.25)
    assert " 60.0 GiB (75 %)  data wait 25 %  epoch 1.50  left " in console_line(record, 1000)


def test_the_columns_of_two_lines_stand_below_each_other():
    first = console_line(step(), 1000)
    second = console_line(step(iteration=7, loss=10.25, grad_norm=123.4, memory_gib=101.0, mfu=0.05), 1000)
    assert [first.index(word) for word in ("lr", "tok/s", "GiB", "left")] == [
        second.index(word) for word in ("lr", "tok/s", "GiB", "left")
    ]


def test_trouble_is_on_the_line():
    line = console_line(step(loss=None, skipped_steps=2, loss_scale=65536.0), 1000)
    assert line.endswith("  loss scale 65536  skipped 2")
    assert "loss    none" in line


def test_a_line_on_cpus_claims_no_gpu():
    line = console_line(step(device="cpu", mfu=None), 1000)
    assert "GPU" not in line
    assert "MFU" not in line


def test_colour_changes_no_letter():
    line = console_line(step(), 1000, color=True)
    assert click.unstyle(line) == console_line(step(), 1000) != line


def test_the_console_line_of_an_evaluation():
    record = evaluation(120, split="validation", loss=2.5)
    assert console_line(record, 1000) == "step  120/1000  validation loss 2.5000  perplexity 12.18"


def test_perplexity_beyond_a_float_is_infinite():
    assert evaluation(1, split="test", loss=1e6).perplexity == math.inf


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 00 min"), (4980, "1 h 23 min"), (200_000, "2 d 7 h")],
)
def test_durations_for_a_person(seconds, words):
    assert duration(seconds) == words


def test_memory_on_a_cpu_is_at_least_what_a_tensor_took():
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(int((before + 0.2) * 2**30) // 4)
    assert memory_gib(torch.device("cpu")) >= before + 0.2
    assert held.numel() > 0


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA B200", "fp4", 9000),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
    ],
)
def test_peaks_are_found_by_the_names_that_cuda_gives(name, precision, tflops):
    assert peak_flops(name, precision=precision) == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA H20", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("cpu", "bf16"),
        ("", "bf16"),
    ],
)
def test_what_is_not_known_has_no_peak(name, precision):
    assert peak_flops(name, precision=precision) is None
