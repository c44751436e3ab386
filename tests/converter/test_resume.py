"""Killed at any moment and resumed, a conversion ends with the bytes of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from converter import UserError, hf_to_mcore
from converter.execution import Reporter
from tests.interrupted import (
    LONGEST,
    PIECE_BYTES,
    WORKERS,
    Conversion,
    journaled,
    kill_again_and_again,
    make_source,
    partial,
    steps,
    written,
)
from tests.models import tree

LAYOUT = ("--tp", 2, "--pp", 2)
KILLS = 6
"""Of each conversion that is killed at random, before it may end."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """For each direction the arguments of a conversion, what it makes undisturbed, how many bytes of pieces it writes, and in how
    many steps."""
    folder = tmp_path_factory.mktemp("straight")
    runs, source, options = {}, make_source(folder / "hf"), LAYOUT
    for direction in ("hf-to-mcore", "mcore-to-hf"):
        target, log = folder / direction, folder / f"{direction}.log"
        assert Conversion(direction, source, target, *options, log=log, pause=0).end()[0] == 0
        runs[direction] = ((direction, source), options, tree(target), sum(written(log)), sum(steps(log).values()))
        source, options = target, ()
    return runs


@pytest.fixture
def start(straight, tmp_path):
    """Starts a conversion; kills it if the test does not."""
    started = []

    def run(*options, direction="hf-to-mcore", target="m", layout=None, **how):
        command, usual, *_ = straight[direction]
        arguments = (*command, tmp_path / target, *(usual if layout is None else layout), *options)
        started.append(Conversion(*arguments, **{"log": tmp_path / f"log-{len(started)}", **how}))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def killed(straight, tmp_path_factory):
    """What a run has left that was killed with some of its pieces done."""
    folder = tmp_path_factory.mktemp("killed")
    process = Conversion(*straight["hf-to-mcore"][0], folder / "m", *LAYOUT, log=folder / "log", hold={"write": 40})
    process.until("write", 40)
    process.stop()
    return partial(folder / "m")


@pytest.fixture
def half(killed, tmp_path):
    """The same, free to be damaged."""
    for folder in (killed, state_of(killed)):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / killed.name


def state_of(left):
    return left.with_name(f"{left.name}.state")


@pytest.fixture
def go_on(straight, tmp_path, monkeypatch):
    """Goes on with the conversion in this process."""
    monkeypatch.setattr("converter.worker.PIECE_BYTES", PIECE_BYTES)

    def run(**options):
        return hf_to_mcore(straight["hf-to-mcore"][0][1], tmp_path / "m", **{"tp": 2, "pp": 2, "resume": True, **options})

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("log"))


def finish(start, *options, **how):
    process = start("--resume", *options, pause=0, **how)
    code, output = process.end()
    assert code == 0, output
    return process.summary


def refused(start, *options, **how):
    code, output = start(*options, pause=0, **how).end()
    assert code == 1
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])
def test_a_conversion_killed_again_and_again_ends_with_the_same_bytes(start, straight, tmp_path, direction):
    _, _, whole, nbytes, nsteps = straight[direction]
    target, log = tmp_path / "m", tmp_path / "log"
    kill_again_and_again(start, "--resume", "--verify", direction=direction, target=target, log=log, kills=KILLS, nsteps=nsteps)
    before = sum(written(log))
    summary = finish(start, "--verify", direction=direction, log=log)
    assert tree(target) == whole
    assert names(tmp_path) == ["m"]
    assert summary["reused_bytes"] + sum(written(log)) - before == nbytes
    assert sum(written(log)) <= nbytes + KILLS * WORKERS * PIECE_BYTES


@pytest.mark.parametrize("step", ["_begin", "put", "compare", "_publish"])
def test_killed_at_any_step_it_is_finished_with_the_same_bytes(start, go_on, straight, tmp_path, step):
    process = start("--verify", hold={step: 1})
    process.until(step)
    process.stop()
    assert not (tmp_path / "m").exists()
    go_on(verify=True)
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]
    assert names(tmp_path) == ["m"]


def test_killed_after_the_commit_the_output_is_whole_and_the_next_run_cleans_up(start, go_on, straight, tmp_path):
    process = start(hold={"_remove": 2})
    process.until("_remove", 2)
    process.stop()
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]
    assert "outputs appear only when they are complete" in refused(start, "--resume")
    go_on(overwrite=True, tp=1, pp=1)
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("step", ["_publish", "_exchange", "_remove", "rmtree"])
def test_an_old_output_stays_until_the_new_one_is_whole(start, go_on, straight, tmp_path, step):
    """Killed between the exchange and the removal of what was replaced, that must not be taken for half a new output."""
    hf_to_mcore(straight["hf-to-mcore"][0][1], tmp_path / "m")
    old, new, target = tree(tmp_path / "m"), straight["hf-to-mcore"][2], tmp_path / "m"
    number = {"_remove": 2, "rmtree": 4}.get(step, 1)
    process = start("--overwrite", hold={step: number})
    process.until(step, number)
    process.stop()
    assert tree(target) == (new if step in ("_remove", "rmtree") else old)
    go_on(overwrite=True)
    assert tree(target) == new
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "case",
    [("write", signal.SIGTERM), ("write", signal.SIGINT), ("put", signal.SIGTERM), ("_publish", signal.SIGINT)],
)
def test_a_signal_leaves_what_can_be_resumed(start, go_on, straight, tmp_path, case):
    step, number = case
    # A thread that writes finishes its piece first. The main thread's pause is as long as the signal takes.
    process = start("--verify", pauses={step: 0.1 if step == "write" else LONGEST})
    process.until(step, 8 if step == "write" else 1)
    code, output = process.stop(number)
    assert (code, output.splitlines()[-1]) == ((143, "terminated") if number == signal.SIGTERM else (130, "interrupted"))
    left = partial(tmp_path / "m")
    assert f"note: `{left}` keeps what is done: finish it with the same command and `--resume`" in output
    assert f"rm -r {left}.state {left}" in output
    assert "Traceback" not in output
    assert names(tmp_path) == [left.name, f"{left.name}.state"]
    assert go_on().reused_bytes > 0
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


def test_a_signal_before_anything_is_done_leaves_nothing(start, tmp_path):
    process = start(pauses={"check_room": LONGEST})
    process.until("check_room")
    code, output = process.stop(signal.SIGTERM)
    assert (code, output) == (143, "terminated\n")
    assert not names(tmp_path)


def test_a_second_interrupt_does_not_wait_and_what_is_done_stays(start, go_on, straight, tmp_path, half):
    process = start("--resume", hold={"make": 1})
    process.until("make")
    process.send_signal(signal.SIGINT)
    process.until_it_ignores(signal.SIGTERM)  # the first has come, and it waits for pieces that nothing releases
    assert process.stop(signal.SIGINT)[0] == 130
    go_on()
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


def test_what_an_interrupted_run_left_is_named_with_both_ways_out(start, tmp_path, half):
    output = refused(start)
    assert f"error: an interrupted run left `{half}`" in output
    assert f"with the same command and `--resume`, or remove it: `rm -r {half}.state {half}`" in output
    shutil.rmtree(half)
    shutil.rmtree(state_of(half))
    assert start(pause=0).end()[0] == 0
    assert names(tmp_path) == ["m"]


def test_a_name_that_a_shell_would_split_is_quoted(start, tmp_path):
    process = start(target="my model", hold={"write": 20})
    process.until("write", 20)
    process.stop()
    left = partial(tmp_path / "my model")
    assert f"`rm -r '{left}.state' '{left}'`" in refused(start, target="my model")


def test_with_nothing_to_resume_it_converts(go_on, straight, tmp_path):
    assert go_on().reused_bytes == 0
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


def test_a_source_that_changed_is_refused_by_name(start, straight, tmp_path, half):
    copy = tmp_path / "log-source"
    shutil.copytree(straight["hf-to-mcore"][0][1], copy)
    (shard,) = sorted(copy.glob("model-00002-*"))
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    process = Conversion("hf-to-mcore", copy, tmp_path / "m", *LAYOUT, "--resume", log=tmp_path / "log", pause=0)
    code, output = process.end()
    assert code == 1
    assert f"`{half}` was begun with the source's `{shard.name}` " in output
    assert f"changed at {shard.stat().st_mtime_ns}" in output
    assert f"rm -r {half}.state {half}" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 1}, "`tp` 2, now it is 1"),
        ({"layout": "hybrid"}, '`layout` "gpt", now it is "hybrid"'),
        ({"pp": 1}, "`pp` 2, now it is 1"),
        ({"dtype": "fp32"}, '`dtype` "keep", now it is "fp32"'),
        ({"integrity": False}, "`integrity` true, now it is false"),
    ],
    ids=str,
)
def test_other_options_are_refused_with_both_values(go_on, half, options, message):
    with pytest.raises(UserError, match=f"`{half}` was begun with option {message}"):
        go_on(**options)


def test_a_damaged_record_is_refused_and_a_missing_one_is_no_record(start, go_on, straight, tmp_path, half):
    record = state_of(half) / "job.json"
    record.write_text('{"tp"')
    assert f"`{record}` is damaged" in refused(start, "--resume")
    record.unlink()
    assert go_on().reused_bytes == 0
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


def test_a_journal_whose_numbers_mean_other_pieces_is_refused(go_on, half):
    """As an earlier version wrote it, which cut tensors along their first axis alone."""
    record = state_of(half) / "job.json"
    job = json.loads(record.read_text())
    assert job.pop("pieces cut along") == "every leading axis"
    record.write_text(json.dumps(job))
    with pytest.raises(UserError) as refused:
        go_on()
    assert str(refused.value) == (
        f'`{half}` was begun with pieces cut along null, now it is "every leading axis"\n\n'
        f"hint: resume with what it was begun with, or remove it: `rm -r {half}.state {half}`"
    )


def journal(half):
    (path,) = state_of(half).glob("journal-*")
    return path


def test_a_line_cut_short_counts_for_nothing_nor_does_the_one_written_on_top_of_it(go_on, straight, tmp_path, half):
    done, lost = sorted(journaled(tmp_path / "m")), max(journaled(tmp_path / "m"))
    text = journal(half).read_text()
    journal(half).write_text(f"{text.replace(f'[{lost}]', '')}[{lost // 10}[{lost % 10}]\n[{done[-1] + 1}")
    assert go_on().reused_bytes > 0
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


@pytest.mark.parametrize("synced", [0, 12])
def test_of_another_boot_only_what_was_synced_counts(start, straight, tmp_path, half, synced):
    lines = journal(half).read_text().splitlines()
    lines[0] = json.dumps({"boot": "another"})
    pieces = sum(line.startswith("[") for line in lines[:synced])
    journal(half).write_text("\n".join([*lines, json.dumps({"synced": synced}), ""]))
    log, nbytes = tmp_path / "log", straight["hf-to-mcore"][3]
    summary = finish(start, log=log)
    assert summary["reused_bytes"] == nbytes - sum(written(log))
    assert bool(pieces) == bool(summary["reused_bytes"])
    assert summary["reused_bytes"] <= pieces * PIECE_BYTES
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


def test_pieces_of_a_file_that_is_gone_are_done_again(go_on, straight, tmp_path, half):
    next(half.rglob("*.distcp")).unlink()
    go_on()
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


def test_too_little_room_to_go_on_leaves_what_is_done(go_on, straight, tmp_path, half, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("formats.staging.free_bytes", lambda path: 1000)
        with pytest.raises(UserError, match="the disk has"):
            go_on()
    assert go_on().reused_bytes > 0
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]


def test_what_did_not_read_back_as_it_was_written_is_not_there_to_go_on_with(straight, tmp_path):
    def damage(text):
        if text == "reading back from the disk":
            with next(tmp_path.rglob("*.distcp")).open("r+b") as file:
                file.seek(-5000, os.SEEK_END)
                file.write(bytes(100))

    with pytest.raises(UserError, match="what is on the disk is not what was converted"):
        hf_to_mcore(straight["hf-to-mcore"][0][1], tmp_path / "m", verify=True, reporter=Reporter(note=damage))
    assert not names(tmp_path)


def test_a_second_run_is_refused_and_told_who_holds_the_lock(start, straight, tmp_path):
    first = start(hold={"write": 5})
    first.until("write", 5)
    first.send_signal(signal.SIGSTOP)  # alive
    for options in ((), ("--resume",), ("--overwrite",)):
        output = refused(start, *options)
        assert f"another run is writing `{tmp_path / 'm'}`: pid `{first.pid}` on `" in output
    first.send_signal(signal.SIGCONT)
    first.release()
    assert first.end()[0] == 0
    assert tree(tmp_path / "m") == straight["hf-to-mcore"][2]
    assert names(tmp_path) == ["m"]


def test_what_dead_runs_of_other_plans_left_goes_with_the_next_success(go_on, tmp_path, half):
    shutil.rmtree(half)
    (tmp_path / "m.partial-0123456789ab.ranks").mkdir()
    (tmp_path / "m.partial-backup").mkdir()
    go_on(tp=1, pp=1)
    assert names(tmp_path) == ["m", "m.partial-backup"]


def test_an_export_whose_untouched_tensors_changed_is_refused(model_folder, tmp_path, monkeypatch):
    """They travel beside the weights, in a file of their own."""
    from safetensors.torch import load_file, save_file

    from converter import mcore_to_hf, worker

    shutil.copytree(model_folder("gqa", dtype="bfloat16"), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"][:4].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    hf_to_mcore(tmp_path / "hf", tmp_path / "m")

    def run_then_stop(*arguments, run=worker.run, **options):
        run(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run", run_then_stop)
        with pytest.raises(KeyboardInterrupt):
            mcore_to_hf(tmp_path / "m", tmp_path / "back")
    extras = tmp_path / "m" / "iter_0000000" / "huggingface" / "extras.safetensors"
    with extras.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(UserError, match=r"begun with the source's `huggingface/extras\.safetensors`"):
        mcore_to_hf(tmp_path / "m", tmp_path / "back", resume=True)


@pytest.mark.parametrize("name", ["torch", "fsdp_dtensor"])
def test_other_formats_are_continued_too(tmp_path, name):
    """Every copy of a weight in files of ranks is written with it."""
    source, options = make_source(tmp_path / "hf"), ("--ckpt-format", name, "--tp", 2)
    hf_to_mcore(source, tmp_path / "straight", ckpt_format=name, tp=2)
    process = Conversion("hf-to-mcore", source, tmp_path / "m", *options, log=tmp_path / "log", hold={"write": 40})
    process.until("write", 40)
    process.stop()
    again = Conversion("hf-to-mcore", source, tmp_path / "m", *options, "--resume", log=tmp_path / "again", pause=0)
    assert again.end()[0] == 0
    assert again.summary["reused_bytes"] > 0
    assert tree(tmp_path / "m") == tree(tmp_path / "straight")
