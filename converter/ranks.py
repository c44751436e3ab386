"""Find this process's rank and the number of ranks in the environment, and divide work among ranks.

Reads the variables that `torchrun` and `srun` set. How ranks exchange messages is left to formats/rendezvous.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from formats.errors import UserError

_NAMELESS = "none"  # torchrun's value for a run without a name and with a static rendezvous
_LONGEST = 80  # characters of a file name


class Ranks(NamedTuple):
    """This process is number `rank` of `size`. `run_id` is the same for all of them, and a valid part of a file name.

    It differs between runs where the environment distinguishes them. `torchrun` with a static rendezvous does not, so it must
    not be relied on for uniqueness; the token of formats/rendezvous.py provides that.
    """

    rank: int
    size: int
    run_id: str


def from_environment(env: Mapping[str, str] = os.environ) -> Ranks:
    """Return this process's rank: by `RANK` and `WORLD_SIZE`, else by `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS`, else alone.

    `SLURM_PROCID` by itself is a batch script outside any `srun` step, hence alone. Raises UserError for values that
    contradict one another.

    >>> from_environment({"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "convert"})
    Ranks(rank=3, size=8, run_id='torchrun-convert-0')
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return Ranks(*_numbers(env, "RANK", "WORLD_SIZE"), _safe(_engine_id(env)))
    if "SLURM_STEP_NUM_TASKS" in env:
        return Ranks(*_numbers(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), _safe(_slurm_id(env)))
    return alone()


def waiting(ranks: Ranks, env: Mapping[str, str] = os.environ) -> str:
    """Return a note on which ranks this process will wait for, and why; empty if it is alone or torchrun started it.

    A shell may have the variables though it is the only process: a pod of a training operator has.
    """
    if ranks.size == 1 or "TORCHELASTIC_RUN_ID" in env:
        return ""
    named = ("RANK", "WORLD_SIZE") if "RANK" in env else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    others = "rank 0" if ranks.rank else "rank 1" if ranks.size == 2 else f"ranks 1–{ranks.size - 1}"
    unset = " ".join(f"-u {name}" for name in named)
    return (
        f"rank {ranks.rank} of {ranks.size}: waiting for {others} ({', '.join(named)} are set); "
        f"to convert with this process alone: `env {unset} mbconvert …`"
    )


def alone() -> Ranks:
    """Return the rank of a process that shares its work with no other."""
    return Ranks(0, 1, f"alone-{os.getpid()}-{secrets.token_hex(4)}")


def share(weights: Sequence[int], rank: int, size: int) -> slice:
    """Return which items are this rank's, given each item's bytes. The slices of all ranks cover each item once, in order.

    An item belongs to the rank whose even share holds the middle of its bytes, so no rank has more than an even share and one
    item.

    >>> [share([4, 4, 2, 2, 4], rank, 2) for rank in range(2)]
    [slice(0, 2, None), slice(2, 5, None)]
    """
    total = sum(weights)
    counted = list(weights) if total else [1] * len(weights)
    total = total or len(weights)
    middles = [2 * end - weight for end, weight in zip(accumulate(counted), counted, strict=True)]
    owners = [min(size - 1, middle * size // (2 * total)) for middle in middles]
    return slice(bisect_left(owners, rank), bisect_left(owners, rank + 1))


def _numbers(env: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    given = {name: env.get(name) for name in (rank_name, size_name)}
    rank, size = (int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else -1 for text in given.values())
    if 0 <= rank < size:
        return rank, size
    values = " and ".join(f"`{name}` is " + ("not set" if text is None else f"`{text}`") for name, text in given.items())
    raise UserError(
        f"{values}; together they should say which process this is of how many",
        hint=f"start all processes with torchrun or srun, or unset `{rank_name}` and `{size_name}` to convert with one",
    )


def _engine_id(env: Mapping[str, str]) -> str:
    """Return a name that all processes of one start share.

    `MASTER_ADDR` is not part of it without torchrun: some launchers give rank 0 `localhost` and the others its host name.
    """
    run = env.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return "-".join(["ranks", env.get("MASTER_PORT", ""), _slurm_id(env) if "SLURM_STEP_ID" in env else ""]).strip("-")
    named = [] if run != _NAMELESS else [env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")]
    return "-".join(["torchrun", run, *named, env.get("TORCHELASTIC_RESTART_COUNT", "0")])


def _slurm_id(env: Mapping[str, str]) -> str:
    parts = [env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return "-".join(["slurm", *parts])


def _safe(text: str) -> str:
    """Return `text` as a valid part of a file name; where that changes it, with a digest that keeps it distinct."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", text)[:_LONGEST]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
