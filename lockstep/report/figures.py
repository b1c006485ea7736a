"""The report's figures, by matplotlib, as inline SVG that takes the page's own text colour, in light and in dark.

Colours are Okabe and Ito's, which people with colour-blindness tell apart; maps are cividis (Nunez et al., 2018).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, ParamSpec

from lockstep.align.html import svg
from lockstep.export.card import MIB
from lockstep.report.compare import Line, measure
from lockstep.report.sources import Stored

INK = "#1b1f24"  # stands for the page's text colour
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#a89c00")
MARKERS = "osD^vPX*"
STYLES = ("-", "--", ":", "-.")
WIDTH = 10.0  # inches: at a page's width letters of 9 points are 13 pixels high
POINTS = 100  # of a curve: of more the means of as many stretches are drawn
MAPS = 4  # of layers, in one figure
PANELS = 6  # of curves, in one figure: as many as a printed page has room for
BARS = 15

_RC: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "grid.color": "#888888",
    "grid.alpha": 0.3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "text.parse_math": False,  # labels are people's own
}

P = ParamSpec("P")


def themed(draw: Callable[P, Any]) -> Callable[P, Any]:
    """`draw`, whose figure has the report's colours and sizes."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Any:
        import matplotlib

        with matplotlib.rc_context(_RC):
            return draw(*args, **kwargs)

    return drawn


def inline(figure: Any) -> str:
    """A figure of this module as SVG in the text colour of what is around it."""
    return svg(figure).replace(INK, "currentColor")


# Quality and bytes ---------------------------------------------------------------------------------------------------


@themed
def tradeoff(lines: Sequence[Line], front: Sequence[Line]) -> Any:
    """Each line's perplexity over its bytes; those of `front` are numbered from 1 and joined."""
    from matplotlib.figure import Figure

    ranked_by = measure(lines)
    sized = [one for one in lines if "weight_bytes" in one.values and one.baseline != "bf16"]
    shown = [one for one in sized if ranked_by in one.values]
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    axes = figure.add_subplot()
    for method, (colour, marker) in method_styles(lines).items():
        of_method = [one for one in shown if one.method == method]
        if of_method:
            axes.errorbar(
                [one.values["weight_bytes"].mean / MIB for one in of_method],
                [one.values[ranked_by].mean for one in of_method],
                [one.values[ranked_by].deviation or 0 for one in of_method],
                color=colour,
                fmt=marker,
                markersize=6,
                capsize=3,
                label=method,
            )
    joined = [one for one in front if one in shown]
    places = [(one.values["weight_bytes"].mean / MIB, one.values[ranked_by].mean) for one in joined]
    if places:
        axes.step(
            *zip(*places, strict=True), where="post", color=INK, linewidth=1, zorder=1, label="best for its bytes"
        )
    for number, place in enumerate(places, 1):
        axes.annotate(str(number), place, (-5, -5), textcoords="offset points", ha="right", va="top", weight="bold")
    reference = [one for one in lines if one.baseline == "bf16" and "weight_bytes" in one.values]
    if reference and ranked_by == "increase":
        size = reference[0].values["weight_bytes"].mean / MIB
        axes.axhline(0, color=INK, linestyle="--", linewidth=1, label=f"bf16, {size:,.0f} MiB")
    axes.set(xlabel="bytes of the weights, MiB", ylabel=_AXIS[ranked_by])
    _plain_ticks(axes.yaxis, [one.values[ranked_by].mean for one in shown], axes.set_yscale)
    axes.margins(0.08)
    for size, formats in _columns(shown).items():
        words = ", ".join(formats)
        axes.text(
            size, 1.01, words, rotation=60, fontsize=8, transform=axes.get_xaxis_transform(), rotation_mode="anchor"
        )
    figure.legend(loc="outside right upper", title="method")
    return figure


def _columns(lines: Sequence[Line]) -> dict[float, list[str]]:
    """The formats of `lines` by their MiB, those of nearly the same size together."""
    found: dict[float, list[str]] = {}
    for line in sorted(lines, key=lambda one: one.values["weight_bytes"].mean):
        size = line.values["weight_bytes"].mean / MIB
        near = next((one for one in found if size < 1.015 * one), size)
        if line.format and line.format not in found.setdefault(near, []):
            found[near].append(line.format)
    return found


@themed
def by_format(lines: Sequence[Line]) -> Any:
    """A dot for each line, best on top of its format, with the spread over the seeds."""
    from matplotlib.figure import Figure

    ranked_by, styles = measure(lines), method_styles(lines)
    shown = [one for one in lines if ranked_by in one.values and one.baseline != "bf16"]
    formats = list(dict.fromkeys(one.format or "format not told" for one in shown))
    entries: list[Line | str] = []
    for name in formats:
        of_format = [one for one in shown if (one.format or "format not told") == name]
        entries += [name, *sorted(of_format, key=lambda one: one.values[ranked_by].mean)]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.23 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    for place, entry in enumerate(entries):
        if isinstance(entry, str):
            axes.axhspan(place - 0.5, place + 0.5, color="#888888", alpha=0.15, linewidth=0)
            continue
        colour, marker = styles[entry.method]
        spread = entry.values[ranked_by]
        axes.errorbar(spread.mean, place, xerr=spread.deviation or 0, color=colour, fmt=marker, markersize=6, capsize=3)
    labels = [entry if isinstance(entry, str) else entry.label for entry in entries]
    axes.set_yticks(range(len(entries)), labels)
    for entry, label in zip(entries, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if isinstance(entry, str) else "normal")
    axes.tick_params("y", length=0)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    if ranked_by == "increase":
        axes.axvline(0, color=INK, linestyle="--", linewidth=1)
    axes.set_xlabel(_AXIS[ranked_by])
    axes.grid(False, axis="y")
    _plain_ticks(axes.xaxis, [one.values[ranked_by].mean for one in shown], axes.set_xscale)
    axes.margins(x=0.05)
    return figure


_AXIS = {"increase": "perplexity over bf16 with the same tokens, %", "perplexity": "perplexity"}


def method_styles(lines: Sequence[Line]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method."""
    methods = list(dict.fromkeys(one.method for one in lines if one.baseline != "bf16"))
    return {
        name: (COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]) for number, name in enumerate(methods)
    }


def _plain_ticks(axis: Any, values: Sequence[float], scale: Callable[..., Any]) -> None:
    """Numbers as one writes them; logarithmic away from 0 where one outlier would press the rest together."""
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    largest = max(map(abs, values), default=0)
    middle = median(map(abs, values)) if values else 0
    if middle and largest > 12 * middle:
        linear = 10 ** math.floor(math.log10(middle))
        scale("symlog", linthresh=linear, linscale=0.6)
        axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# Over the steps ------------------------------------------------------------------------------------------------------

Points = Sequence[tuple[int, float]]


@themed
def curves(panels: Mapping[str, Mapping[str, Sequence[Points]]], colours: Mapping[str, str] | None = None) -> list[Any]:
    """A panel for each measure, `PANELS` in a figure; in it a line for each run, the mean of its seeds.

    Args:
        panels: by the axis' words, with a title behind a colon; then by the run.
        colours: of runs that have one in other figures too.
    """
    names = dict.fromkeys(name for runs in panels.values() for name in runs)
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": (colours or {}).get(name, COLOURS[number % len(COLOURS)]),
            "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
        }
        for number, name in enumerate(names)
    }
    every = list(panels.items())
    return [_curves(dict(every[first : first + PANELS]), styles) for first in range(0, len(every), PANELS)]


def _curves(panels: Mapping[str, Mapping[str, Sequence[Points]]], styles: Mapping[str, Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(name for runs in panels.values() for name in runs))
    columns = min(2, len(panels))
    rows, under = math.ceil(len(panels) / columns), math.ceil(len(names) / 3)
    figure = Figure(figsize=(WIDTH, 3.2 * rows + 0.2 * under), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (words, runs) in zip(every, panels.items(), strict=False):
        for name, seeds in runs.items():
            drawn = thinned(over_seeds(seeds))
            marker = "o" if len(drawn) < 3 else None
            axes.plot(*zip(*drawn, strict=True), marker=marker, markersize=4, linewidth=1.2, **styles[name])
        label, _, title = words.partition(": ")
        axes.set(xlabel="optimizer step", ylabel=label, title=title)
        if low_end := _without_the_fall([over_seeds(seeds) for seeds in runs.values()]):
            axes.set_ylim(*low_end)
    for axes in every[len(panels) :]:
        axes.remove()
    handles = [Line2D([], [], **styles[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


def over_seeds(seeds: Sequence[Points]) -> list[tuple[int, float]]:
    """The mean over the seeds at the steps that all of them have."""
    every = [dict(points) for points in seeds]
    steps = sorted(set.intersection(*map(set, every)))
    return [(step, sum(points[step] for points in every) / len(every)) for step in steps]


def _without_the_fall(curves: Sequence[Points]) -> tuple[float, float] | None:
    """Where to cut an axis of curves that fall steeply at first, so that their ends can be told apart."""
    values = [value for points in curves for _, value in points if math.isfinite(value)]
    later = [value for points in curves for _, value in points[len(points) // 5 :] if math.isfinite(value)]
    if not later or max(later) == min(values) or max(values) - min(values) < 1.5 * (max(later) - min(later)):
        return None
    room = 0.05 * (max(later) - min(later))
    return min(values) - room, max(later) + room


def thinned(points: Points) -> list[tuple[float, float]]:
    """`points`, or the means of `POINTS` stretches of more."""
    if len(points) <= POINTS:
        return [(float(step), value) for step, value in points]
    cuts = [len(points) * number // POINTS for number in range(POINTS + 1)]
    stretches = [points[start:stop] for start, stop in pairwise(cuts)]
    return [
        (sum(step for step, _ in some) / len(some), sum(value for _, value in some) / len(some)) for some in stretches
    ]


# By layer ------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a layer is in a map: the number of its block, and what it is in there."""

    number: int
    kind: str


def place(layer: str) -> Place | None:
    """``model.layers.3.mlp.up_proj`` is ``mlp.up_proj`` of block 3; None for a name without a number."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    if match is None:
        return None
    return Place(int(match[1]), re.sub(r"(?<=\.)\d+(?=\.)", "*", layer[match.end() :]) or "linear")


@themed
def layer_maps(runs: Mapping[str, Mapping[str, float]], words: str, worst_is_low: bool) -> Any:
    """For each run, up to `MAPS` of them, what `words` names, by block and kind of layer; of experts the worst.

    Runs without finite values are left out; None if no other is there.
    """
    from matplotlib.figure import Figure

    worst = min if worst_is_low else max
    maps: dict[str, dict[Place, float]] = {}
    for run, layers in runs.items():
        cells: dict[Place, float] = {}
        for name, value in layers.items():
            if math.isfinite(value) and (where := place(name)) is not None:
                cells[where] = worst(cells.get(where, value), value)
        if cells and len(maps) < MAPS:
            maps[run] = cells
    if not maps:
        return None
    kinds = list(dict.fromkeys(where.kind for cells in maps.values() for where in cells))
    blocks = sorted({where.number for cells in maps.values() for where in cells})
    values = [value for cells in maps.values() for value in cells.values()]
    figure = Figure(figsize=(WIDTH, 0.7 + len(maps) * (0.55 + 0.24 * len(kinds))), layout="constrained")
    panels = figure.subplots(len(maps), 1, squeeze=False, sharex=True)[:, 0]
    low, high = min(values, default=0), max(values, default=1)
    for axes, (run, cells) in zip(panels, maps.items(), strict=True):
        table = [[cells.get(Place(number, kind), math.nan) for number in blocks] for kind in kinds]
        image = axes.imshow(table, cmap="cividis", vmin=low, vmax=high if high > low else low + 1, aspect="auto")
        if len(blocks) <= 24:
            for row, of_kind in enumerate(table):
                for column, value in enumerate(of_kind):
                    light = (value - low) / (high - low or 1) > 0.55
                    if math.isfinite(value):
                        colour = "black" if light else "white"
                        axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color=colour)
        every = max(1, math.ceil(len(blocks) / 24))
        axes.set_xticks(range(0, len(blocks), every), [str(one) for one in blocks[::every]])
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axes.set_title(run, loc="left")
        axes.grid(False)
    panels[-1].set_xlabel("block")
    figure.colorbar(image, ax=list(panels), label=words, fraction=0.025, pad=0.01)
    return figure


# Sizes and sensitivity -----------------------------------------------------------------------------------------------


@themed
def sizes(checkpoints: Sequence[Stored]) -> Any:
    """What each checkpoint's bytes are, and what the same model takes in 16 bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.2 + 0.35 * len(checkpoints)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(checkpoints)
    for words, colour, kind in (
        ("codes", COLOURS[0], "codes"),
        ("scales and the like", COLOURS[1], "scales"),
        ("not quantized", "#8a8a8a", "plain"),
    ):
        widths = [getattr(one.sizes, kind) / MIB for one in checkpoints]
        axes.barh(range(len(checkpoints)), widths, 0.6, left, color=colour, label=words)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for number, one in enumerate(checkpoints):
        whole = (one.sizes.before + one.sizes.plain) / MIB
        axes.plot([whole, whole], [number - 0.35, number + 0.35], color=INK, label="" if number else "in 16 bits")
    axes.set_yticks(range(len(checkpoints)), [one.path[-60:] for one in checkpoints])
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.grid(False, axis="y")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


@themed
def sensitivities(costs: Sequence[Mapping[str, Any]]) -> Any:
    """The units whose quantization costs most, with each scheme: the increase of the mean loss."""
    from matplotlib.figure import Figure

    schemes = [scheme for scheme in dict.fromkeys(cost["scheme"] for cost in costs) if scheme != "-"]
    increase = {(cost["unit"], cost["scheme"]): cost["increase"] for cost in costs}
    worst: dict[str, float] = {}
    for cost in costs:
        worst[cost["unit"]] = max(worst.get(cost["unit"], 0.0), cost["increase"])
    units = sorted(worst, key=worst.__getitem__)[-BARS:]
    figure = Figure(figsize=(WIDTH, 1.3 + 0.3 * len(units)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(schemes))
    for number, scheme in enumerate(schemes):
        places = [place - (number - (len(schemes) - 1) / 2) * height for place in range(len(units))]
        widths = [increase.get((unit, scheme), 0.0) for unit in units]
        axes.barh(places, widths, height, color=COLOURS[number % len(COLOURS)], label=scheme)
    axes.set_yticks(range(len(units)), units, fontsize=8)
    axes.set_xlabel("increase of the mean loss, nats")
    axes.grid(False, axis="y")
    figure.legend(loc="outside upper center", ncols=3)
    return figure
