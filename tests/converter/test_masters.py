"""fp32 masters in optimizer state are held against weights: checkpoints of Megatron-LM 0.19.0 with megatron-core 0.19.2."""

from __future__ import annotations

import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from megatron.core.dist_checkpointing.validation import save_integrity_manifest

from converter import check, masters
from converter.cli import cli
from formats.errors import UserError
from formats.spec import DTYPES


@pytest.fixture
def written(golden, tmp_path):
    """A checkpoint of tests/golden/optimizer_state, unpacked."""

    def unpack(name):
        with tarfile.open(golden / "optimizer_state" / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / name

    return unpack


def test_masters_that_round_to_their_weights_are_right(written):
    result = check(written("right"))
    assert (result.whole, result.masters, result.wrong_masters, result.without_masters) == (True, 15, [], [])


def test_shifted_state_is_found_and_weights_are_named_by_layer(written):
    result = check(written("shifted"))
    assert not result.whole
    assert result.masters == 15
    assert len(result.wrong_masters) == 11
    assert result.wrong_masters[0] == "embedding.word_embeddings.weight"
    assert "decoder.final_layernorm.weight" not in result.wrong_masters


@pytest.mark.parametrize("count", [8, 100])
def test_pieces_of_any_size_find_the_same(count, written, monkeypatch):
    monkeypatch.setattr(masters, "PIECE_BYTES", 4 * count)
    assert len(check(written("shifted")).wrong_masters) == 11
    assert check(written("right")).whole


def test_the_command_names_the_first_and_what_to_do(written):
    answer = CliRunner().invoke(cli, ["inspect", str(written("shifted")), "--check"])
    assert answer.exit_code == 1
    assert answer.stdout == (
        "wrong optimizer state: the fp32 master of `embedding.word_embeddings.weight` does not round to the weight, "
        "and 10 more\n"
        "DAMAGED: 0 files checked, 15 weights compared with fp32 masters; no hashes are stored for the files\n"
    )
    assert answer.stderr == (
        "\nhint: the weights are intact, the optimizer state is not (megatron-core 0.15 to 0.19.2 could shift it); start from "
        "the weights: `checkpoint.pretrained_checkpoint` of mbtrain, `--finetune` of Megatron-LM\n"
    )


def test_the_command_answers_in_json_too(written):
    answer = CliRunner().invoke(cli, ["inspect", str(written("right")), "--check", "--json"])
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["masters"] == 15


def test_state_by_buckets_is_compared(written):
    result = check(written("by_buckets"))
    assert (result.masters, result.wrong_masters, result.without_masters) == (15, [], [])


def test_state_that_cannot_be_read_is_not_compared_and_that_is_said(written):
    root = written("by_buckets")
    metadata = root / "iter_0000003" / ".metadata"
    index = pickle.loads(metadata.read_bytes())
    index.state_dict_metadata = {name: entry for name, entry in index.state_dict_metadata.items() if ".bucket_idx_0." not in name}
    metadata.write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"has no `integrity\.json`"):
        check(root)
    save_integrity_manifest(str(root / "iter_0000003"))
    result = check(root)
    assert (result.whole, result.masters) == (True, 0)
    assert len(result.without_masters) == 1
    assert result.without_masters[0].startswith(
        "15 weights: `optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, "
    )
    assert "has no bucket 0 of the optimizer state" in result.without_masters[0]


def test_a_damaged_file_is_named_before_anything_is_compared(written):
    root = written("right")
    save_integrity_manifest(str(root / "iter_0000003"))
    damaged = root / "iter_0000003" / "__0_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    damaged.write_bytes(data)
    result = check(root)
    assert (result.changed, result.masters) == (["__0_0.distcp"], 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_is_torchs(dtype):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    made = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=made).to(torch.int32)
    ties = torch.arange(2**15, dtype=torch.int32) * 2**16 + 2**15
    master = torch.cat([bits, ties]).view(torch.float32)
    weight = master.to(kind).view(torch.uint16).numpy().view(DTYPES[dtype])
    assert masters.rounds_to(master.numpy(), weight)
    weight.view(np.uint16)[np.flatnonzero(np.isfinite(weight))[0]] ^= 1
    assert not masters.rounds_to(master.numpy(), weight)


def test_a_wrong_number_is_seen_wherever_it_is(monkeypatch):
    monkeypatch.setattr(masters, "ROUNDED_AT_ONCE", 3)
    master, right = np.arange(8, dtype=np.float32).reshape(2, 4), np.arange(8).astype(DTYPES["bf16"]).reshape(2, 4)
    assert masters.rounds_to(master, right)
    for number in range(8):
        wrong = right.copy()
        wrong.reshape(-1)[number] += 1
        assert not masters.rounds_to(master, wrong)
