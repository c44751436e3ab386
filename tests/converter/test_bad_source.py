"""A bad Hugging Face directory, target or option gets a clear error that names things, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf
from tests.models import model_tree, tree
from tests.refusal import refused


def edit_config(source, **changes):
    path = source / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


@pytest.mark.parametrize(("text", "pattern"), [
    (None, "has no `config.json`"), ("{", "`config.json` is not readable JSON"), ("[1]", "should be a JSON object"),
    ("", "`config.json` is not readable JSON"), ("[" * 100_000, "`config.json` is not readable JSON"),
    ('{"a": 1, "a": 2}', "duplicate key `a`"), (f'{{"a": {"[" * 70}{"]" * 70}}}', "nested deeper than 64 levels"),
])  # fmt: skip
def test_no_or_broken_config(source, tmp_path, text, pattern):
    (source / "config.json").unlink()
    if text is not None:
        (source / "config.json").write_text(text)
    refused(hf_to_mcore, source, tmp_path, pattern)


@pytest.mark.parametrize(("changes", "pattern"), [
    ({"model_type": "lamma"}, r"`lamma`, which is not supported\n\nhint: supported are: .*apertus, .*, llama, .*, mistral,"),
    ({"model_type": "jamba"}, r"`jamba`, which is not supported: its layers are Mamba-1, .*\n\nhint: `mbconvert families --all`"),
    ({"model_type": ["llama"]}, "which is not supported"),
    ({"model_type": "../llama"}, "which is not supported"),
    ({"hidden_size": ...}, "`hidden_size`: `None`, which should be a whole number"),
    ({"hidden_size": "64"}, "`hidden_size`: `64`, which should be a whole number"),
    ({"num_hidden_layers": 0}, "`num_hidden_layers`: `0`"),
    ({"num_attention_heads": 10**4000, "head_dim": 10**4000}, "`num_attention_heads`: `a number of 13288 bits`"),
    ({"num_hidden_layers": 10**9}, "says 1000000000 layers, but there are only 39 tensors in all"),
    ({"num_hidden_layers": 5}, "the source lacks `model.layers.4.input_layernorm.weight`, .* and 6 more"),
    ({"num_hidden_layers": 3}, r"holds `model.layers.3.input_layernorm.weight`, .* and 6 more, for which"),
    ({"num_key_value_heads": 3}, "8 attention heads are not divisible by 3 query groups"),
    ({"intermediate_size": 80}, r"has shape \[96, 64\], by `config.json` it should be \[80, 64\]"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope type `yarn`"),
    ({"rope_parameters": [1]}, "`rope_(parameters|scaling)` is"),
    ({"hidden_act": "gelu"}, "`hidden_act` is `gelu`"),
    ({"tie_word_embeddings": True}, "`lm_head.weight` differs from `model.embed_tokens.weight`"),
    ({"attention_bias": True}, "the source lacks `model.layers.0.self_attn.q_proj.bias`"),
])  # fmt: skip
def test_a_config_of_another_model(source, tmp_path, changes, pattern):
    edit_config(source, **changes)
    refused(hf_to_mcore, source, tmp_path, pattern)


def rewrite_header(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first_two(header):
    return [entry for name, entry in header.items() if name != "__metadata__"][:2]


def overlap(header):
    first_two(header)[1]["data_offsets"][0] -= 2


def gap(header):
    for entry in list(header.values())[1:]:
        entry["data_offsets"] = [at + 8 for at in entry["data_offsets"]]


HEADERS = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "bytes long, its header describes"),
    "appended": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes long, its header describes"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "short": (lambda p: p.write_bytes(b"abc"), "claims a header of 0 bytes and is 3 bytes long"),
    "huge_length": (lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + p.read_bytes()[8:]), f"claims a header of {1 << 60}"),
    "no_json": (lambda p: rewrite_header(p, lambda h: b"\xff" * 40), "is not readable JSON"),
    "a_list": (lambda p: rewrite_header(p, lambda h: b"[]"), "should be a JSON object"),
    "overlap": (lambda p: rewrite_header(p, overlap), "should be .* bytes from"),
    "gap": (lambda p: rewrite_header(p, gap), "should be .* bytes from 0, its header says 8"),
    "shape": (lambda p: rewrite_header(p, lambda h: first_two(h)[0].update(shape=[-1, 64])), r"has shape `\[-1, 64\]`"),
    "shape_text": (lambda p: rewrite_header(p, lambda h: first_two(h)[0].update(shape="ab")), "has shape `ab`"),
    "big_shape": (
        lambda p: rewrite_header(p, lambda h: first_two(h)[0].update(shape=[1 << 62, 9])),
        r"has shape `\[4611686018427387904, 9\]`",
    ),
    "offsets": (lambda p: rewrite_header(p, lambda h: first_two(h)[0].update(data_offsets=[9, 3])), r"data offsets `\[9, 3\]`"),
    "floats": (lambda p: rewrite_header(p, lambda h: first_two(h)[0].update(data_offsets=[0.0, 3e9])), "data offsets"),
    "shape_number": (lambda p: rewrite_header(p, lambda h: first_two(h)[0].update(shape=64)), "has shape `64`"),
    "metadata": (lambda p: rewrite_header(p, lambda h: h.update(__metadata__={"format": 1})), "should hold only text"),
    "no_text": (lambda p: rewrite_header(p, lambda h: first_two(h)[0].update({"\ud800": 1})), "half a surrogate pair"),
    "entry": (lambda p: rewrite_header(p, lambda h: h.update(x=5)), "`x` has data offsets `None`"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_safetensors_file_is_named(source, tmp_path, name):
    damage, pattern = HEADERS[name]
    path = sorted(source.glob("*.safetensors"))[1]
    damage(path)
    refused(hf_to_mcore, source, tmp_path, f"(?s)`{path.name}`.*{pattern}")


def test_a_dtype_that_nobody_knows_is_named(source, tmp_path):
    rewrite_header(sorted(source.glob("*.safetensors"))[1], lambda header: first_two(header)[0].update(dtype="BF17"))
    refused(hf_to_mcore, source, tmp_path, "is BF17, which cannot be converted\n\nhint: those that can be are bf16, fp16")


def test_a_file_that_shrinks_after_its_header_was_read_is_named(source, tmp_path, monkeypatch):
    path = sorted(source.glob("*.safetensors"))[1]
    import converter.worker

    def shrink_then_run(*arguments, run=converter.worker.run, **options):
        path.write_bytes(path.read_bytes()[:-4000])
        run(*arguments, **options)

    monkeypatch.setattr(converter.worker, "run", shrink_then_run)
    with pytest.raises(UserError, match=f"`{path.name}` ends at byte"):
        hf_to_mcore(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("shape", [[1] * 65, [0, 1 << 61, 1 << 61], [[[]]] * 9])
def test_a_shape_that_no_array_can_have_is_refused(source, tmp_path, shape):
    """Also for a tensor that is only carried along, for which no model says its shape."""
    (source / "model.safetensors.index.json").unlink()
    path = min(source.glob("*.safetensors"))
    size = 0 if 0 in shape else 4
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def add(header):
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}

    rewrite_header(path, add)
    path.write_bytes(path.read_bytes() + bytes(size))
    refused(hf_to_mcore, source, tmp_path, f"`{name}` has shape")


def edit_index(source, change):
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "a//b", "", "a\\b", None, 5])
def test_an_index_that_leaves_the_directory(source, tmp_path, file):
    edit_index(source, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    refused(hf_to_mcore, source, tmp_path, "which is not a valid path inside the directory: it was not opened")


def test_an_index_may_name_files_in_folders_below(source, tmp_path):
    for file in source.glob("*.safetensors"):
        file.rename(tmp_path / file.name)
    (source / "parts").mkdir()
    for file in tmp_path.glob("*.safetensors"):
        file.rename(source / "parts" / file.name)
    edit_index(source, lambda index: index.update(weight_map={n: f"parts/{f}" for n, f in index["weight_map"].items()}))
    hf_to_mcore(source, tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert model_tree(tmp_path / "back") == tree(source)


def test_an_index_that_disagrees_with_the_files(source, tmp_path):
    files = sorted(p.name for p in source.glob("*.safetensors"))
    holder = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    edit_index(source, lambda index: index["weight_map"].update({"model.norm.weight": files[0]}))
    refused(hf_to_mcore, source, tmp_path, f"puts `model.norm.weight` in {files[0]}, it is in {holder}")
    edit_index(source, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(hf_to_mcore, source, tmp_path, f"puts `model.norm.weight` in no file, it is in {holder}")
    edit_index(source, lambda index: index.update(weight_map={"model.norm.weight": "gone.safetensors"}))
    refused(hf_to_mcore, source, tmp_path, "names `gone.safetensors`, which is not in")
    edit_index(source, lambda index: index.pop("weight_map"))
    refused(hf_to_mcore, source, tmp_path, "has no `weight_map`")


def test_the_same_tensor_in_two_files(source, tmp_path):
    files = sorted(source.glob("*.safetensors"))
    first = load_file(files[0])
    save_file({**load_file(files[1]), **first}, files[1], {"format": "pt"})
    refused(hf_to_mcore, source, tmp_path, f"is in two files: `{files[0].name}` and `{files[1].name}`")


def test_a_missing_tensor_is_named_before_any_byte_moves(source, tmp_path):
    (source / "model.safetensors.index.json").unlink()
    path = sorted(source.glob("*.safetensors"))[1]
    weights = load_file(path)
    gone = min(weights)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, path)
    refused(hf_to_mcore, source, tmp_path, f"the source lacks `{re.escape(gone)}`")


@pytest.mark.parametrize(("options", "pattern"), [
    ({"tp": 3}, "tensor-parallel size 3 neither divides the model's 4 query groups nor is a multiple of them"),
    ({"tp": 16}, "tensor-parallel size 16 does not divide the model's attention heads, 8"),
    ({"pp": 5}, "5 pipeline ranks × 1 virtual stages are more than the model's 4 layers"),
    ({"pp": 3}, r"4 layers cannot be divided evenly into 3 pipeline ranks .*\n\nhint: .*`--pp-layout 2,1,1`"),
    ({"pp": 2, "pp_layout": [3, 2]}, r"`--pp-layout 3,2` has 2 stages and 5 layers; .* the model has 4 layers"),
    ({"pp": 2, "pp_layout": [4]}, r"`--pp-layout 4` has 1 stages"),
    ({"pp": 2, "vpp": 2, "pp_layout": [2, 2]}, r"2 pipeline ranks × 2 virtual stages need 4"),
])  # fmt: skip
def test_a_layout_the_model_does_not_fit(source, tmp_path, options, pattern):
    refused(hf_to_mcore, source, tmp_path, pattern, **options)


def test_targets_that_would_harm_something(source, checkpoint, tmp_path):
    for target in (source, source / "inside", source.parent):
        with pytest.raises(UserError, match=r"(is|is inside|contains) the source"):
            hf_to_mcore(source, target, overwrite=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"already exists\n\nhint: .*`--overwrite`"):
        hf_to_mcore(source, tmp_path / "there")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        hf_to_mcore(source, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_source_that_is_not_there(tmp_path):
    refused(hf_to_mcore, tmp_path / "nowhere", tmp_path, "does not exist")
    refused(mcore_to_hf, tmp_path / "nowhere", tmp_path, "does not exist")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    refused(hf_to_mcore, tmp_path / "empty", tmp_path, "holds no weights")


def test_a_disk_that_is_too_small_is_said_before_writing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("formats.staging.free_bytes", lambda path: 1000)
    refused(hf_to_mcore, source, tmp_path, r"needs 0.00 GB, the disk has 0.00 GB free")


def test_a_disk_that_fills_half_way_is_a_clear_error(source, tmp_path):
    """A file-size limit stands for a full disk: the kernel answers the write with EFBIG."""
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="no room left for"):
            hf_to_mcore(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not (tmp_path / "out").exists()


def test_an_old_output_is_kept_until_the_new_one_is_whole(source, model_folder, tmp_path, monkeypatch):
    hf_to_mcore(model_folder("mha"), tmp_path / "m")
    old = (tmp_path / "m" / "iter_0000000" / "conversion.json").read_bytes()

    def fail(*_arguments, **_options):
        assert (tmp_path / "m" / "iter_0000000" / "conversion.json").read_bytes() == old
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("converter.worker.run", fail)
        with pytest.raises(UserError, match="no room left"):
            hf_to_mcore(source, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "iter_0000000" / "conversion.json").read_bytes() == old
    hf_to_mcore(source, tmp_path / "m", tp=2, overwrite=True)
    assert (tmp_path / "m" / "iter_0000000" / "__1_0.distcp").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "source"]


def test_targets_that_lie_in_a_source_or_lead_elsewhere(source, checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"(is|is inside|contains) the source"):
        mcore_to_hf(checkpoint, source, hf_config=source, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a link"):
        hf_to_mcore(source, tmp_path / "link")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError):
        hf_to_mcore(source, tmp_path / "loop")


@pytest.mark.parametrize(
    "options", [{"tp": 0}, {"pp": -1}, {"workers": 0}, {"make_vocab_size_divisible_by": 0}, {"dtype": "int8"}], ids=str
)
def test_python_callers_get_the_same_checks(source, tmp_path, options):
    refused(hf_to_mcore, source, tmp_path, "which should be 1 or more|which should be 1 to 256|is not one of", **options)


def test_a_padded_vocabulary_that_no_tensor_can_hold_is_refused_with_its_size(source, tmp_path):
    with pytest.raises(UserError) as caught:
        hf_to_mcore(source, tmp_path / "m", make_vocab_size_divisible_by=1 << 62, tp=2, dry_run=True)
    assert str(caught.value) == (
        "`--make-vocab-size-divisible-by 4611686018427387904` and `--tp 2` pad the vocabulary of 384 to "
        "9223372036854775808 rows of 64, "
        "which is more than a tensor can hold\n\nhint: Megatron-LM's default is 128"
    )


def test_absurd_numbers_are_refused_at_once(source, tmp_path):
    refused(hf_to_mcore, source, tmp_path, "need 1000000000", pp=10**9, pp_layout=[1, 2])
    refused(hf_to_mcore, source, tmp_path, "negative", pp=2, pp_layout=[5, -1])
    refused(hf_to_mcore, source, tmp_path, "virtual stages need more than 1 pipeline rank", vpp=2)
    edit_config(source, num_attention_heads=10**11, num_key_value_heads=10**11)
    refused(hf_to_mcore, source, tmp_path, "tensor-parallel size 3", tp=3)


@pytest.mark.parametrize("changes", [
    {"rms_norm_eps": "abc"}, {"initializer_range": [1]}, {"attention_dropout": float("nan")}, {"max_position_embeddings": -1},
    {"rope_parameters": {"rope_type": "llama3", "factor": "abc"}}, {"rope_parameters": {"rope_theta": "x"}},
    {"model_type": "mistral", "sliding_window": "abc"}, {"model_type": "mistral", "sliding_window": {}},
], ids=str)  # fmt: skip
def test_config_values_of_the_wrong_kind_are_named(source, tmp_path, changes):
    edit_config(source, **changes)
    refused(hf_to_mcore, source, tmp_path, "which should be")


def test_dtypes_that_differ_within_one_megatron_tensor_are_cast_each_from_its_own(source, tmp_path):
    for path in source.glob("*.safetensors"):
        weights = load_file(path)
        save_file({n: t.float() if "k_proj" in n or "up_proj" in n else t for n, t in weights.items()}, path, {"format": "pt"})
    refused(hf_to_mcore, source, tmp_path, "is one tensor\n\nhint: choose one dtype")
    hf_to_mcore(source, tmp_path / "m", dtype="fp32", tp=2)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    for path in source.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "back" / path.name)
        assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_no_descriptor_stays_open(model_folder, tmp_path):
    def descriptors():
        return {str(link.resolve()) for link in Path("/proc/self/fd").iterdir() if link.exists()}

    before = descriptors()
    hf_to_mcore(model_folder("gqa"), tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert not {path for path in descriptors() - before if str(tmp_path) in path}


@pytest.mark.parametrize("target", [".", "new/..", "http://host/x", "file:///x"])
def test_targets_that_cannot_be_made_are_refused_before_anything_is_read(source, tmp_path, monkeypatch, target):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=r"does not end in a directory name|cannot be written to"):
        hf_to_mcore(source, target, dry_run=True)
    assert not list((tmp_path / "empty").iterdir())
