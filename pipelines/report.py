"""The parts of a self-contained page: texts, tables, curves, clips that play. Opens offline, in light and dark.

The programs that fill it: pipelines/demo.py, pipelines/run_report.py and the tables of the paper.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.core.files import write_atomic
from data.encode import encode_webp
from data.video import probe
from pipelines.read_run import is_number

MARK = '<meta name="generator" content="OmniLatte">'  # by which a program knows a page of its own
BINS = 400  # points of a curve at most
WIDTH = 720  # pixels to which small clips are enlarged
Series = dict[str, tuple[Sequence[float], Sequence[float]]]
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{{ mark|safe }}
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --back: #fff; --card: #f4f5f8; --ink: #1a1d21; --dim: #5c636e; --line: #dfe2e7;
    --good: #18794e; --bad: #c62a2f; --link: #0b5fc1; }
  @media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1f2329; --ink: #e8eaee; --dim: #a2a9b4;
    --line: #343943; --good: #4cc38a; --bad: #ff7b7f; --link: #78b4ff; } }
  * { box-sizing: border-box; }
  body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
    max-width: 66rem; margin: 2rem auto 4rem; padding: 0 1.2rem; }
  h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line); }
  a { color: var(--link); } p { margin: .4rem 0 1rem; } .note, figcaption { color: var(--dim); font-size: .9rem; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1rem 0; }
  .tile { background: var(--card); border-radius: .6rem; padding: .7rem 1rem; min-width: 0; overflow-wrap: anywhere; }
  .tile b { display: block; font-size: 1.2rem; line-height: 1.5; font-variant-numeric: tabular-nums; }
  .wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .95rem; }
  th, td { text-align: left; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
  th { color: var(--dim); font-weight: 600; font-size: .85rem; } td { overflow-wrap: anywhere; min-width: 6rem; }
  td.number { font-variant-numeric: tabular-nums; }
  .pass { color: var(--good); font-weight: 600; } .fail { color: var(--bad); font-weight: 600; }
  summary { cursor: pointer; color: var(--link); }
  .figures { display: grid; gap: 1.4rem; }
  .figures.plot, .figures.many { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
  .figures.example, .figures.example.many { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .9rem; }
  figure { margin: 0; min-width: 0; } figcaption { margin-top: .3rem; overflow-wrap: anywhere; }
  img, video { display: block; max-width: 100%; height: auto; border-radius: .4rem; }
  img.plot, img.example { width: 100%; } .clip { image-rendering: pixelated; }
</style></head><body>
<h1>{{ title }}</h1><p class="note">{{ subtitle }}</p>
{% macro table(section) %}
<div class="wide"><table><tr>{% for h in section.header %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row %}<td class="{{ cell_class(cell, loop.index0, section.dim_from) }}">
{%- if cell.href is defined %}<a href="{{ cell.href }}">{{ cell.text }}</a>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endmacro %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.tiles %}<div class="tiles">{% for name, value, note in section.tiles %}
<div class="tile"><span class="note">{{ name }}</span><b>{{ value }}</b><span class="note">{{ note }}</span></div>
{% endfor %}</div>{% endif %}
{% if section.rows and section.folded %}<details><summary>{{ section.folded }}</summary>{{ table(section) }}</details>
{% elif section.rows %}{{ table(section) }}{% endif %}
{% if section.figures %}<div class="figures {{ section.figures[0].kind }} {{ "many" if section.figures|length > 2 }}">
{% for figure in section.figures %}<figure>{% if figure.source.startswith("data:video") %}<video class="{{ figure.kind }}"
 aria-label="{{ figure.alt or figure.caption }}" src="{{ figure.source }}" {% if figure.width %}width="{{ figure.width }}"{% endif %} controls autoplay loop muted playsinline></video>
{% else %}<img class="{{ figure.kind }}" alt="{{ figure.alt or figure.caption }}" src="{{ figure.source }}"{% if figure.width %} width="{{ figure.width }}"{% endif %}>
{% endif %}<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% endfor %}
</body></html>
"""


@dataclass
class Figure:
    """A picture or a video. kind: "plot", "clip" (enlarged, sharp pixels), "film" (as it is), "example" (a tile)."""

    caption: str
    source: str  # data: URI
    kind: str = "plot"
    alt: str = ""  # what a screen reader says; empty: the caption
    width: int | None = None  # in CSS pixels; None: the picture's own


@dataclass(frozen=True)
class Link:
    """A table cell that leads to a file; href: relative to the page, quoted."""

    text: str
    href: str


@dataclass
class Section:
    """A heading with, in this order: text, tiles (name, value, note), a table, figures of one kind.

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


def clip_figure(
    video: np.ndarray, caption: str, fps: float = 8, width: int = WIDTH, kind: str = "clip"
) -> Figure:
    """video uint8 (T, H, W, 3), enlarged by a whole factor to about `width` pixels, as an animated WebP that loops."""
    factor = max(1, width // video.shape[2])
    large = video.repeat(factor, axis=1).repeat(factor, axis=2)
    return Figure(caption, data_uri("image/webp", encode_webp(large, fps)), kind)


def video_figure(path: Path, caption: str) -> Figure:
    """An mp4 as it is; its size in pixels goes into the caption. Raises ValueError when it cannot be read."""
    info = probe(path)
    factor = max(1, WIDTH // info.width)
    frames = "1 frame" if info.num_frames == 1 else f"{info.num_frames} frames"
    text = f"{caption} ({frames}, {info.width} x {info.height} pixels)"
    source = data_uri("video/mp4", path.read_bytes())
    return Figure(text, source, "clip" if factor > 1 else "film", width=factor * info.width)


def downsample(steps: Sequence[float], values: Sequence[float], bins: int = BINS) -> np.ndarray:
    """(4, n) of step, mean, least and greatest value of equal parts of a curve, n <= bins: no spike is lost."""
    points = np.array([steps, values], dtype=np.float64)
    count = min(bins, points.shape[1])
    parts = np.array_split(points, count, axis=1) if count else []
    return np.array([[p[0].mean(), p[1].mean(), p[1].min(), p[1].max()] for p in parts]).reshape(-1, 4).T


def _described(series: Series, caption: str) -> str:
    """The curve in words: where each line begins and ends."""
    ends = [
        f"{name} from {y[0]:.4g} at step {x[0]:,.0f} to {y[-1]:.4g} at step {x[-1]:,.0f}"
        for name, (x, y) in series.items()
        if len(x)
    ]
    return f"{caption}. {'; '.join(ends[:8])}"


def curve_figure(series: Series, caption: str, log_y: bool = False) -> Figure:
    """series: name -> (steps, values), drawn as SVG; a long curve as its mean with a band from least to greatest.

    log_y: logarithmic axis, where all values are above 0.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    ink = "#0a0b0c"  # becomes the page's own text colour, light or dark
    colors = ("#3b82d6", "#e2711d", "#2f9e62", "#b35cc9", "#c29a1f", "#d9495b", "#1fa3b0", "#8a7566")
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style = dict.fromkeys(names, ink) | {"svg.fonttype": "none", "svg.hashsalt": ""}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(6.4, 2.9), layout="constrained")
        axes = canvas.subplots()
        for n, (name, (steps, values)) in enumerate(series.items()):
            if not len(steps):
                continue  # its colour stays its own on a page with several charts
            x, mean, low, high = downsample(steps, values)
            look = {"color": colors[n % len(colors)], "linestyle": ("-", "--", ":")[n // len(colors) % 3]}
            label = f" {name}" if name.startswith("_") else name  # matplotlib hides those with _
            axes.plot(x, mean, label=label, marker="o" if len(x) < 12 else "", markersize=3, **look)
            if (high > low).any():
                axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        if log_y:
            _log_axis(axes, [v for _, values in series.values() for v in values])
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.15)
        if len(series) > 1:
            legend = axes.legend(frameon=False, fontsize="small", ncols=1 + (len(series) > 5))
            for text in legend.get_texts():
                text.set_parse_math(False)  # a run's name may hold a $
        axes.spines[["top", "right"]].set_visible(False)
        picture = io.StringIO()
        canvas.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    theme = "<style>svg{color:#1a1d21}@media(prefers-color-scheme:dark){svg{color:#e8eaee}}</style>"
    drawn = picture.getvalue().replace(ink, "currentColor").replace("<defs>", theme + "<defs>", 1)
    return Figure(caption, data_uri("image/svg+xml", drawn.encode()), "plot", _described(series, caption))


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where values are positive and span more than a factor of 3, with plain numbers at the ticks."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    if values and min(values) > 0 and max(values) > 3 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(Plain())
        axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))


def series_of(records: Sequence[dict], *names: str) -> Series:
    """Curves of a metrics.jsonl: only names that occur, only finite values."""
    found = {}
    for name in names:
        points = [(r["step"], r[name]) for r in records if is_number(r.get(name))]
        if points:
            found[name] = tuple(map(list, zip(*points, strict=True)))
    return found


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _cell_class(cell: Any, column: int, dim_from: int) -> str:
    if cell in ("pass", "fail"):
        return cell
    return "note" if column >= dim_from else "number" if column else ""


def write_report(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Render the page; every text is escaped."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    page = template.render(
        mark=MARK, title=title, subtitle=subtitle, sections=sections, cell_class=_cell_class
    )
    write_atomic(path, page)
    return path
