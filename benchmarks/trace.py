"""What two traces of torch's profiler say that times of steps do not: where the GPU waits, and what takes the CPU's time.

    python -m benchmarks.trace TRACE.json [TRACE.json …]

Prints three tables for each trace: the longest times without a kernel, and the names that take most time on the GPU and on the
CPU.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
CPU = {"cpu_op", "cuda_runtime", "cuda_driver"}
SHOWN = 30


class Event(NamedTuple):
    """Something that took time: its begin and end in µs."""

    begin: float
    end: float
    name: str


def main() -> None:
    """Print the tables of each trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    for trace in parser.parse_args().traces:
        print(f"{trace}\n{summary(trace)}")


def summary(trace: Path) -> str:
    """Return the tables of a trace that `torch.profiler` exported."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    on_gpu = sorted(_event(event) for event in events if event.get("cat") in GPU)
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in CPU:
            threads[event["tid"]].append(_event(event))
    own = self_times(threads.values())
    return "\n".join([*_waits(on_gpu), *_table("GPU", _totals((e.name, e.end - e.begin) for e in on_gpu)), *_table("CPU", own)])


def _event(event: dict[str, Any]) -> Event:
    return Event(event["ts"], event["ts"] + event["dur"], event["name"])


def gaps(events: Sequence[Event]) -> Iterator[tuple[float, str, str]]:
    """Yield the µs between events of which none was running, and the events before and after, from events by their begin."""
    end, last = (events[0].end, events[0].name) if events else (0.0, "")
    for event in events[1:]:
        if event.begin > end:
            yield event.begin - end, last, event.name
        if event.end > end:
            end, last = event.end, event.name


def self_times(threads: Iterable[Sequence[Event]]) -> dict[str, tuple[float, int]]:
    """Return µs and calls of each name, without what other events inside an event took."""
    return _totals(
        pair for events in threads for pair in _self_times(sorted(events, key=lambda event: (event.begin, -event.end)))
    )


def _self_times(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """Yield name and own time of each event of a thread, from events by their begin, the outer one first."""
    open_events: list[tuple[Event, list[float]]] = []

    def close(until: float) -> Iterator[tuple[str, float]]:
        while open_events and open_events[-1][0].end <= until:
            event, inner = open_events.pop()
            yield event.name, event.end - event.begin - sum(inner)

    for event in events:
        yield from close(event.begin)
        if open_events:
            open_events[-1][1].append(event.end - event.begin)
        open_events.append((event, []))
    yield from close(float("inf"))


def _totals(pairs: Iterable[tuple[str, float]]) -> dict[str, tuple[float, int]]:
    totals: dict[str, tuple[float, int]] = {}
    for name, time in pairs:
        before, count = totals.get(name, (0.0, 0))
        totals[name] = before + time, count + 1
    return totals


def _waits(on_gpu: Sequence[Event]) -> Iterator[str]:
    if not on_gpu:
        return
    waits = sorted(gaps(on_gpu), reverse=True)
    span, idle = max(event.end for event in on_gpu) - on_gpu[0].begin, sum(wait for wait, *_ in waits)
    yield f"GPU: {idle / 1e3:.1f} of {span / 1e3:.1f} ms without a kernel, the longest:"
    for wait, before, after in waits[:SHOWN]:
        yield f"{wait / 1e3:10.2f} ms  after {before[:60]}, before {after[:60]}"


def _table(device: str, totals: dict[str, tuple[float, int]]) -> Iterator[str]:
    if not totals:
        return
    times, counts = zip(*totals.values(), strict=True)
    yield f"{device}: {sum(times) / 1e3:.1f} ms, {sum(counts)} calls, the most:"
    for name, (time, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:SHOWN]:
        yield f"{time / 1e3:10.2f} ms {count:8} calls  {name[:100]}"


if __name__ == "__main__":
    main()
