"""Sources and targets as users name them: snapshots of links, any characters in names, other working directories."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from converter import UserError, hf_to_mcore, inspect, mcore_to_hf, verify
from tests.models import model_tree

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(model, cache):
    """The model as the Hub's cache keeps it: files in `blobs`, links to them in the snapshot."""
    repo = cache / "models--meta-llama--Llama-tiny"
    (repo / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob = repo / "blobs" / f"{number:064x}"
        shutil.copy(path, blob)
        link = repo / "snapshots" / COMMIT / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repo / "snapshots" / COMMIT


def test_a_snapshot_of_links_converts_both_ways(model_folder, tmp_path):
    source = snapshot(model_folder("gqa"), tmp_path)
    hf_to_mcore(source, tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(model_folder("gqa"))
    assert not any(path.is_symlink() for path in (tmp_path / "back").rglob("*"))
    assert verify(source, tmp_path / "m").same


def test_a_snapshot_whose_blob_is_gone_names_the_link(model_folder, tmp_path):
    source = snapshot(model_folder("gqa"), tmp_path)
    (source / "model.safetensors").resolve().unlink()
    for action in (lambda: hf_to_mcore(source, tmp_path / "m"), lambda: inspect(source)):
        with pytest.raises(UserError, match=r"`model.safetensors` of `.*` is a link to `../../blobs/\d+`, which does not exist"):
            action()


def test_the_folder_of_a_cached_model_leads_to_its_snapshot(model_folder, tmp_path):
    source = snapshot(model_folder("gqa"), tmp_path)
    with pytest.raises(UserError, match=f"give one of them: `{source}`"):
        inspect(source.parent.parent)


def test_a_checkpoint_behind_links_converts(model_folder, tmp_path):
    hf_to_mcore(model_folder("gqa"), tmp_path / "m", tp=2)
    (tmp_path / "links" / "iter_0000000").mkdir(parents=True)
    for path in (tmp_path / "m").rglob("*"):
        link = tmp_path / "links" / path.relative_to(tmp_path / "m")
        link.mkdir(exist_ok=True) if path.is_dir() else link.symlink_to(path)
    mcore_to_hf(tmp_path / "links", tmp_path / "back")
    (tmp_path / "link to links").symlink_to(tmp_path / "links")
    mcore_to_hf(tmp_path / "link to links", tmp_path / "again")
    assert model_tree(tmp_path / "back") == model_tree(tmp_path / "again") == model_tree(model_folder("gqa"))


@pytest.mark.parametrize("name", ["my model", "モデル", "modèle (2) [fp32] 100%", "a'b\"c$d", "-model", "{file}"])
def test_any_name_serves_both_ways(model_folder, tmp_path, name):
    shutil.copytree(model_folder("gqa"), tmp_path / name / "in here")
    hf_to_mcore(tmp_path / name / "in here", tmp_path / name / f"{name} mcore")
    mcore_to_hf(tmp_path / name / f"{name} mcore", tmp_path / name / f"{name} back")
    assert model_tree(tmp_path / name / f"{name} back") == model_tree(model_folder("gqa"))


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_paths_are_those_of_the_working_directory(model_folder, tmp_path, monkeypatch, absolute):
    shutil.copytree(model_folder("gqa"), tmp_path / "a" / "model")
    (tmp_path / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b" / "c")
    start = tmp_path if absolute else Path("..", "..")
    hf_to_mcore(start / "a" / "model", start / "b" / "m")
    mcore_to_hf("../m", "back")
    assert model_tree(tmp_path / "b" / "c" / "back") == model_tree(model_folder("gqa"))
    monkeypatch.chdir(tmp_path / "b" / "m" / "iter_0000000")
    mcore_to_hf(".", tmp_path / "again")
    monkeypatch.chdir(tmp_path / "a" / "model")
    assert verify(".", tmp_path / "again").same


def test_a_file_and_a_path_that_is_not_there(model_folder, tmp_path):
    with pytest.raises(UserError, match=r"is a file\n\nhint: give the directory that it is in: `.*/model`"):
        hf_to_mcore(model_folder("gqa") / "model.safetensors", tmp_path / "m")
    (tmp_path / "llama.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"llama.gguf` is a file: GGUF, the format of llama.cpp"):
        inspect(tmp_path / "llama.gguf")
    with pytest.raises(
        UserError, match=r"`meta-llama/Llama-3.2-1B` does not exist\n\nhint: a model on the Hub is `hf://meta-llama"
    ):
        inspect("meta-llama/Llama-3.2-1B")
