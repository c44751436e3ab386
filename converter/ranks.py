"""Which process this is of how many, and which part of the work is its own.

Knows the variables that `torchrun` and `srun` set, and arithmetic. Knows no files: how ranks hear of one another is
formats/rendezvous.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from formats.errors import UserError

_NAMELESS = "none"  # what torchrun says when nobody named the run and the rendezvous is static
_LONGEST = 80


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process is number `rank` of `size`. `run_id` is the same for all of them and fit to be a file's name.

    Another run has another `run_id` where the environment tells runs apart. It cannot always (`torchrun` with a static
    rendezvous says `none` each time), so nothing may depend on it: it sorts files, the rendezvous proves them fresh.
    """

    rank: int
    size: int
    run_id: str


def from_environment(env: Mapping[str, str] = os.environ) -> Ranks:
    """Who this process is: by `RANK` and `WORLD_SIZE`, else by `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS`, else alone.

    `SLURM_PROCID` by itself is a batch script outside any `srun` step, hence alone. UserError for what makes no sense.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return Ranks(*_numbers(env, "RANK", "WORLD_SIZE"), _safe(_engine_id(env)))
    if "SLURM_STEP_NUM_TASKS" in env:
        return Ranks(*_numbers(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), _safe(_slurm_id(env)))
    return alone()


def waiting(ranks: Ranks, env: Mapping[str, str] = os.environ) -> str:
    """Whom this process is about to wait for and why, where no torchrun says that the others are on their way; else "".

    A shell may have the variables without having been started as one of several: a pod of a training operator has.
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
    """A process that shares its work with no other."""
    return Ranks(0, 1, f"alone-{os.getpid()}-{secrets.token_hex(4)}")


def share(weights: Sequence[int], rank: int, size: int) -> slice:
    """The items that are this rank's, given each item's bytes: `size` neighbouring slices that cover each item once.

    An item goes where the middle of its bytes lies, so no share exceeds an even one by more than the largest item.
    """
    whole = sum(weights)
    counted = list(weights) if whole else [1] * len(weights)
    whole = whole or len(weights)
    middles = [2 * end - weight for end, weight in zip(accumulate(counted), counted, strict=True)]
    owners = [min(size - 1, middle * size // (2 * whole)) for middle in middles]
    return slice(bisect_left(owners, rank), bisect_left(owners, rank + 1))


def _numbers(env: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    said = {name: env.get(name) for name in (rank_name, size_name)}
    rank, size = (int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else -1 for text in said.values())
    if 0 <= rank < size:
        return rank, size
    values = " and ".join(f"`{name}` is " + ("not set" if text is None else f"`{text}`") for name, text in said.items())
    raise UserError(
        f"{values}; together they should say which process this is of how many",
        hint=f"start all processes with torchrun or srun, or unset `{rank_name}` and `{size_name}` to convert with one",
    )


def _engine_id(env: Mapping[str, str]) -> str:
    """What is the same for all processes of one start. Not `MASTER_ADDR` where no torchrun agreed on it: some engines
    tell rank 0 `localhost` and the others its name."""
    run = env.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return "-".join(["ranks", env.get("MASTER_PORT", ""), _slurm_id(env) if "SLURM_STEP_ID" in env else ""]).strip("-")
    named = [] if run != _NAMELESS else [env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")]
    return "-".join(["torchrun", run, *named, env.get("TORCHELASTIC_RESTART_COUNT", "0")])


def _slurm_id(env: Mapping[str, str]) -> str:
    parts = [env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return "-".join(["slurm", *parts])


def _safe(text: str) -> str:
    """`text` as part of a file's name; where that changes it, its digest keeps it apart from others."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", text)[:_LONGEST]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
