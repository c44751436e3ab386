"""What a terminal shows, and what a log file gets."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import threading

import pytest

from converter import Reporter, Summary, check_checkpoint, console, hf_to_mcore, verify_checkpoints


def test_sizes_and_counts_for_a_person():
    assert [console.size(n) for n in (5, 4_200, 16_060_000_000)] == ["5 B", "4.20 kB", "16.06 GB"]
    assert [console.count(n) for n in (12, 8_030_000_000, 405_000_000_000)] == ["12", "8.03 B", "405.00 B"]


def test_where_nobody_watches_a_line_every_few_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    lines = console._Lines()
    lines.start(10_000_000_000)
    for _ in range(20):
        now[0] += 1
        lines.progress(100_000_000)
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 4
    assert re.fullmatch(r"500.00 MB of 10.00 GB, 100.00 MB/s, 95 s left, \d+\.\d\d [MG]B resident", output[0])


@pytest.mark.parametrize(("reused", "rate", "more"), [(0, "200.00", ""), (900_000_000, "20.00", ", 900.00 MB reused")])
def test_the_rate_is_that_of_what_was_moved(capsys, reused, rate, more):
    def converted(*_places, **_options):
        return Summary(
            command="hf-to-mcore", source="a", target="b", dry_run=False, tensors=3, parameters=5, total_bytes=10**9, files={},
            seconds=5.0, peak_memory=10**8, workers=4, reused_bytes=reused,
        )  # fmt: skip

    console.convert(converted, "a", "b", as_json=False, quiet=False, dry_run=False)
    assert capsys.readouterr().err == (
        f"done: 3 tensors, 5 parameters, 1.00 GB in 5.0 s ({rate} MB/s), peak memory 100.00 MB -> b{more}\n"
    )


def test_notes_come_on_the_callers_thread_and_progress_on_worker_threads(model_folder, tmp_path):
    threads = {"note": set(), "start": set(), "progress": set()}

    def record(name):
        return lambda _: threads[name].add(threading.current_thread())

    reporter = Reporter(*(record(name) for name in threads))
    source = model_folder("attention_bias")
    hf_to_mcore(source, tmp_path / "m", dtype="bf16", verify=True, workers=2, reporter=reporter)
    verify_checkpoints(source, tmp_path / "m", cast_to="bf16", workers=2, reporter=reporter)
    check_checkpoint(tmp_path / "m", workers=2, reporter=reporter)
    assert threads["note"] == threads["start"] == {threading.current_thread()}
    assert threads["progress"]
    assert threading.current_thread() not in threads["progress"]


def test_on_a_terminal_a_bar_with_bytes_rate_time_and_memory(model_folder, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "converter", "hf-to-mcore", str(model_folder("gqa")), str(tmp_path / "m")]
    process = subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "140", "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        try:
            shown += os.read(ours, 4096)
        except OSError:
            break
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"\d+/\d+\.?\d* ?[kM]?B|\d+\.\d+/\d+\.\d+ [kM]B", text), text
    assert "MB resident" in text
    assert "done: 27 tensors" in text
