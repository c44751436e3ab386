"""The curves of one run, or of several over each other, as one picture. Reads `metrics.jsonl`, knows nothing of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formats.errors import UserError
from trainer.logging.records import FILE, read_records

Records = list[dict[str, Any]]
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_INK, _FAINT = "#333333", "#DDDDDD"


def plot(run_dirs: Sequence[Path], out: Path) -> None:
    """Write a PNG of loss, learning rate, gradient norm and throughput over the steps of all `run_dirs`.

    UserError for a folder without `metrics.jsonl`, a line that is not a record (with file and line), or a run without records.
    """
    runs = dict(zip(_labels(run_dirs), [_records(folder) for folder in run_dirs], strict=True))
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - only once there is something to draw
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(12, 8), dpi=130, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    FigureCanvasAgg(figure)
    _draw(figure, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def _records(folder: Path) -> Records:
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"`{folder}` has no `{FILE}`", hint="give a run's folder: `logger.run_dir`, or else `checkpoint.save`")
    records = list(read_records(path))
    if not records:
        raise UserError(f"`{path}` has no records yet", hint="wait for the run's first line, `logger.log_interval` steps")
    return records


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two share one, as much of their paths as tells them apart."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice", hint="give each folder once")
    parts = [folder.resolve().parts for folder in folders]
    longest = max(len(part) for part in parts)
    depth = next(size for size in range(1, longest + 1) if len({part[-size:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]).replace("//", "/") for part in parts]


def _draw(figure: Any, runs: dict[str, Records]) -> None:
    axes = figure.subplots(2, 2, sharex=True)
    for number, (label, records) in enumerate(runs.items()):
        color = _COLORS[number % len(_COLORS)]
        name = label if len(runs) > 1 else "training"
        _curve(axes[0, 0], records, "loss", color=color, label=name)
        for panel, split in enumerate(_splits(records), 1):
            words = f"{label}, {split}" if len(runs) > 1 else split
            shade = color if len(runs) > 1 else _COLORS[panel % len(_COLORS)]
            style = ":" if split.startswith("test") else "--"
            _curve(
                axes[0, 0], records, "loss", split=split, color=shade, label=words, linestyle=style, marker="o", markersize=3.5
            )
        _curve(axes[0, 1], records, "lr", color=color, label=name)
        _curve(axes[1, 0], records, "grad_norm", color=color, label=name)
        _curve(axes[1, 1], records, "tokens_per_second_per_gpu", color=color, label=name)
    each = {record.get("device") for records in runs.values() for record in records} - {None}
    unit = "process" if each == {"cpu"} else "GPU"
    titles = ("Loss", "Learning rate", "Gradient norm", f"Throughput, tokens/s/{unit}")
    for panel, title in zip(axes.flat, titles, strict=True):
        _style(panel, title, floor=title.startswith("Throughput"))
    for panel in axes[1]:
        panel.set_xlabel("step", color=_INK)
    axes[0, 1].yaxis.set_major_formatter(lambda value, _: f"{value:.1e}")
    axes[0, 0].legend(frameon=False, fontsize=9, labelcolor=_INK)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), color=_INK)


def _splits(records: Records) -> list[str]:
    """What a run was evaluated on: its validation sets, then its test sets."""
    splits = dict.fromkeys(str(record["split"]) for record in records if record.get("split"))
    return sorted(splits, key=lambda split: split.startswith("test"))


def _curve(axis: Any, records: Records, field: str, *, split: str | None = None, **look: Any) -> None:
    """One line: `field` of the steps, or of the evaluations on `split`. A lone point gets a mark."""
    chosen = [record for record in records if record.get("split") == split and isinstance(record.get(field), (int, float))]
    if chosen:
        look.setdefault("marker", "o" if len(chosen) == 1 else None)
        axis.plot(
            [record["iteration"] for record in chosen], [record[field] for record in chosen], linewidth=1.6, alpha=0.85, **look
        )


def _style(axis: Any, title: str, *, floor: bool) -> None:
    axis.set_title(title, loc="left", fontsize=11, color=_INK)
    axis.grid(visible=True, color=_FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_INK)
    axis.tick_params(colors=_INK, labelsize=9, labelbottom=True)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if floor:
        axis.set_ylim(0, 1.12 * axis.dataLim.y1 if axis.has_data() else 1)
        axis.yaxis.set_major_formatter("{x:,.0f}")
