"""Format numbers for a person: bytes, counts, durations and steps."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Format bytes, in units of 1000: `52.4 MB`, `16.1 GB`.

    >>> size(16_060_000_000)
    '16.1 GB'
    """
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Format a time: `42 s`, `5 min`, `1 h 23 min`, `2 d 3 h`.

    >>> duration(5000)
    '1 h 23 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def number(count: float) -> str:
    """Format a count in three digits: `503 M`, `1.05 B`.

    >>> number(1_050_000_000)
    '1.05 B'
    """
    for unit, name in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"


def steps(count: int) -> str:
    """Format a number of steps: `1 step`, `1,000 steps`.

    >>> steps(1000)
    '1,000 steps'
    """
    return f"{count:,} step{'' if count == 1 else 's'}"
