"""Tensors that no Megatron model has move as weights do: a piece at a time, hashed as they pass, and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from converter import hf_to_mcore, mcore_to_hf
from tests.interrupted import EXTRA, ROOT, Conversion, journaled, with_extras, written
from tests.models import model_tree, tree

LARGE = 96 << 20
SMALL_CHANGE = 12 << 20
"""Bytes by which two runs of the same conversion may differ: allocators and buffers."""


def converted(*arguments):
    command = [sys.executable, "-m", "converter", *map(str, arguments), "--workers", "2", "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What both ways said of a model with small extras and of one with large ones, planned and carried out."""
    folder, results = tmp_path_factory.mktemp("extras"), {}
    for size in (64, LARGE):
        ways = {
            "hf-to-mcore": (with_extras(folder / f"hf-{size}", size), folder / f"m-{size}"),
            "mcore-to-hf": (folder / f"m-{size}", folder / f"back-{size}"),
        }
        for command, (source, target) in ways.items():
            planned = converted(command, source, target, "--dry-run")
            results[command, size] = planned, converted(command, source, target), source, target
    return results


@pytest.mark.parametrize("command", ["hf-to-mcore", "mcore-to-hf"])
def test_memory_does_not_grow_with_extras(runs, command):
    (few, ran_few, *_), (many, ran_many, *_) = runs[command, 64], runs[command, LARGE]
    assert many["total_bytes"] - few["total_bytes"] > LARGE - 1000
    assert abs(many["peak_memory"] - few["peak_memory"]) < SMALL_CHANGE
    assert abs(ran_many["peak_memory"] - ran_few["peak_memory"]) < SMALL_CHANGE
    assert ran_many["peak_memory"] < many["peak_memory"] + SMALL_CHANGE


def test_large_extras_come_back_and_are_hashed_on_the_way(runs):
    _, _, source, target = runs["hf-to-mcore", LARGE]
    stored = load_file(target / "iter_0000000" / "huggingface" / "extras.safetensors")
    (name,) = stored
    assert (name, stored[name].tobytes()) == (EXTRA.format(0), np.arange(LARGE // 4, dtype=np.float32).tobytes())
    digests = [
        json.loads((folder / "conversion.json").read_text())["blake3"][name]
        for folder in (target / "iter_0000000", runs["mcore-to-hf", LARGE][3])
    ]
    assert digests == [blake3(stored[name].tobytes()).hexdigest()] * 2
    assert model_tree(runs["mcore-to-hf", LARGE][3]) == model_tree(source)


def test_an_extra_without_elements_is_hashed_too(tmp_path):
    source = with_extras(tmp_path / "hf", 64, 0)
    hf_to_mcore(source, tmp_path / "m", verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    for record in (tmp_path / "m" / "iter_0000000", tmp_path / "back"):
        hashes = json.loads((record / "conversion.json").read_text())["blake3"]
        assert hashes[EXTRA.format(1)] == blake3().hexdigest()
    assert model_tree(tmp_path / "back") == model_tree(source)


@pytest.mark.parametrize("command", ["hf-to-mcore", "mcore-to-hf"])
def test_killed_among_extras_it_is_finished_with_the_same_bytes(tmp_path, command):
    source = with_extras(tmp_path / "hf", *[300_000] * 4)
    if command == "mcore-to-hf":
        source = tmp_path / "megatron"
        hf_to_mcore(tmp_path / "hf", source)
    whole = tmp_path / "whole"
    log = tmp_path / "log-whole"
    assert Conversion(command, source, whole, log=log, pause=0).end()[0] == 0
    number = len(written(log)) - 20  # of pieces: extras come last
    process = Conversion(command, source, tmp_path / "m", log=tmp_path / "log", pause=0, hold={"write": number})
    process.until("write", number)
    assert process.stop()[0] == -signal.SIGKILL
    assert len(journaled(tmp_path / "m")) > number // 2
    resumed = Conversion(command, source, tmp_path / "m", "--resume", "--verify", log=tmp_path / "log-2", pause=0)
    assert resumed.end()[0] == 0
    assert resumed.summary["reused_bytes"] > 1_000_000
    assert tree(tmp_path / "m") == tree(whole)
