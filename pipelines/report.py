"""One self-contained page about a run: checks, scores with their protocol, curves, clips that play. Opens offline."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.encode import encode_webp
from data.files import write_atomic

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --line: #8884; --dim: #777; --good: #18794e; --bad: #cd2b31; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
  p.note, td.note, figcaption { color: var(--dim); font-size: .9rem; }
  table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
  th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
  td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
  .pass { color: var(--good); font-weight: 600; } .fail { color: var(--bad); font-weight: 600; }
  figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } img.clip { image-rendering: pixelated; }
</style></head><body>
<h1>{{ title }}</h1><p class="note">{{ subtitle }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.rows %}<div class="wide"><table><tr>{% for h in section.header %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row %}<td class="{{ cell_class(cell, loop.index0) }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% for figure in section.figures %}<figure><img class="{{ figure.kind }}" alt="{{ figure.caption }}" src="{{ figure.source }}">
<figcaption>{{ figure.caption }}</figcaption></figure>{% endfor %}
{% endfor %}
</body></html>
"""


@dataclass
class Figure:
    caption: str
    source: str  # data: URI
    kind: str = "plot"


@dataclass
class Section:
    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    figures: list[Figure] = field(default_factory=list)


def clip_figure(video: np.ndarray, caption: str, fps: float = 8, width: int = 720) -> Figure:
    """video uint8 (T, H, W, 3), enlarged by a whole factor to about `width` pixels, as an animated WebP that loops."""
    factor = max(1, width // video.shape[2])
    large = video.repeat(factor, axis=1).repeat(factor, axis=2)
    return Figure(caption, _uri("image/webp", encode_webp(large, fps)), "clip")


def curve_figure(
    series: dict[str, tuple[Sequence[float], Sequence[float]]], caption: str, log_y: bool = False
) -> Figure:
    """series: name -> (steps, values), drawn by matplotlib."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.2, 3), layout="constrained")
    axes = canvas.subplots()
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, marker="o" if len(steps) < 12 else "", markersize=3)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    canvas.savefig(picture, format="png", dpi=110)
    return Figure(caption, _uri("image/png", picture.getvalue()))


def series_of(records: Sequence[dict], *names: str) -> dict[str, tuple[list[float], list[float]]]:
    """Curves of a metrics.jsonl: only names that occur, only finite values."""
    found = {}
    for name in names:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            found[name] = tuple(map(list, zip(*points, strict=True)))
    return found


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _cell_class(cell: Any, column: int) -> str:
    if cell in ("pass", "fail"):
        return cell
    return "number" if column == 1 else "note" if column > 1 else ""


def write_report(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Render the page; every text is escaped."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    page = template.render(title=title, subtitle=subtitle, sections=sections, cell_class=_cell_class)
    write_atomic(path, page)
    return path
