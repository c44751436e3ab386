"""DeepSeek-V3 in FP8, with a layer of multi-token prediction: killed at any step of either way at any expert parallelism, and
resumed, it has the bytes of a run that nobody disturbed, and comes back as it was published."""

from __future__ import annotations

import signal
from typing import NamedTuple

import numpy as np
import pytest

from tests import quantized_models
from tests.interrupted import PIECE_BYTES, WORKERS, Conversion, journaled, kill_again_and_again, steps, written
from tests.models import model_tree, tree

LAYOUTS = {
    "ep2": ("--ep", 2),
    "tp2-ep2": ("--tp", 2, "--ep", 2),
    "tp2-ep4-etp1": ("--tp", 2, "--ep", 4, "--etp", 1),
    "pp2-ep2-etp2": ("--pp", 2, "--pp-layout", "Et*3|tmL", "--ep", 2, "--etp", 2),
}
IMPORT, EXPORT = "hf-to-mcore", "mcore-to-hf"
KILLS = 5
SILENCE = 4.0
"""Seconds after which a rank that is not heard of is dead."""

CODES = "model.layers.2.mlp.experts.5.down_proj.weight"
"""Codes that scales and numbers do not give back: they travel as they are."""


class Way(NamedTuple):
    """A conversion that nobody disturbed: what it made, how often it took each step, and the bytes of its pieces."""

    command: tuple
    whole: dict
    steps: dict
    nbytes: int


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A small DeepSeek-V3 in FP8, with codes that are no numbers under a scale of zero."""
    folder = tmp_path_factory.mktemp("deepseek")
    made = quantized_models.fp8(quantized_models.deepseek_v3(folder / "plain"), folder / "hf")

    def change(tensors):
        tensors[CODES].view(np.uint8)[0, :3] = [0x7F, 0xFF, 0x80]
        tensors[CODES.removesuffix(".weight") + quantized_models.SCALES][-1, -1] = 0

    quantized_models.edit(made, change)
    return made


@pytest.fixture(scope="module")
def straight(deepseek, tmp_path_factory):
    """Both ways of a layout, undisturbed; each layout is converted once."""
    known = {}

    def both(layout):
        if layout not in known:
            folder = tmp_path_factory.mktemp(layout)
            there = undisturbed(folder / "log", folder / "m", IMPORT, deepseek, *LAYOUTS[layout])
            back = undisturbed(folder / "log-back", folder / "back", EXPORT, folder / "m")
            assert model_tree(folder / "back") == model_tree(deepseek)
            known[layout] = {IMPORT: there, EXPORT: back}
        return known[layout]

    return both


WAYS = [f"{layout} {command}" for layout in LAYOUTS for command in (IMPORT, EXPORT)]


@pytest.fixture(params=WAYS)
def way(request, straight):
    layout, command = request.param.split()
    return straight(layout)[command]


def undisturbed(log, target, command, source, *options):
    process = Conversion(command, source, target, *options, "--verify", log=log, pause=0)
    code, output = process.end()
    assert code == 0, output
    words = (command, source, target.with_name("DST"), *options, "--verify")
    return Way(words, tree(target), steps(log), sum(written(log)))


@pytest.fixture
def start(tmp_path):
    """Starts a conversion to `tmp_path / "DST"`; kills it if the test does not."""
    started = []

    def run(command, *options, **how):
        words = [tmp_path / "DST" if word == command[2] else word for word in command]
        started.append(Conversion(*words, *options, **{"log": tmp_path / f"log-{len(started)}", "pause": 0, **how}))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def finish(ranks, whole, folder):
    """Wait for the ranks of a resumed run, which must have reused pieces and made the bytes of `whole`."""
    for rank in ranks:
        code, output = rank.end()
        assert code == 0, output
    assert ranks[0].summary["reused_bytes"] > 0
    assert tree(folder / "DST") == whole
    assert [path.name for path in folder.iterdir() if not path.name.startswith("log")] == ["DST"]


POINTS = {
    "write": lambda taken: 30,
    "among scales": lambda taken: taken["write"] - 20,  # they come last
    "put": lambda taken: 1,
    "compare": lambda taken: 1,
    "_publish": lambda taken: 1,
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step_it_is_finished_with_the_same_bytes(way, start, tmp_path, point):
    step, number = "write" if point == "among scales" else point, POINTS[point](way.steps)
    process = start(way.command, hold={step: number})
    process.until(step, number)
    assert process.stop()[0] == -signal.SIGKILL
    assert not (tmp_path / "DST").exists()
    finish([start(way.command, "--resume")], way.whole, tmp_path)


def test_killed_again_and_again_it_ends_with_the_same_bytes(way, start, tmp_path):
    target, log = tmp_path / "DST", tmp_path / "log"
    kill_again_and_again(start, way.command, "--resume", target=target, log=log, kills=KILLS, nsteps=sum(way.steps.values()))
    before = sum(written(log))
    process = start(way.command, "--resume", log=log)
    finish([process], way.whole, tmp_path)
    assert process.summary["reused_bytes"] + sum(written(log)) - before == way.nbytes
    assert sum(written(log)) <= way.nbytes + KILLS * WORKERS * PIECE_BYTES


SPREAD = [(way, number % 3, number % 4 or 2) for number, way in enumerate(WAYS)]
"""Of three ranks, the one that is killed, and how many go on."""


@pytest.mark.parametrize(("way", "dead", "again"), SPREAD, indirect=["way"])
def test_any_number_of_processes_goes_on_for_one_that_was_killed(way, start, tmp_path, dead, again):
    ranks = spread(start, way.command, 3, hold={dead: {"write": 10}}, patience=SILENCE)
    ranks[dead].until("write", 10)
    assert ranks[dead].stop()[0] == -signal.SIGKILL
    others = [rank for rank in ranks if rank is not ranks[dead]]
    assert [rank.end()[0] for rank in others] == [1, 1]
    assert set(journaled(tmp_path / "DST").values()) == {1}
    finish(spread(start, way.command, again, "--resume"), way.whole, tmp_path)


def spread(start, command, size, *options, hold=None, **how):
    """Start all ranks of a conversion; `hold` has, by rank, at which steps it waits."""
    envs = [{"RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
    return [start(command, *options, env=env, hold=(hold or {}).get(rank), **how) for rank, env in enumerate(envs)]
