"""megatron-core's own verifier is the judge of `integrity.json`; `inspect --check` must find what it finds, and more."""

from __future__ import annotations

import json
import shutil

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import save_integrity_manifest, verify_integrity_manifest

from converter import Reporter, check, hf_to_mcore, mcore_to_hf
from formats.errors import UserError
from tests.models import tree


def flip(path, at=-1000):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def iteration(checkpoint):
    return checkpoint / "iter_0000000"


@pytest.mark.parametrize("options", [{}, {"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2, "vpp": 2}], ids=str)
def test_megatron_cores_verifier_confirms_every_layout(model_folder, tmp_path, options):
    hf_to_mcore(model_folder("padded_vocab", dtype="bfloat16"), tmp_path / "m", **options)
    verify_integrity_manifest(str(tmp_path / "m" / "iter_0000000"))
    assert check(tmp_path / "m").whole


def test_every_file_of_the_folder_is_listed_by_relative_path(iteration):
    listed = json.loads((iteration / "integrity.json").read_text())["files"].keys()
    existing = {path.relative_to(iteration).as_posix() for path in iteration.rglob("*") if path.is_file()}
    assert listed == existing - {"integrity.json"}
    assert {".metadata", "__0_0.distcp", "conversion.json", "huggingface/files/config.json"} <= listed


def test_the_hashes_are_those_that_megatron_core_writes(iteration):
    ours = json.loads((iteration / "integrity.json").read_text())
    (iteration / "integrity.json").unlink()
    save_integrity_manifest(str(iteration))
    theirs = json.loads((iteration / "integrity.json").read_text())
    assert theirs["algorithm"] == ours["algorithm"]
    assert theirs["files"].items() <= ours["files"].items()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run_config.yaml", "huggingface/files/tokenizer.json"])
def test_a_flipped_byte_is_found_and_named_by_both(iteration, name):
    flip(iteration / name, at=-100)
    with pytest.raises(CheckpointingException, match=name):
        verify_integrity_manifest(str(iteration))
    result = check(iteration)
    assert (result.changed, result.missing, result.unlisted, result.whole) == ([name], [], [], False)


def test_missing_and_unlisted_files_are_named(iteration):
    (iteration / "train_state.pt").unlink()
    (iteration / "huggingface" / "notes.txt").write_text("x")
    result = check(iteration.parent)
    assert (result.changed, result.missing, result.unlisted) == ([], ["train_state.pt"], ["huggingface/notes.txt"])
    assert not result.whole


@pytest.mark.parametrize("document", [
    '{"algorithm": "md5", "files": {}}', '{"files": []}', '{"files": {"../x": "0"}}', '{"files": {"/etc/passwd": "0"}}',
    '{"files": {"a": 5}}', "[]", "{",
])  # fmt: skip
def test_a_list_that_is_misshapen_or_leads_out_is_refused(iteration, document):
    (iteration / "integrity.json").write_text(document)
    with pytest.raises(UserError, match=r"integrity\.json"):
        check(iteration)


def test_it_can_be_left_out(model_folder, tmp_path):
    hf_to_mcore(model_folder("gqa"), tmp_path / "m", integrity=False)
    assert not (tmp_path / "m" / "iter_0000000" / "integrity.json").exists()
    with pytest.raises(UserError, match=r"has no `integrity\.json`"):
        check(tmp_path / "m")


def test_an_export_is_held_against_the_hashes_of_its_tensors(checkpoint, tmp_path):
    mcore_to_hf(checkpoint, tmp_path / "hf")
    assert check(tmp_path / "hf").whole
    flip(tmp_path / "hf" / "model.safetensors")
    assert len(check(tmp_path / "hf").changed) == 1
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "more.safetensors")
    (tmp_path / "hf" / "conversion.json").unlink()
    with pytest.raises(UserError, match=r"there are no hashes to check it against\n\nhint: `mbconvert verify A B` compares it"):
        check(tmp_path / "hf")


def test_without_integrity_nothing_is_hashed_and_the_record_says_so(model_folder, tmp_path):
    """Neither way; the bytes of everything else are the same, and a check names the option."""
    for name, options in (("hashed", {}), ("not", {"integrity": False})):
        hf_to_mcore(model_folder("gqa", dtype="bfloat16"), tmp_path / name / "m", tp=2, pp=2, **options)
        mcore_to_hf(tmp_path / "hashed" / "m", tmp_path / name / "hf", **options)
    for folder in ("m/iter_0000000", "hf"):
        hashed, plain = (json.loads((tmp_path / name / folder / "conversion.json").read_text()) for name in ("hashed", "not"))
        assert len(hashed["blake3"]) > 10
        files = [name for name in hashed["files"] if not name.endswith("/integrity.json")]
        assert plain == {**hashed, "files": files, "blake3": None, "options": {**hashed["options"], "integrity": False}}
    differ = {name for name, data in tree(tmp_path / "not").items() if tree(tmp_path / "hashed").get(name) != data}
    assert differ == {"m/iter_0000000/conversion.json", "hf/conversion.json"}
    with pytest.raises(UserError, match=r"`conversion\.json` lists no hashes of tensors: it was written with `--no-integrity`"):
        check(tmp_path / "not" / "hf")


def test_a_run_that_hashes_nothing_goes_on_where_it_stopped(model_folder, tmp_path):
    source = model_folder("gqa", dtype="bfloat16")
    hf_to_mcore(source, tmp_path / "straight", integrity=False)
    seen = []

    def stop_half_way(count):
        seen.append(count)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_mcore(source, tmp_path / "m", integrity=False, workers=1, reporter=Reporter(progress=stop_half_way))
    summary = hf_to_mcore(source, tmp_path / "m", integrity=False, resume=True)
    assert summary.reused_bytes == sum(seen)
    assert tree(tmp_path / "m") == tree(tmp_path / "straight")
