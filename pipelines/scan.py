"""Look through a data set before training: counts, lengths, sizes, rates, damaged files with reasons, a contact sheet.

    python -m pipelines.scan /data/videos
    python -m pipelines.scan mine.csv
    python -m pipelines.scan /data/UCF-101 source.name=ucf101

Every file is decoded once; the scan is kept in source.index_dir, where a training finds it again.
"""

import io
import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from data.core.cli import run
from data.core.files import printable, write_atomic
from data.core.lazy import lazy
from data.core.option import option
from data.decoder import BadVideo
from data.sources import Source, video_frames
from data.user_list import SUFFIXES
from pipelines.training.config import parse
from pipelines.training.folder import refuse_in_data, summary
from pipelines.training.log import command
from pipelines.training.settings import SourceConfig

openers = lazy("pipelines.training.open")
log = logging.getLogger(__name__)
LENGTHS = 9, 17, 25, 49, 81, 97  # clips of the paper and below
SHOWN = 20  # damaged files on the screen
CELL, CAPTION = 160, 14  # pixels
SOFTWARE = "omnilatte scan"  # in the contact sheets


@dataclass
class ScanConfig:
    source: SourceConfig = option(lambda: SourceConfig(val_fraction=0.0), "")
    sheet: str = option("runs/scan.png", "file of the contact sheet; empty: none", free=True)
    sheet_videos: int = option(30, "videos on it, spread over all", free=True)


def describe(source: Source) -> str:
    """The facts of a source on a few lines, for a person."""
    # How many there are: a file may hold several videos.
    videos, frames = source.videos, source.videos.column("num_frames")
    files = {videos[n].record.path for n in range(len(videos))} if "cut" in videos.columns else videos
    lines = [f"{len(videos)} videos" + (f" in {len(files)} files" if len(files) != len(videos) else "")]
    lines[0] += f", {len(source.damaged)} damaged, {len(source.missing)} of the list not on disk"
    # How long they are
    least, low, middle, high, most = np.percentile(frames, (0, 5, 50, 95, 100), method="nearest")
    rates = videos.column("fps")
    hours = (frames / np.where(rates > 0, rates, np.inf)).sum() / 3600
    quantiles = f"min {least:,}, 5 % {low:,}, median {middle:,}, 95 % {high:,}, max {most:,}"
    lines.append(f"length  {quantiles} frames; {frames.sum():,} in all, {hours:.2f} h")
    fits = [f"{length} frames: {int((frames >= length).sum())}" for length in LENGTHS]
    lines.append("long enough for a clip of  " + ", ".join(fits))
    # How large, and at which rates
    sizes, speeds = Counter(), Counter()
    columns = (videos.column(name).tolist() for name in ("width", "height", "fps"))
    for width, height, rate in zip(*columns, strict=True):
        sizes[f"{width} x {height}"] += 1
        speeds[f"{rate:.5g} fps" if rate else "unknown"] += 1
    lines += [f"size    {_counts(sizes)}", f"rate    {_counts(speeds)}"]
    # Of which classes
    if source.class_names:
        labels = Counter(map(videos.label, range(len(videos))))
        classes = {name: labels[n] for n, name in enumerate(source.class_names)}
        lines.append(f"{len(classes)} classes  {_counts(classes)}")
        if empty := [name for name in classes if not classes[name]]:
            lines.append("without a video  " + ", ".join(empty))
    lines += [f"damaged  {printable(str(r.path))}: {r.damaged}" for r in source.damaged[:SHOWN]]
    return "\n".join(lines)


def _counts(counts: dict, most: int = 8) -> str:
    shown = [f"{name}: {count}" for name, count in Counter(counts).most_common(most)]
    rest = len(counts) - most
    return ", ".join(shown) + (f", and {rest} more" if rest > 0 else "")


def contact_sheet(source: Source, count: int) -> Image.Image:
    """The middle frame of `count` videos, spread over all of them, with their names."""
    videos = source.videos
    count = min(count, len(videos))
    # A white sheet with a cell for each video
    columns = min(6, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    # Their pictures, each with the end of its name; one that cannot be read leaves its cell empty.
    for place in range(count):
        video = videos[place * len(videos) // count]
        left, top = place % columns * CELL, place // columns * (CELL + CAPTION)
        try:
            frames = video_frames(video, [video.record.num_frames // 2], CELL, source.demo)
            picture = Image.fromarray(np.asarray(frames)[0])
        except BadVideo as error:
            log.warning("not on the sheet: %s: %s", printable(video.name), error)
            continue
        picture.thumbnail((CELL - 4, CELL - 4))
        sheet.paste(picture, (left + 2, top + 2))
        name = printable(video.name)[-26:].encode("ascii", "replace").decode()
        draw.text((left + 2, top + 2 + picture.height), name, fill="black")
    return sheet


def config_from(argv: list[str] | None) -> tuple[ScanConfig, bool]:
    """The settings, and whether only they are asked for. The first word may be the folder or the list."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0][0] != "-" and ("=" not in words[0] or Path(words[0]).exists()):
        place = words.pop(0)
        # A list, with the reader for lists if none is named; or a folder.
        if place.endswith(SUFFIXES) or Path(place).is_file():
            words = [f"source.list_file={place}", *words]
            if not any(word.startswith("source.name=") for word in words):
                words = ["source.name=csv", "source.split=all", *words]
        else:
            words = [f"source.root={place}", *words]
    config, args = parse(ScanConfig, words, "scan", __doc__, {"--data": "source.root"})
    return config, args.dry_run


def _mark() -> PngInfo:
    """What makes a contact sheet known as ours."""
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    return mark


def _claim_sheet(path: Path) -> None:
    """ValueError unless the sheet is new or one of ours: no picture of a user's is replaced."""
    if not path.exists():
        return
    try:
        with Image.open(path) as picture:
            ours = picture.info.get("Software") == SOFTWARE
    except OSError:
        ours = False
    if not ours:
        raise ValueError(f"sheet={path}: exists and is no contact sheet; choose another name")


def main(argv: list[str] | None = None) -> int:
    config, dry = config_from(argv)
    if dry:
        print(summary(config))
        return 0
    # Nothing of the user's may be replaced, and a mixture has no files of its own.
    settings, sheet = config.source, config.sheet
    if sheet:
        refuse_in_data(sheet, "sheet", settings)
        _claim_sheet(Path(sheet))
    if settings.parts or settings.name == "mixture":
        raise ValueError("source.name=mixture: scan its parts one by one")
    # The facts, from a scan that is kept
    source = openers.open_videos(settings, CELL)
    print(describe(source))
    index = Path(settings.index_dir)
    if len(source.damaged) > SHOWN:
        print(f"... all {len(source.damaged)}: {index / f'{settings.name}-quarantine.tsv'}")
    # The pictures
    if sheet:
        Path(sheet).parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        contact_sheet(source, config.sheet_videos).save(content, "PNG", pnginfo=_mark())
        write_atomic(sheet, content.getvalue())
        print(f"contact sheet: {sheet}")
    # The command that trains on it
    keys = [f"source.{key}" for key in ("name", "root", "list_file", "labels", "index_dir")]
    print(f"next: {command('train_vae', config=config, keys=keys)} model.init_from=SD_VAE_FOLDER")
    return 0


if __name__ == "__main__":
    run(main)
