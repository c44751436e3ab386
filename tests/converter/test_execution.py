"""A conversion is planned once, as plain data, and carried out by something else: options, targets, dry runs."""

from __future__ import annotations

import shutil
from contextlib import closing

import pytest

from converter import Reporter, UserError, adapter_to_hf, hf_to_mcore, mcore_to_hf
from converter.execute import execute
from converter.exporting import ExportOptions, plan_export
from converter.importing import ImportOptions, plan_import
from converter.sources import huggingface_source
from converter.values import dtype_of_most_bytes, dtype_of_most_parameters
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.outputs import LocalOutputs
from formats.spec import DTYPES, TensorSpec
from formats.torch_dist import TorchDistReader
from tests.models import tree

IMPORT = ImportOptions(tp=2, pp=2, vpp=1, pp_layout=None, dtype="keep", make_vocab_size_divisible_by=128, integrity=True)
EXPORT = ExportOptions(hf_config=None, max_shard_size=100_000, dtype="keep", integrity=True)


@pytest.fixture
def folder(model_folder):
    return model_folder("gqa", dtype="bfloat16")


def planned(folder, kind):
    if kind == "import":
        return plan_import(huggingface_source(HuggingFaceReader(LocalFolder(folder))), IMPORT, Reporter())
    root = LocalFolder(folder)
    return plan_export(TorchDistReader(root), root, EXPORT, Reporter())


@pytest.mark.parametrize("kind", ["import", "export"])
def test_one_plan_is_carried_out_to_several_targets(folder, checkpoint, kind, tmp_path):
    source = folder if kind == "import" else checkpoint
    conversion = planned(source, kind)
    with closing(conversion.reader):
        for name, workers in (("one", 1), ("two", 3)):
            execute(conversion, str(tmp_path / name), options={"workers": workers}, reporter=Reporter(), sources=[])
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    command, options = (hf_to_mcore, {"tp": 2, "pp": 2}) if kind == "import" else (mcore_to_hf, {"max_shard_size": 100_000})
    command(source, tmp_path / "three", **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_plan_outlives_its_source(folder, checkpoint, kind, tmp_path):
    source = shutil.copytree(folder if kind == "import" else checkpoint, tmp_path / "source")
    conversion = planned(source, kind)
    with closing(conversion.reader):
        execute(conversion, str(tmp_path / "made"), options={}, reporter=Reporter(), sources=[])
    shutil.rmtree(source)
    assert conversion.plan.files == {name: len(data) for name, data in tree(tmp_path / "made").items()}


def test_a_dry_run_opens_no_output(folder, tmp_path, monkeypatch):
    def opened(*_, **__):
        raise AssertionError("an output was opened")

    monkeypatch.setattr(LocalOutputs, "__init__", opened)
    summary = hf_to_mcore(folder, tmp_path / "made", tp=2, dry_run=True)
    assert summary.dry_run
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="an output was opened"):
        hf_to_mcore(folder, tmp_path / "made", tp=2)


@pytest.mark.parametrize("command", [hf_to_mcore, mcore_to_hf, adapter_to_hf])
def test_a_keyword_that_no_conversion_takes_is_refused(folder, tmp_path, command):
    with pytest.raises(TypeError, match="a conversion takes no keyword argument `worker`"):
        command(folder, tmp_path / "made", worker=3)
    with pytest.raises(UserError, match="`workers` is 0, which should be 1 to 256"):
        command(folder, tmp_path / "made", workers=0)
    assert not list(tmp_path.iterdir())


def test_the_dtype_of_most_parameters_may_not_be_that_of_most_bytes():
    specs = [TensorSpec("a", (60,), DTYPES["bf16"]), TensorSpec("b", (40,), DTYPES["fp32"])]
    assert dtype_of_most_parameters(specs) == DTYPES["bf16"]
    assert dtype_of_most_bytes(specs) == DTYPES["fp32"]
