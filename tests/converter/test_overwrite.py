"""`--overwrite` replaces what a conversion made, whole and alone; whatever else lies at DST stays, and is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from converter import (
    Reporter,
    TransientError,
    UserError,
    adapter_to_hf,
    adapter_to_mcore,
    average_checkpoints,
    extend_vocab,
    hf_to_mcore,
    mcore_to_hf,
    merge,
    reshard,
)
from formats.remote import upload
from tests.converter.adapters.made import save_adapter
from tests.locations import HURRIED, s3_store
from tests.models import tree

ROOT = Path(__file__).parents[2]
KINDS = ["import", "import without hashes", "export", "adapter import", "adapter export", "merge to hf", "merge to mcore"]
EDITING = ["reshard", "average", "average of mcore", "extend-vocab", "extend-vocab of mcore"]
STRANGERS = ["thesis.tex", "runs/events.1", "iter_0000000/notes.txt", "iter_0000100/.metadata", "model-2.safetensors", "empty/"]


@pytest.fixture(scope="module")
def commands(model_folder, tmp_path_factory):
    """Each command that writes an output, as a function of its target."""
    folder = tmp_path_factory.mktemp("commands")
    source = model_folder("gqa", dtype="bfloat16", max_shard_size="150KB")
    checkpoint, adapter = folder / "megatron", save_adapter(source, folder / "adapter")
    hf_to_mcore(source, checkpoint, tp=2)
    adapter_to_mcore(adapter, folder / "adapter_mcore", base=source)
    return {
        "import": lambda target, **how: hf_to_mcore(source, target, tp=2, **how),
        "import without hashes": lambda target, **how: hf_to_mcore(source, target, tp=2, integrity=False, **how),
        "export": lambda target, **how: mcore_to_hf(checkpoint, target, **how),
        "adapter import": lambda target, **how: adapter_to_mcore(adapter, target, base=source, **how),
        "adapter export": lambda target, **how: adapter_to_hf(folder / "adapter_mcore", target, **how),
        "merge to hf": lambda target, **how: merge(source, adapter, target, **how),
        "merge to mcore": lambda target, **how: merge(source, adapter, target, to="mcore", **how),
        "reshard": lambda target, **how: reshard(checkpoint, target, pp=2, **how),
        "average": lambda target, **how: average_checkpoints([source, source], target, **how),
        "average of mcore": lambda target, **how: average_checkpoints([checkpoint, checkpoint], target, **how),
        "extend-vocab": lambda target, **how: extend_vocab(source, target, to=1024, **how),
        "extend-vocab of mcore": lambda target, **how: extend_vocab(checkpoint, target, to=1024, **how),
    }


@pytest.fixture(scope="module")
def made(commands, tmp_path_factory):
    """What each command writes."""
    folder = tmp_path_factory.mktemp("made")
    for kind, command in commands.items():
        command(folder / kind)
    return folder


@pytest.fixture
def output(made, tmp_path):
    """A copy of what a command writes, at `tmp_path/out`."""
    return lambda kind: shutil.copytree(made / kind, tmp_path / "out")


def add(output, name):
    path = output / name
    if name.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("months of work")


def forget_the_list(output):
    """Make an output one of an earlier version, whose `conversion.json` did not list its files."""
    path = next(output.glob("**/conversion.json"))
    record = json.loads(path.read_text())
    assert record.pop("files") == sorted(tree(output))
    path.write_text(json.dumps(record))


def refused(command, target, name, *, earlier=False):
    """Nothing is changed, and the error is the one for a stranger of that name."""
    before = tree(target)
    with pytest.raises(UserError) as caught:
        command(target, overwrite=True)
    why = (
        "which may be somebody else's: the `conversion.json` there, of an earlier version, does not list its files"
        if earlier
        else "which the conversion that made it did not write"
    )
    assert str(caught.value) == (
        f"`{target}` holds `{name}`, {why}, so `--overwrite` does not replace it\n\n"
        "hint: move it away or remove it yourself, or choose another place"
    )
    assert tree(target) == before


@pytest.mark.parametrize("kind", KINDS + EDITING)
def test_what_a_command_made_it_replaces_whoever_made_it(commands, made, output, kind):
    target = output("export" if kind == "import" else "import")
    commands[kind](target, overwrite=True)
    assert tree(target) == tree(made / kind)
    commands[kind](target, overwrite=True, dry_run=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_version_made_is_replaced_too(commands, made, output, kind):
    target = output(kind)
    forget_the_list(target)
    commands[kind](target, overwrite=True)
    assert tree(target) == tree(made / kind)


@pytest.mark.parametrize("earlier", [False, True], ids=["", "of an earlier version"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stranger", STRANGERS)
def test_anything_else_in_an_output_is_named_and_stays(commands, output, kind, stranger, earlier):
    target = output(kind)
    if earlier:
        forget_the_list(target)
    add(target, stranger)
    refused(commands[kind], target, stranger, earlier=earlier)
    if not earlier:
        with pytest.raises(UserError, match="which the conversion that made it did not write"):
            commands[kind](target, overwrite=True, dry_run=True)


@pytest.mark.parametrize("kind", EDITING)
def test_reshards_averages_and_extended_models_replace_nothing_else_either(commands, output, kind):
    target = output(kind)
    add(target, "thesis.tex")
    refused(commands[kind], target, "thesis.tex")


@pytest.mark.parametrize("name", ["tokenizer.model", "README.md", "adapter_model.safetensors"])
def test_what_a_user_added_to_a_model_is_a_stranger_even_if_models_have_such_files(commands, output, name):
    target = output("adapter export" if name != "adapter_model.safetensors" else "export")
    add(target, name)
    refused(commands["export"], target, name)


def test_a_link_is_a_stranger_and_what_it_leads_to_is_not_looked_into(commands, output, tmp_path):
    target = output("export")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    (target / "config.json").unlink()
    (target / "config.json").symlink_to(tmp_path / "precious")
    refused(commands["export"], target, f"config.json -> {tmp_path / 'precious'}")
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_a_name_that_is_not_utf_8_is_told_all_the_same(commands, output):
    target = output("export")
    (target / os.fsdecode(b"caf\xe9")).write_text("x")
    refused(commands["export"], target, r"caf\xe9")


@pytest.mark.parametrize("record", [None, "{", "{}", '{"tool": "another"}', "[]"])
def test_without_a_record_of_ours_nothing_is_replaced_whatever_it_looks_like(commands, output, record):
    for kind, path in (("import", "iter_0000000/conversion.json"), ("export", "conversion.json")):
        target = output(kind)
        (target / path).unlink()
        if record is not None:
            (target / path).write_text(record)
        before = tree(target)
        with pytest.raises(UserError) as caught:
            commands[kind](target, overwrite=True)
        assert str(caught.value) == (
            f"`{target}` holds `{min(before)}` and no `conversion.json` of this tool: it is not the output of a conversion, "
            "so `--overwrite` does not replace it\n\nhint: move it away or remove it yourself, or choose another place"
        )
        assert tree(target) == before
        shutil.rmtree(target)


def test_an_empty_directory_is_replaced(commands, made, tmp_path):
    (tmp_path / "out").mkdir()
    commands["export"](tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == tree(made / "export")


def meanwhile(act):
    """A conversion during which something is done, once."""
    left = [act]
    return Reporter(progress=lambda _count: left and left.pop()())


def another_in_its_place(target):
    target.rename(target.with_name("kept"))
    target.mkdir()
    (target / "thesis.tex").write_text("x")


MEANWHILE = {
    "another in its place": (another_in_its_place, "another directory has its name, with `thesis.tex`"),
    "a file more": (lambda target: add(target, "thesis.tex"), "`thesis.tex` appeared"),
    "a file deep inside": (lambda target: add(target, "a/b/c"), "`a/b/c` appeared"),
    "a file changed": (lambda target: (target / "config.json").write_text("{}"), "`config.json` was changed"),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_what_comes_to_dst_while_a_conversion_runs_is_not_lost(commands, made, output, tmp_path, what):
    (act, message), target = MEANWHILE[what], output("export")
    with pytest.raises(TransientError) as caught:
        commands["export"](target, overwrite=True, reporter=meanwhile(lambda: act(target)))
    assert str(caught.value).startswith(
        f"`{target}` changed while its replacement was being made: {message}\n\nhint: move away what"
    )
    shutil.move(target, tmp_path / "moved")
    changed = {name: data for name, data in tree(tmp_path / "moved").items() if tree(made / "export").get(name) != data}
    assert set(changed) <= {"thesis.tex", "a/b/c", "config.json"}
    assert changed
    assert commands["export"](target, overwrite=True, resume=True).reused_bytes > 0
    assert tree(target) == tree(made / "export")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_where_nothing_was_is_not_lost(commands, made, tmp_path, overwrite):
    def appear():
        shutil.copytree(made / "import", tmp_path / "out")

    with pytest.raises(TransientError, match="appeared while it was being made") as caught:
        commands["export"](tmp_path / "out", overwrite=overwrite, reporter=meanwhile(appear))
    assert caught.value.hint == "move it away, then give the same command again with `--resume`"
    assert tree(tmp_path / "out") == tree(made / "import")


@pytest.fixture
def bucket(moto, monkeypatch):
    monkeypatch.setattr(upload, "RetryPolicy", lambda: HURRIED)
    with ExitStack() as stack:
        yield s3_store(stack, monkeypatch, moto)


@pytest.mark.usefixtures("at_home")
def test_the_same_rule_holds_in_a_bucket(commands, made, bucket):
    for kind, earlier in (("import", True), ("export", True), ("export", False)):
        commands[kind](bucket.url, overwrite=True)
        assert bucket.objects() == tree(made / kind)
        if earlier:
            name = "conversion.json" if kind == "export" else "iter_0000000/conversion.json"
            record = json.loads(bucket.objects()[name])
            del record["files"]
            bucket.put(name, json.dumps(record).encode())
    bucket.put("iter_0000000/notes.txt", b"precious")
    before = bucket.objects()
    with pytest.raises(UserError) as caught:
        commands["export"](bucket.url, overwrite=True)
    assert str(caught.value).startswith(
        f"`{bucket.url}` holds `iter_0000000/notes.txt`, which the conversion that made it did not"
    )
    assert bucket.objects() == before


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(("source", "target"), [("", "/"), ("", ""), ("/iter_0000000", "")])
def test_a_source_in_a_bucket_is_not_replaced(made, bucket, source, target):
    kind, command = ("import", mcore_to_hf) if source else ("export", hf_to_mcore)
    for name, data in tree(made / kind).items():
        bucket.put(name, data)
    before = bucket.objects()
    with pytest.raises(UserError) as caught:
        command(bucket.url + source, bucket.url + target, overwrite=True)
    assert str(caught.value) == (
        f"the source `{bucket.url}{source}` is inside `{bucket.url}{target}`, where the output is to be written\n\n"
        "hint: choose another target"
    )
    assert bucket.objects() == before


@pytest.mark.usefixtures("at_home")
def test_a_bucket_of_other_things_is_not_emptied(commands, bucket):
    for name in ("finance/2026.xlsx", "models/llama/model-00001-of-00191.safetensors", "scratch.safetensors"):
        bucket.put(name, b"precious")
    before = bucket.objects()
    with pytest.raises(UserError, match=r"holds `finance/2026.xlsx` and no `conversion.json` of this tool"):
        commands["import"](bucket.url, overwrite=True)
    with pytest.raises(UserError, match="is a whole bucket, which `--overwrite` never replaces"):
        commands["import"](bucket.url.removesuffix("/out"), overwrite=True)
    assert bucket.objects() == before


MOUNTED = """
import sys
from pathlib import Path
from converter import UserError, hf_to_mcore
for name in ("mounted", "bound here"):
    for options in ({}, {"overwrite": True}, {"overwrite": True, "dry_run": True}):
        try:
            hf_to_mcore(sys.argv[1], name, **options)
        except UserError as error:
            print(error.args[0])
hf_to_mcore(sys.argv[1], "mounted/model")
print(sorted(path.name for path in Path().iterdir()), sorted(path.name for path in Path("mounted").iterdir()))
"""


@pytest.mark.skipif(subprocess.call(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL) != 0, reason="no namespaces here")
def test_a_mount_point_is_refused_before_a_byte_moves(model_folder, tmp_path):
    for name in ("mounted", "bound here", "elsewhere"):
        (tmp_path / name).mkdir()
    mounts = "mount -t tmpfs -o size=64m none mounted && mount --bind elsewhere 'bound here'"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mounts} && exec "$@"', "sh", sys.executable, "-c", MOUNTED, model_folder("gqa")],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        *(f"`{name}` is a mount point, which cannot be replaced by a rename" for name in ("mounted", "bound here")
          for _ in range(3)),
        "['bound here', 'elsewhere', 'mounted'] ['model']",
    ], done.stderr  # fmt: skip


@pytest.mark.parametrize("leads", ["a file", "a folder"])
def test_what_the_source_has_by_a_link_is_not_replaced(commands, output, tmp_path, leads):
    target, source = output("export"), tmp_path / "source"
    shutil.copytree(target, source)
    name = next(target.glob("*.safetensors")).name if leads == "a file" else "model"
    if leads == "a file":
        (source / name).unlink()
    (source / name).symlink_to(target / name if leads == "a file" else target)
    before = tree(target)
    with pytest.raises(UserError) as caught:
        hf_to_mcore(source, target, overwrite=True)
    assert str(caught.value) == (
        f"`{source / name}` of the source is a link into `{target}`, which would be replaced\n\nhint: choose another place"
    )
    assert tree(target) == before


TWICE = """
import sys
from converter import UserError, hf_to_mcore
for source, target in (("one/out", "two/out"), ("one/out", "two"), ("two/out/iter", "one/out")):
    try:
        hf_to_mcore(source, target, overwrite=True)
    except UserError as error:
        print(error.args[0])
"""


@pytest.mark.skipif(subprocess.call(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL) != 0, reason="no namespaces here")
def test_a_source_that_has_another_path_by_a_mount_is_not_replaced(made, tmp_path):
    shutil.copytree(made / "export", tmp_path / "one" / "out")
    for name in ("one/out/iter", "two"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", 'mount --bind one two && exec "$@"', "sh", sys.executable, "-c", TWICE],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "`two/out` is the source `one/out`",
        "`two` contains the source `one/out`",
        "`one/out` contains the source `two/out/iter`",
    ], done.stderr
