"""A self-contained page: texts, tables, curves, clips that play. Opens offline, in light and dark.

Layout: page.html.j2. page.js makes the curves interactive and gives videos one button; without it the page shows pictures.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogFormatter

from data.core.files import write_atomic
from data.encode import encode_webp
from data.video import probe

MARK = '<meta name="generator" content="OmniLatte">'  # by which a program knows a page of its own
BINS = 400  # points of a curve at most
WIDTH = 720  # pixels to which small clips are enlarged
LINES = {"-": "", "--": "7 4", ":": "2 4"}  # of matplotlib -> of SVG
COLORS = ("#3b82d6", "#e2711d", "#2f9e62", "#b35cc9", "#c29a1f", "#d9495b", "#1fa3b0", "#8a7566")
MARKERS = "os^DvPX*"  # tell curves apart that are printed in grey
INK = "#0a0b0c"  # replaced by the page's own text colour, light or dark
Series = dict[str, tuple[Sequence[float], ...]]  # name -> (x, y) or (x, y, low, high)
Styles = dict[str, tuple[str, str]]  # name -> (colour, line)


@dataclass
class Figure:
    """A picture or a video. kind: "plot", "clip" (enlarged, sharp pixels), "film" (as it is), "example" (a tile)."""

    caption: str
    source: str  # data: URI
    kind: str = "plot"
    alt: str = ""  # what a screen reader says; empty: the caption
    width: int | None = None  # in CSS pixels; None: the picture's own
    chart: str = ""  # the curves of a plot as JSON, for page.js


@dataclass(frozen=True)
class Link:
    """A table cell that leads to a file. href: relative to the page, quoted."""

    text: str
    href: str


@dataclass(frozen=True)
class Key:
    """A column's heading with the colour that its run has in all charts."""

    text: str
    color: str


@dataclass
class Section:
    """A heading with, in this order: text, tiles (name, value, note), a table, a grid, figures of one kind.

    grid: rows of (name, figures or texts), below `header`.
    folded: the words to click on when the table is long and should begin closed. dim_from: columns from this one on
    are remarks, in a quieter colour.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    figures: list[Figure] = field(default_factory=list)
    tiles: Sequence[tuple[str, str, str]] = ()
    folded: str = ""
    dim_from: int = 2
    grid: Sequence[tuple[str, Sequence[Figure | str]]] = ()


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Render the page; every text is escaped."""
    template = (Path(__file__).parent / "page.html.j2").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    script = (Path(__file__).parent / "page.js").read_text()
    page = environment.from_string(template).render(
        mark=MARK, title=title, subtitle=subtitle, sections=sections, cell_class=_cell_class, script=script
    )
    write_atomic(path, page)
    return path


def _cell_class(cell: Any, column: int, dim_from: int) -> str:
    if cell in ("pass", "fail"):
        return cell
    length = len(getattr(cell, "text", str(cell)))
    kind = "note" if column >= dim_from else "number" if column else ""
    return f"{kind} {'short' if length <= 20 else 'long' if length > 40 else ''}".strip()


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- videos ----------------------------------------------------------------------------------------------


def clip_figure(
    video: np.ndarray, caption: str, fps: float = 8, width: int = WIDTH, kind: str = "clip"
) -> Figure:
    """Show uint8 (T, H, W, 3), enlarged by a whole factor to about `width` pixels, as an animated WebP that loops."""
    factor = max(1, width // video.shape[2])
    large = video.repeat(factor, axis=1).repeat(factor, axis=2)
    return Figure(caption, data_uri("image/webp", encode_webp(large, fps)), kind)


def video_figure(path: Path, caption: str) -> Figure:
    """Show an mp4 as it is, its size in the caption. Raises ValueError when it cannot be read."""
    info = probe(path)
    factor = max(1, WIDTH // info.width)
    frames = "1 frame" if info.num_frames == 1 else f"{info.num_frames} frames"
    text = f"{caption} ({frames}, {info.width} x {info.height} pixels)"
    source = data_uri("video/mp4", path.read_bytes())
    return Figure(text, source, "clip" if factor > 1 else "film", width=factor * info.width)


# ---- curves ----------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float; JSON's NaN and null are not."""
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def series_of(records: Sequence[dict], *names: str) -> Series:
    """Curves of a metrics.jsonl: only names that occur, only finite values."""
    found: Series = {}
    for name in names:
        for record in records:
            if is_number(record.get(name)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(record[name])
    return found


def has_points(series: Series) -> bool:
    """Whether there is anything to draw."""
    return any(len(x) for x, *_ in series.values())


def downsample(steps: Sequence[float], values: Sequence[float], bins: int = BINS) -> np.ndarray:
    """(4, n) of step, mean, least and greatest value of equal parts of a curve, n <= bins: no spike is lost."""
    points = np.array([steps, values], dtype=np.float64)
    count = min(bins, points.shape[1])
    parts = np.array_split(points, count, axis=1) if count else []
    return np.array([[p[0].mean(), p[1].mean(), p[1].min(), p[1].max()] for p in parts]).reshape(-1, 4).T


def styles_of(names: Sequence[str]) -> Styles:
    """A colour for each name, and another kind of line when the colours are used up."""
    lines = list(LINES)
    return {n: (COLORS[i % len(COLORS)], lines[i // len(COLORS) % 3]) for i, n in enumerate(names)}


def curve_figure(series: Series, caption: str, log_y: bool = False, styles: Styles | None = None) -> Figure:
    """Draw curves against steps; a long one as its mean with a band from least to greatest value.

    log_y: logarithmic axis, where all values are above 0 and far apart. styles: colour and line of each curve.
    """
    styles = styles or styles_of(list(series))
    ends = []  # the curves in words, for those who cannot see them
    for name, (x, y, *_) in series.items():
        if len(x):
            ends.append(f"{name} from {y[0]:.4g} at step {x[0]:,.0f} to {y[-1]:.4g} at step {x[-1]:,.0f}")
    # The picture, for readers without scripts; page.js draws the chart from the same points.
    figure = svg_figure(
        curve_svg(series, log_y=log_y, styles=styles), caption, f"{caption}. {'; '.join(ends[:8])}"
    )
    figure.chart = _chart(series, caption, log_y and _far_apart(series), styles)
    return figure


def _chart(series: Series, caption: str, log: bool, styles: Styles) -> str:
    """The curves for page.js; "" without a point."""
    curves = []
    for name, (x, y, *_) in series.items():
        if len(x):
            curve = {"name": name, "color": styles[name][0], "dash": LINES[styles[name][1]]}
            for key, column in zip(("x", "y", "low", "high"), downsample(x, y), strict=True):
                curve[key] = [float(f"{v:.6g}") for v in column]
            curves.append(curve)
    return json.dumps({"title": caption, "log": log, "series": curves}) if curves else ""


def _far_apart(series: Series) -> bool:
    values = [float(v) for _, ys, *_ in series.values() for v in ys]
    return bool(values) and min(values) > 0 and max(values) > 3 * min(values)


def svg_figure(svg: str, caption: str, alt: str) -> Figure:
    return Figure(caption, data_uri("image/svg+xml", svg.encode()), "plot", alt)


def curve_svg(
    series: Series, xlabel: str = "step", ylabel: str = "", log_y: bool = False, styles: Styles | None = None
) -> str:
    """Draw series as SVG text in the colours of the page; without any point it says that nothing is measured."""
    styles = styles or styles_of(list(series))
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    with matplotlib.rc_context(dict.fromkeys(inked, INK) | {"svg.fonttype": "none", "svg.hashsalt": ""}):
        canvas = Canvas(figsize=(6.4, 2.9), layout="constrained")
        axes = canvas.subplots()
        # Curves: the mean, and a band from least to greatest where points were joined.
        for name, (x, y, *band) in series.items():
            if not len(x):
                continue  # its colour stays its own on a page with several charts
            x, y, low, high = (np.asarray(v) for v in ((x, y, *band) if band else downsample(x, y)))
            style = dict(zip(("color", "linestyle"), styles[name], strict=True))
            label = f" {name}" if name.startswith("_") else name  # matplotlib hides those with _
            number, apart = list(styles).index(name), max(1, len(x) // 8)
            style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 4}
            style["markevery"] = (number * apart // 4 % apart, apart)
            axes.plot(x, y, label=label, **style)
            if len(x) == 1:
                axes.errorbar(x, y, yerr=[y - low, high - y], color=style["color"])
            elif (high > low).any():
                axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        if not has_points(series):
            axes.text(0.5, 0.5, "nothing measured yet", ha="center", transform=axes.transAxes)
        elif log_y and _far_apart(series):
            _log_axis(axes)
        # Axes and legend
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if xlabel == "step":
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlim(left=0)
        axes.grid(alpha=0.15)
        if len(series) > 1:
            legend = axes.legend(frameon=False, fontsize="small", ncols=1 + (len(series) > 5))
            for text in legend.get_texts():
                text.set_parse_math(False)  # a run's name may hold a $
        axes.spines[["top", "right"]].set_visible(False)
        picture = io.StringIO()
        canvas.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # The page's colours, light or dark
    theme = "<style>svg{color:#1a1d21}@media(prefers-color-scheme:dark){svg{color:#e8eaee}}</style>"
    return picture.getvalue().replace(INK, "currentColor").replace("<defs>", theme + "<defs>", 1)


def _log_axis(axes: Any) -> None:
    """A logarithmic axis with plain numbers at its ticks."""

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))
