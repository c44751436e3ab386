"""`mbconvert merge`: what it prints, what it imports, and how much memory it takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.convert import make_model, specs
from converter import hf_to_mcore
from tests.converter.test_cli import mbconvert

SHAPE = {"hidden": 2048, "layers": 2, "heads": 32, "groups": 8, "head_dim": 64, "ffn": 8192, "vocab": 32_000, "tied": False}
RANK = 16


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of half a gigabyte, its files full of holes, and an adapter of all its linear layers."""
    folder = tmp_path_factory.mktemp("large")
    make_model(folder / "base", SHAPE, data=False)
    generator, factors = np.random.default_rng(1), {}
    for spec in specs(SHAPE):
        if "_proj" in spec.name:
            module = f"base_model.model.{spec.name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = generator.standard_normal((RANK, spec.shape[1]), np.float32)
            factors[f"{module}.lora_B.weight"] = generator.standard_normal((spec.shape[0], RANK), np.float32)
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": modules, "task_type": "CAUSAL_LM"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("to", ["hf", "mcore"])
def test_memory_does_not_grow_with_the_model(large, tmp_path, to):
    arguments = "merge", large / "base", large / "adapter", tmp_path / "merged", "--to", to, "--json"
    planned = json.loads(mbconvert(*arguments, "--dry-run").stdout)
    done = mbconvert(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["total_bytes"] > 500_000_000
    assert summary["files"] == planned["files"]
    assert summary["peak_memory"] < min(planned["peak_memory"], 128 << 20)


def test_no_merge_imports_torch(model_folder, peft_folder, tmp_path):
    folder, adapter = model_folder("gqa", dtype="bfloat16"), peft_folder(use_dora=True)
    hf_to_mcore(folder, tmp_path / "m")
    for command in (
        [folder, adapter, tmp_path / "a", "--verify", "--dtype", "fp32", "--max-shard-size", "50KB"],
        [folder, adapter, tmp_path / "b", "--to", "mcore", "--tp", 2, "--verify"],
        [tmp_path / "m", adapter, tmp_path / "c", "--pp", 2, "--vpp", 2], [tmp_path / "m", adapter, tmp_path / "d", "--to", "hf"],
        [folder, adapter, tmp_path / "x", "--dry-run"], [folder, adapter, tmp_path / "y", "--allow-other-base", "--quiet"],
    ):  # fmt: skip
        done = mbconvert("merge", *command)
        assert done.returncode == 0, (command, done.stderr)


def test_what_it_says(model_folder, peft_folder, tmp_path):
    done = mbconvert("merge", model_folder("gqa"), peft_folder(), tmp_path / "m", "--dtype", "bf16")
    assert done.stdout == ""
    assert "note: the adapter has no fingerprint of its base" in done.stderr
    assert "note: weights are cast from fp32 to bf16" in done.stderr
    assert "done: 39 tensors, " in done.stderr
    (tmp_path / "empty").mkdir()
    done = mbconvert("merge", model_folder("gqa"), tmp_path / "empty", tmp_path / "n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: `{tmp_path / 'empty'}` ")
    assert "\n\nhint: " in done.stderr
    done = mbconvert("merge", model_folder("gqa"), peft_folder())
    assert (done.returncode, done.stdout) == (2, "")
