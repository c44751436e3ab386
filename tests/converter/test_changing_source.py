"""A source that is written to while it is read gives no output, and the file is named."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from converter import (
    Reporter,
    UserError,
    adapter_to_hf,
    adapter_to_mcore,
    average_checkpoints,
    check,
    extend_vocab,
    hf_to_mcore,
    mcore_to_hf,
    merge,
    reshard,
    verify,
)
from converter.ranks import Ranks
from tests.converter.adapters.made import save_adapter


@pytest.fixture(scope="module")
def sources(model_folder, tmp_path_factory):
    """A model, the checkpoint of it, an adapter for it, and the checkpoint of that."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(model_folder("gqa", dtype="bfloat16", max_shard_size="150KB"), folder / "hf")
    hf_to_mcore(folder / "hf", folder / "mcore", tp=2)
    mcore_to_hf(folder / "mcore", folder / "back")
    save_adapter(folder / "hf", folder / "adapter")
    adapter_to_mcore(folder / "adapter", folder / "adapter_mcore", base=folder / "hf")
    return folder


@pytest.fixture
def at(sources, tmp_path):
    """The same, free to be changed."""
    shutil.copytree(sources, tmp_path / "at")
    return tmp_path / "at"


COMMANDS = {
    "import": lambda at, **how: hf_to_mcore(at / "hf", at / "out", **how),
    "export": lambda at, **how: mcore_to_hf(at / "mcore", at / "out", **how),
    "export like": lambda at, **how: mcore_to_hf(at / "mcore", at / "out", hf_config=at / "hf", **how),
    "reshard": lambda at, **how: reshard(at / "mcore", at / "out", pp=2, **how),
    "adapter import": lambda at, **how: adapter_to_mcore(at / "adapter", at / "out", base=at / "hf", **how),
    "adapter export": lambda at, **how: adapter_to_hf(at / "adapter_mcore", at / "out", **how),
    "merge": lambda at, **how: merge(at / "hf", at / "adapter", at / "out", **how),
    "merge to mcore": lambda at, **how: merge(at / "mcore", at / "adapter", at / "out", **how),
    "average": lambda at, **how: average_checkpoints([at / "hf", at / "back"], at / "out", **how),
    "average of mcore": lambda at, **how: average_checkpoints([at / "mcore", at / "mcore"], at / "out", **how),
    "extend-vocab": lambda at, **how: extend_vocab(at / "hf", at / "out", to=1024, **how),
    "extend-vocab of mcore": lambda at, **how: extend_vocab(at / "mcore", at / "out", to=1024, **how),
    "verify": lambda at, **how: verify(at / "hf", at / "mcore", **how),
    "check of a model": lambda at, **how: check(at / "back", **how),
    "check of a checkpoint": lambda at, **how: check(at / "mcore", **how),
}
CASES = [
    ("import", "hf/model-00001-of-00003.safetensors"),
    ("import", "hf/config.json"),
    ("import", "hf/README.md"),
    ("export", "mcore/iter_0000000/__1_0.distcp"),
    ("export", "mcore/iter_0000000/.metadata"),
    ("export", "mcore/iter_0000000/huggingface/files/tokenizer.json"),
    ("export", "mcore/latest_checkpointed_iteration.txt"),
    ("export like", "hf/config.json"),
    ("reshard", "mcore/iter_0000000/__1_0.distcp"),
    ("reshard", "mcore/iter_0000000/run_config.yaml"),
    ("reshard", "mcore/iter_0000000/huggingface/files/tokenizer.json"),
    ("adapter import", "adapter/adapter_model.safetensors"),
    ("adapter import", "adapter/adapter_config.json"),
    ("adapter import", "hf/config.json"),
    ("adapter export", "adapter_mcore/iter_0000000/__0_0.distcp"),
    ("adapter export", "adapter_mcore/iter_0000000/adapter.json"),
    ("merge", "hf/model-00002-of-00003.safetensors"),
    ("merge", "adapter/adapter_model.safetensors"),
    ("merge to mcore", "mcore/iter_0000000/__0_0.distcp"),
    ("average", "hf/model-00002-of-00003.safetensors"),
    ("average", "back/model-00001-of-00003.safetensors"),
    ("average of mcore", "mcore/iter_0000000/__1_0.distcp"),
    ("extend-vocab", "hf/model-00002-of-00003.safetensors"),
    ("extend-vocab of mcore", "mcore/iter_0000000/__0_0.distcp"),
    ("verify", "hf/model-00002-of-00003.safetensors"),
    ("verify", "mcore/iter_0000000/__0_0.distcp"),
    ("check of a model", "back/model-00001-of-00003.safetensors"),
    ("check of a checkpoint", "mcore/iter_0000000/.metadata"),
]


def once(act):
    """Progress of a conversion during which something is done, at its first piece."""
    left = [act]
    return lambda _count: left and left.pop()()


def write_in_place(path):
    """The same size, other bytes at the end."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def put_another_there(path):
    """A file of the same size and time, as `cp -p` and `rsync -t` give one; only its inode is another."""
    before = path.stat()
    data = path.read_bytes()
    path.with_name("new").write_bytes(data)
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new").replace(path)


WAYS = {
    write_in_place: r"it was `\d+ bytes, changed at \d+`, it is `\d+ bytes, changed at \d+`",
    put_another_there: "another file of the same size and time has its name",
    os.unlink: "it is gone",
}


def changing(command, at, name, way, **how):
    """The command while a file changes: an error that names it, and nothing else that stays."""
    before = sorted(path.name for path in at.iterdir())
    pattern = rf"^`{at / name}` changed while it was being read: {WAYS[way]}\n\nhint: run it again once nothing writes to it$"
    with pytest.raises(UserError, match=pattern):
        COMMANDS[command](at, reporter=Reporter(progress=once(lambda: way(at / name))), workers=1, **how)
    assert sorted(path.name for path in at.iterdir()) == before


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_file_written_to_in_place(at, command, name):
    changing(command, at, name, write_in_place)


@pytest.mark.parametrize("way", [put_another_there, os.unlink], ids=lambda way: way.__name__)
def test_a_file_that_was_replaced_or_removed(at, way):
    changing("import", at, "hf/model-00001-of-00003.safetensors", way)


def test_the_mixture_is_not_kept_for_a_resumed_run_and_verifying_does_not_hide_the_cause(at):
    changing("import", at, "hf/model-00001-of-00003.safetensors", write_in_place, verify=True)
    assert hf_to_mcore(at / "hf", at / "out", verify=True).reused_bytes == 0


def test_what_only_the_second_of_two_ranks_saw_stops_both(at):
    """As on two machines, of which one still sees the file as it was: each rank looks at what it read itself."""
    shutil.copytree(at / "hf", at / "as the second sees it", copy_function=shutil.copy2)
    path, errors = at / "as the second sees it" / "model-00001-of-00003.safetensors", {}
    talks = [Reporter(), Reporter(progress=once(lambda: write_in_place(path)))]

    def act(rank, source):
        try:
            hf_to_mcore(source, at / "out", ranks=Ranks(rank, 2, "run"), reporter=talks[rank])
        except UserError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=act, args=(0, at / "hf")), threading.Thread(target=act, args=(1, path.parent))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors[0].startswith(f"`{path}` changed while it was being read: it was `")
    assert 1 in errors
    assert not (at / "out").exists()
