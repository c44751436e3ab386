"""A bad Megatron checkpoint gets a clear error that names things, never gives other data, and leaves nothing behind."""

from __future__ import annotations

import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from converter import mcore_to_hf
from tests.refusal import refused


@pytest.mark.parametrize(("tracked", "pattern"), [
    ("9", "says iteration 9, but `iter_0000009` is not there\n\nhint: there are: iter_0000000"),
    ("nonsense", "says `nonsense`, which is not an iteration"), ("-1", "which is not an iteration"),
    ("../../etc", "which is not an iteration"), ("", "which is not an iteration"), ("release", "`release` is not there"),
])  # fmt: skip
def test_an_iteration_that_is_not_there(checkpoint, tmp_path, tracked, pattern):
    (checkpoint / "latest_checkpointed_iteration.txt").write_text(tracked)
    refused(mcore_to_hf, checkpoint, tmp_path, pattern)


def test_an_iteration_that_is_not_complete(checkpoint, tmp_path):
    (checkpoint / "iter_0000000" / ".metadata").unlink()
    refused(mcore_to_hf, checkpoint, tmp_path, "incomplete checkpoint: `.metadata` is missing")
    refused(mcore_to_hf, checkpoint / "iter_0000000", tmp_path, "incomplete checkpoint: `.metadata` is missing")


def test_other_formats_are_named(checkpoint, tmp_path):
    (checkpoint / "iter_0000000" / "metadata.json").write_text('{"sharded_backend": "zarr3"}')
    refused(mcore_to_hf, checkpoint, tmp_path, "is in the `zarr3` format, which is not supported yet")
    (checkpoint / "iter_0000000" / "mp_rank_00").mkdir()
    refused(mcore_to_hf, checkpoint, tmp_path, "has no `mp_rank_00/model_optim_rng.pt`")


def edit_metadata(checkpoint, change):
    path = checkpoint / "iter_0000000" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


FC2 = "decoder.layers.mlp.linear_fc2.weight"


def hole(metadata):
    metadata.state_dict_metadata[FC2].chunks.pop()


def overlapping(metadata):
    chunks = metadata.state_dict_metadata[FC2].chunks
    chunks[1] = chunks[0]


def shifted(metadata):
    chunks, at = metadata.state_dict_metadata[FC2].chunks, torch.Size([0, 0, 24])
    metadata.storage_data[MetadataIndex(FC2, at)] = metadata.storage_data.pop(MetadataIndex(FC2, chunks[1].offsets))
    chunks[1] = ChunkStorageMetadata(at, chunks[1].sizes)


def past_the_end(metadata):
    metadata.storage_data[MetadataIndex(FC2, torch.Size([0, 0, 0]))].offset += 1 << 40


def renamed(name):
    def change(metadata):
        metadata.storage_data[MetadataIndex(FC2, torch.Size([0, 0, 0]))].relative_path = name

    return change


def unplaced(metadata):
    del metadata.storage_data[MetadataIndex(FC2, torch.Size([0, 0, 0]))]


def without_fc2(metadata):
    del metadata.state_dict_metadata[FC2]


@pytest.mark.parametrize(("change", "pattern"), [
    (hole, f"the chunks of `{FC2}` do not tile its shape"), (overlapping, f"the chunks of `{FC2}` do not tile its shape"),
    (shifted, f"the chunks of `{FC2}` do not tile its shape"), (past_the_end, f"`{FC2}` runs past the end of `__0_0.distcp`"),
    (renamed("../__0_0.distcp"), "which is not a valid path inside the directory"),
    (renamed("/etc/passwd"), "`/etc/passwd`, which is not a valid path inside the directory"),
    (renamed("a/../../b"), "which is not a valid path inside the directory"),
    (renamed("gone"), r"names `gone`, which is not in .*\n\nhint: .* copy it again"),
    (unplaced, "gives no location of"), (without_fc2, "the checkpoint lacks `decoder.layers.0.mlp.linear_fc2.weight`"),
])  # fmt: skip
def test_metadata_that_lies(checkpoint, tmp_path, change, pattern):
    edit_metadata(checkpoint, change)
    refused(mcore_to_hf, checkpoint, tmp_path, pattern)


def test_a_checkpoint_of_another_shape_or_dtype_than_promised(checkpoint, tmp_path):
    def swap(metadata):
        first, second = (
            MetadataIndex(FC2, torch.Size([0, 0, 0])),
            MetadataIndex("decoder.final_layernorm.weight", torch.Size([0])),
        )
        data = metadata.storage_data
        data[first], data[second] = data[second], data[first]

    edit_metadata(checkpoint, swap)
    refused(mcore_to_hf, checkpoint, tmp_path, r"holds \[64\] of bf16, but `.metadata` says \[1, 64, 48\] of bf16")


class Touch:
    """Pickles as a call that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["metadata", "common.pt", "common_state"])
def test_a_hostile_pickle_is_refused_and_never_runs(checkpoint, tmp_path, part):
    trap, folder = tmp_path / "ran", checkpoint / "iter_0000000"
    shutil.rmtree(folder / "huggingface")
    (folder / "run_config.yaml").unlink()
    if part == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Touch(trap)))
    elif part == "common.pt":
        torch.save({"args": Touch(trap)}, folder / "common.pt")
    else:
        torch.save([{"args": Touch(trap)}], folder / "evil")

        def point(metadata):
            info = metadata.storage_data[MetadataIndex("common_state/shard_0_1")]
            info.relative_path, info.offset, info.length = "evil", 0, (folder / "evil").stat().st_size

        edit_metadata(checkpoint, point)
    refused(mcore_to_hf, checkpoint, tmp_path, r"which no checkpoint needs; it was not executed")
    assert not trap.exists()


def same_place(metadata):
    data, (first, second, *_) = metadata.storage_data, metadata.state_dict_metadata[FC2].chunks
    data[MetadataIndex(FC2, second.offsets)] = data[MetadataIndex(FC2, first.offsets)]


def reshaped(metadata):
    chunk = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    chunk.size, chunk.chunks[0].sizes = torch.Size([8, 8]), torch.Size([8, 8])
    chunk.chunks[0].offsets = torch.Size([0, 0])
    key = MetadataIndex("decoder.final_layernorm.weight", torch.Size([0]))
    metadata.storage_data[MetadataIndex(key.fqn, torch.Size([0, 0]))] = metadata.storage_data.pop(key)


def assign(name, value):
    def change(metadata):
        vars(metadata)[name] = value

    return change


def chunk_field(name, value):
    def change(metadata):
        object.__setattr__(metadata.state_dict_metadata[FC2].chunks[0], name, value)

    return change


def place_field(name, value):
    def change(metadata):
        setattr(metadata.storage_data[MetadataIndex(FC2, torch.Size([0, 0, 0]))], name, value)

    return change


@pytest.mark.parametrize(("change", "pattern"), [
    (same_place, f"puts `{FC2}` and `{FC2}` in the same bytes"), (reshaped, r"by `config.json` it should be \[64\]"),
    (assign("storage_data", {1: 2}), "not a valid index of torch"), (assign("storage_data", None), "is not the index"),
    (assign("state_dict_metadata", {"a": 1}), "not a valid index of torch"),
    (assign("state_dict_metadata", {5: torch.distributed.checkpoint.metadata.BytesStorageMetadata()}), "name is not text"),
    (chunk_field("offsets", None), "whole numbers"), (chunk_field("sizes", torch.Size([1])), "another number of dimensions"),
    (chunk_field("sizes", (1, 64, 10**5000)), "whole numbers"), (chunk_field("sizes", (1.5, 64, 48)), "whole numbers"),
    (place_field("offset", 1.5), "does not give the location"),
    (place_field("length", None), "not a valid index of torch: it lacks `length`"),
    (place_field("relative_path", "a" * 300), "which is not a valid path inside the directory"),
    (lambda m: setattr(m.state_dict_metadata[FC2], "chunks", 5), "not a valid index of torch"),
    (lambda m: setattr(m.state_dict_metadata[FC2], "properties", 5), "not a valid index of torch"),
])  # fmt: skip
def test_a_misshapen_index_is_named_and_never_gives_other_data(checkpoint, tmp_path, change, pattern):
    edit_metadata(checkpoint, change)
    refused(mcore_to_hf, checkpoint, tmp_path, pattern)


def test_a_truncated_data_file_is_found_before_any_byte_moves(checkpoint, tmp_path):
    path = checkpoint / "iter_0000000" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-5000])
    refused(mcore_to_hf, checkpoint, tmp_path, "runs past the end of `__0_0.distcp`", dry_run=True)


def test_a_forged_directory_size_is_not_believed(checkpoint, tmp_path):
    path = checkpoint / "iter_0000000" / "__0_0.distcp"
    data = path.read_bytes()
    end = data.index(b"PK\x05\x06", data.index(b"FloatStorage") if b"FloatStorage" in data else data.index(b"BFloat16Storage"))
    path.write_bytes(data[: end + 12] + struct.pack("<I", 0x7FFFFFFF) + data[end + 16 :])
    refused(mcore_to_hf, checkpoint, tmp_path, "its directory claims")


def header_of(checkpoint):
    return next((checkpoint / "iter_0000000" / "huggingface" / "headers").iterdir())


def test_damaged_headers_that_travelled_are_named(checkpoint, tmp_path):
    header = header_of(checkpoint)
    raw = header.read_bytes()
    header.write_bytes(struct.pack("<Q", 5) + raw[8:])
    refused(mcore_to_hf, checkpoint, tmp_path, "does not have the length that its first 8 bytes give")
    header.write_bytes(raw)
    header.with_name("model-00009.safetensors").write_bytes(raw)
    refused(mcore_to_hf, checkpoint, tmp_path, "is in two headers")


def test_a_map_of_other_tensors_is_left_with_a_word(checkpoint, tmp_path):
    from converter import Reporter

    header_of(checkpoint).write_bytes(header_of(checkpoint).read_bytes().replace(b"model.norm.weight", b"model.nurm.weight"))
    notes = []
    mcore_to_hf(checkpoint, tmp_path / "back", max_shard_size=50_000)
    mcore_to_hf(checkpoint, tmp_path / "again", reporter=Reporter(note=notes.append))
    assert notes == ["the checkpoint's shard map is of other tensors: files are divided anew"]


BOMB = "\n".join([f"a0: &a0 [1]{'':1}", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))])
"""Lists of one list: small in memory, without end in print."""

MERGED = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 40))])


@pytest.mark.parametrize(("text", "pattern"), [
    ("[" * 100_000, "nested deeper than 64 levels"), ("a: " + "{a: " * 5000, "nested deeper than 64 levels"),
    (f"{MERGED}\nmodel: *a39\n", "it merges keys"), (f"{BOMB}\nmodel: {{num_layers: *a39}}\n", "no supported family"),
    (f"{BOMB}\nmodel: {{activation_func: {{_target_: *a39}}}}\n", "no supported family"),
    ("model: {num_layers: -0x" + "f" * 5000 + "}", "a number of 20000 bits"),
    ("model: {num_layers: 0x" + "f" * 5000 + "}", "a number of 20000 bits"),
], ids=["deep", "open", "merged", "printed", "named", "negative", "large"])  # fmt: skip
def test_a_run_config_that_would_take_memory_or_crash_is_refused(checkpoint, tmp_path, text, pattern):
    folder = checkpoint / "iter_0000000"
    shutil.rmtree(folder / "huggingface")
    (folder / "run_config.yaml").write_text(text)
    refused(mcore_to_hf, checkpoint, tmp_path, pattern)


def test_what_a_run_config_says_of_its_layout_is_shown_whatever_it_is(checkpoint, capsys):
    from converter import inspect
    from converter.console import show_report

    path = checkpoint / "iter_0000000" / "run_config.yaml"
    text = path.read_text()
    for value in ("2020-01-01", "!!set {a}", "*a39", "0x" + "f" * 5000):
        changed = re.sub("  pipeline_model_parallel_size: .*", f"  pipeline_model_parallel_size: {value}", text)
        path.write_text(f"{BOMB}\n{changed}" if "*" in value else changed)
        for as_json in (False, True):
            show_report(inspect(checkpoint), as_json=as_json)
    assert "a number of 20000 bits" in capsys.readouterr().out


@pytest.mark.parametrize("tensors", [
    {"decoder.final_layernorm.weight": torch.ones(64)}, {"model.norm.weight": torch.ones(64)},
], ids=["of_megatron", "of_the_model"])  # fmt: skip
def test_extras_never_take_the_place_of_weights(checkpoint, tmp_path, tensors):
    save_file(tensors, checkpoint / "iter_0000000" / "huggingface" / "extras.safetensors")
    refused(mcore_to_hf, checkpoint, tmp_path, "for which this family has no place")


@pytest.mark.parametrize(
    "model", ["rotary_base: abc", "num_layers: !!int ''", "layernorm_epsilon: 2020-01-01", "window_size: [a]"]
)
def test_run_config_values_of_the_wrong_kind_are_named(checkpoint, tmp_path, model):
    folder = checkpoint / "iter_0000000"
    shutil.rmtree(folder / "huggingface")
    text = (folder / "run_config.yaml").read_text()
    key = model.split(":", maxsplit=1)[0]
    (folder / "run_config.yaml").write_text(re.sub(rf"\n  {key}: .*", "", text).replace("\nmodel:\n", f"\nmodel:\n  {model}\n"))
    refused(mcore_to_hf, checkpoint, tmp_path, "is not readable|no supported family")
