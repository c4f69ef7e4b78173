"""Draws figures beside their floors. matplotlib, of the extra `bench`, is imported only to draw."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Bar:
    """A figure and its floor (or ceiling, for a rate), both in `unit`."""

    name: str
    unit: str
    measured: float
    floor: float


def check(path: str) -> None:
    """Raises ValueError for a file that `save` cannot write, RuntimeError without matplotlib.

    To be called before hours of measuring.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"--plot {path}: the file's name must end in one of {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no directory {file.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: pip install 'jaxgen[bench]'")


def save(path: str, title: str, bars: Sequence[Bar]) -> None:
    """Writes horizontal bars with a mark at the floor, one chart for each unit."""
    from matplotlib.figure import Figure

    charts: dict[str, list[Bar]] = {}
    for bar in bars:
        charts.setdefault(bar.unit, []).append(bar)
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(charts) + 0.35 * len(bars)), layout="constrained")
    figure.suptitle(title, fontsize=9)
    heights = [len(chart) for chart in charts.values()]
    axes = figure.subplots(len(charts), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (unit, chart) in zip(axes, charts.items()):
        names = [bar.name for bar in chart]
        drawn = axis.barh(names, [bar.measured for bar in chart], color="#4477aa", label="measured")
        axis.bar_label(drawn, [f"{bar.measured:,.4g}" for bar in chart], padding=4, fontsize=8)
        edges = range(len(chart))
        floors = [bar.floor for bar in chart]
        axis.vlines(floors, [y - 0.4 for y in edges], [y + 0.4 for y in edges], "#cc3311", label="floor")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.set_xlabel(unit, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
