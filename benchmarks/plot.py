"""The table that `convert.py` printed, as a picture (needs matplotlib).

python benchmarks/convert.py | tee docs/speed.txt
python benchmarks/plot.py docs/speed.txt docs/speed.png
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

_ROW = re.compile(r"(\S+)\s+(TP\S+)\s+(forward|bare|back-bare|back|verify)\s+([\d.]+) s\s+([\d.]+) s")
_WHAT = {
    "forward": "there",
    "bare": "there, --no-integrity",
    "back": "back",
    "back-bare": "back, --no-integrity",
    "verify": "verify",
}
_LABELS = {"1b": "1B shape, 2.47 GB", "8b-16": "8B shape with 16 layers, 9.1 GB"}


def main(table: str, picture: str) -> None:
    """Bars of `mbconvert` and `cp` side by side, one panel per model."""
    rows = [match.groups() for match in map(_ROW.match, Path(table).read_text().splitlines()) if match]
    shapes = list(dict.fromkeys(row[0] for row in rows))
    figure, panels = plt.subplots(1, len(shapes), figsize=(10, 4.2), constrained_layout=True)
    for panel, shape in zip(panels, shapes, strict=True):
        mine = [row for row in rows if row[0] == shape]
        positions = range(len(mine))
        panel.barh([y - 0.2 for y in positions], [float(row[3]) for row in mine], 0.38, color="#76b900", label="mbconvert")
        panel.barh([y + 0.2 for y in positions], [float(row[4]) for row in mine], 0.38, color="#b0b0b0", label="cp -r and sync")
        panel.set_yticks(list(positions), [f"{row[1]} {_WHAT[row[2]]}" for row in mine])
        panel.set_xlabel("seconds, start-up and sync included")
        panel.set_title(_LABELS.get(shape, shape), fontsize=10)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=2)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
