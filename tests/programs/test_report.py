"""The page of a run, made from folders that are whole, half written, large or hostile."""

import base64
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines.results.page import BINS, COLORS, MARK, Link, Section, curve_figure, downsample, write_page
from pipelines.results.run_page import chosen, thinned
from pipelines.run_report import main
from tests.programs.runs import noise, write_run, write_samples

ROOT = Path(__file__).parents[2]
CURVE = [{"step": s, "loss": 1 / (s + 1), "val/psnr": 20 + s / 10} for s in range(100)]


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [a for t, a in self.tags if t == tag]


def svg(source):
    return base64.b64decode(source.split(",", 1)[1]).decode()


@pytest.fixture
def report(tmp_path):
    def go(*arguments):
        main([*map(str, arguments)])
        return Page(tmp_path / "run" / "report.html")

    return go


def test_a_page_has_curves_videos_settings_versions_and_links_that_lead_somewhere(tmp_path, report):
    run = write_run(tmp_path / "run", metrics=CURVE, videos=["val_00000000.mp4", "val_00000100.mp4"])
    page = report(run)
    assert [v["src"][:15] for v in page.all("video")] == ["data:video/mp4;"] * 2
    assert (
        "step 100: original | reconstruction | error x 4, held-out clips (5 frames, 48 x 16 pixels)"
        in page.text
    )
    assert page.text.index("step 100: original") < page.text.index("step 0: original")  # newest first
    assert len(page.all("img")) == 2
    assert "29.90 dB" in page.text
    assert "clip.num_frames 9" in page.text
    assert "torch 2.6" in page.text
    links = [a["href"] for a in page.all("a")]
    assert {"config.yaml", "metrics.jsonl", "media"} <= set(links)
    assert all((run / link).exists() for link in links)


def test_every_picture_and_video_says_in_words_what_it_shows(tmp_path, report):
    run = write_run(tmp_path / "run", metrics=CURVE, videos=["val_00000000.mp4"])
    write_samples(run / "samples")
    page = report(run)
    words = [a["alt"] for a in page.all("img")] + [a["aria-label"] for a in page.all("video")]
    assert len(words) == 2 + 8 + 1
    assert all(len(w) > 3 for w in words)
    assert any("loss from 1 at step 0 to 0.01 at step 99" in w for w in words)


def test_a_run_that_has_only_begun_gets_a_page(tmp_path, report):
    page = report(write_run(tmp_path / "run"))
    assert "Nothing is logged yet." in page.text
    assert "The run has written no videos yet." in page.text
    assert "0 of 100" in page.text


def test_half_written_lines_and_values_that_are_no_numbers_do_not_stop_the_page(tmp_path, report):
    run = write_run(tmp_path / "run", metrics=[{"step": 1, "loss": 0.5}])
    bad = (
        '{"step": 2, "loss": NaN}\n{"step": 3, "loss": null}\n{"step": null, "loss": 1}\n[3]\n{"step": "x"}\n'
    )
    with open(run / "metrics.jsonl", "a") as file:
        file.write(bad + '{"step": 4, "loss": 0.25}\n{"step": 5, "loss": NaN}\n{"step": 6, "lo')
    page = report(run)
    assert "Not finite in run, and left out of the curves: loss 3 times, first at step 2." in page.text
    assert "loss from 0.5 at step 1 to 0.25 at step 4" in page.all("img")[0]["alt"]
    assert "at step 4" in page.text


def test_names_and_values_of_a_run_are_text_never_markup(tmp_path):
    evil = "<script>alert(1)</script> $x^{$"
    run = write_run(
        tmp_path / evil.replace("/", "\\"),
        metrics=[{"step": s, evil: s, "_hidden": s} for s in (1, 2)],
        settings={"note": evil, evil: evil},
        videos=["<b>_00000001.mp4"],
    )
    other = write_run(tmp_path / "_other", metrics=[{"step": s, evil: s} for s in (1, 2)])
    main([str(run), str(other), "--out", str(tmp_path / "page.html")])
    page = Page(tmp_path / "page.html")
    scripts = re.findall("<script[^>]*>(.*?)</script>", (tmp_path / "page.html").read_text(), re.DOTALL)
    assert scripts == [(ROOT / "pipelines" / "results" / "page.js").read_text()]
    assert page.all("script") == [{}]
    assert not page.all("b")
    assert evil in page.text
    drawn = [svg(a["src"]) for a in page.all("img")]
    assert not any("<script" in d for d in drawn)
    assert any("_other" in d for d in drawn)  # matplotlib would hide a label that begins with _


def test_a_log_of_100000_records_makes_a_small_page_in_seconds_and_keeps_every_spike(tmp_path, report):
    run = write_run(tmp_path / "run", steps=200_000)
    names = ("loss", "loss/rec", "grad_norm/vae")
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(100_000):
            values = {n: math.sin(step / 1000) + 2 for n in names}
            file.write(json.dumps({"step": step, **values, "loss": 77.0 if step == 54_321 else 1.0}) + "\n")
    start = time.process_time()
    page = report(run)
    assert time.process_time() - start < 10
    assert (run / "report.html").stat().st_size < 1e6
    assert len(page.all("img")) == len(names)
    steps, mean, low, high = downsample(
        range(100_000), [77.0 if s == 54_321 else 1.0 for s in range(100_000)]
    )
    assert len(steps) == BINS
    assert high.max() == 77
    assert (low <= mean).all()


def test_the_page_stays_below_its_limit_and_names_what_was_left_out(tmp_path, report):
    videos = [f"val_{s:08d}.mp4" for s in range(0, 60, 10)]
    run = write_run(tmp_path / "run", metrics=CURVE, videos=videos)
    size = (run / "media" / videos[-1]).stat().st_size * 4 / 3
    page = report(run, "--max-mb", 2.5 * size / 1e6)
    assert len(page.all("video")) == 2
    assert "step 50: original" in page.text
    assert "val_00000000.mp4" in page.text
    assert "4 of 6 val videos are shown; all are in media/." in page.text
    full = report(run)
    assert len(full.all("video")) == 4
    assert "Left out" not in full.text


def test_a_damaged_preview_is_named_and_the_others_are_shown(tmp_path, report):
    run = write_run(tmp_path / "run", videos=["val_00000000.mp4", "val_00000010.mp4"])
    (run / "media" / "val_00000010.mp4").write_bytes(b"not a video")
    page = report(run)
    assert len(page.all("video")) == 1
    assert "val_00000010.mp4 cannot be read" in page.text


def test_samples_are_shown_class_by_class(tmp_path, report):
    run = write_run(tmp_path / "run")
    write_samples(run / "samples", count=6, classes=("cat", "dog", "emu"))
    captions = [a["alt"].split(",")[0] for a in report(run).all("img")]
    assert captions == ["cat", "cat", "dog", "dog", "emu", "emu"]
    assert chosen(2048, 101) == list(range(101))
    assert len(chosen(2048, 0)) == 16
    assert all(i % 5 == c for c in range(5) for i in chosen(99, 5)[c * 4 : c * 4 + 4])


def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path, report):
    run = write_run(tmp_path / "run")
    samples = write_samples(run / "samples", count=2)
    content = json.loads((samples / "manifest.json").read_text())
    write_samples(tmp_path / "secret", count=1)
    content["files"][0] = "../../secret/000000.mkv"
    (samples / "000000.mkv").unlink()
    (samples / "manifest.json").write_text(json.dumps(content))
    page = report(run)
    assert len(page.all("img")) == 1
    assert "000000.mkv cannot be read" in page.text


def test_a_smaller_picture_is_the_mean_of_its_blocks(tmp_path):
    video = noise(2, 256, 384)
    small = thinned(video)
    assert small.shape == (2, 85, 128, 3)
    assert np.array_equal(small[1, 3, 5], video[1, 9:12, 15:18].mean(axis=(0, 1)).round())
    assert np.array_equal(thinned(video[:, :64, :128]), video[:, :64, :128])


def test_several_runs_are_compared_by_what_differs(tmp_path):
    a = write_run(tmp_path / "a", metrics=CURVE, settings={"learning_rate": 0.1, "same": 1})
    b = write_run(tmp_path / "b", metrics=CURVE[:50], settings={"learning_rate": 0.2, "same": 1})
    main([str(a), str(b), "--out", str(tmp_path / "sub" / "both.html")])
    page = Page(tmp_path / "sub" / "both.html")
    assert "learning_rate 0.1 0.2" in page.text
    assert "same" not in page.text
    drawn = svg(page.all("img")[0]["src"])
    assert ">a EMA<" not in drawn  # there is one kind of weights in these logs
    assert ">a<" in drawn
    assert ">b<" in drawn
    assert all((tmp_path / "sub" / link["href"]).exists() for link in page.all("a"))
    with pytest.raises(ValueError, match="2 runs: say with --out FILE"):
        main([str(a), str(b)])


def test_runs_stand_side_by_side_step_by_step_in_colours_of_their_own(tmp_path):
    scores = {"val/psnr": 20, "val/psnr_raw": 21, "val/loss": 0.4, "val/loss_raw": 0.3}
    logs = [{"step": s, "loss": 2.0, **scores} for s in (40, 50)]
    logs[1] |= {"gan/logits_real": 1, "gan/logits_fake": 0}
    videos = {"a": (0, 10, 20), "b": (0, 20, 30)}
    runs = []
    for name, steps in videos.items():
        names = [f"val_{s:08d}.mp4" for s in steps]
        runs.append(write_run(tmp_path / name, metrics=logs, settings={"note": name}, videos=names))
    main([*map(str, runs), "--out", str(tmp_path / "both.html")])
    page = Page(tmp_path / "both.html")
    order = [
        page.text.index(word)
        for word in ("Overview", "note a b", "Curves", "Videos: val", "Where it comes from")
    ]
    assert order == sorted(order)
    labels = [v["aria-label"] for v in page.all("video")]
    assert [label.split(" (")[0] for label in labels] == [
        "step 20: a",
        "step 20: b",
        "step 0: a",
        "step 0: b",
    ]
    charts = {
        c["title"].split(":")[0]: c
        for c in (json.loads(f["data-chart"]) for f in page.all("figure") if "data-chart" in f)
    }
    assert {s["name"]: (s["color"], s["dash"]) for s in charts["val/psnr"]["series"]} == {
        "a EMA": (COLORS[0], ""),
        "a raw": (COLORS[0], "7 4"),
        "b EMA": (COLORS[1], ""),
        "b raw": (COLORS[1], "7 4"),
    }
    assert {s["color"] for s in charts["gan/logits"]["series"] if s["name"].startswith("b")} == {COLORS[1]}
    assert [s["x"] for s in charts["loss"]["series"]] == [[40.0, 50.0]] * 2
    drawn = svg(page.all("img")[0]["src"])
    assert re.search(r">0</text>|<text[^>]*>0<", drawn)  # the axis begins there, not at step 40
    shades = [tag["style"] for tag in page.all("i") if "background" in tag.get("style", "")]
    assert shades[:2] == [f"background:{COLORS[0]}", f"background:{COLORS[1]}"]


def test_tiles_of_a_training_s_grid_have_their_class_names_and_real_clips_beside_them(tmp_path, report):
    videos = ["real.mp4", "samples_00000010.mp4"]
    run = write_run(tmp_path / "run", videos=videos, settings={"samples": {"num_videos": 5}})
    checkpoint = run / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 10, "class_names": ["cat", "dog"]}))
    words = [v["aria-label"].split(" (")[0] for v in report(run).all("video")]
    tiles = "row by row: cat, dog, cat | dog, cat"
    assert words == [f"real clips; {tiles}", f"step 10: generated; {tiles}"]
    (run / "media" / "real.json").write_text(
        json.dumps({"names": ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]})
    )
    words = next(v["aria-label"] for v in report(run).all("video"))
    assert words.startswith(
        "real clips; row by row: cat (a.mp4), dog (b.mp4), cat (c.mp4) | dog (d.mp4), cat (e.mp4)"
    )
    other = write_run(tmp_path / "other", videos=["samples_00000010.mp4"])
    main([str(run), str(other), "--out", str(tmp_path / "both.html")])
    page = Page(tmp_path / "both.html")
    assert [v["aria-label"].split(" (")[0] for v in page.all("video")] == [
        "real: run",
        "step 10: run",
        "step 10: other",
    ]


def test_what_is_no_run_and_what_is_no_page_of_ours_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no run there"):
        main([str(tmp_path)])
    mine = tmp_path / "notes.html"
    mine.write_text("<p>my own notes")
    with pytest.raises(ValueError, match="is not a report of this program"):
        main([str(run), "--out", str(mine)])
    assert mine.read_text() == "<p>my own notes"
    with pytest.raises(ValueError, match="a folder; give the name of a file"):
        main([str(run), "--out", str(tmp_path)])
    main([str(run)])
    main([str(run)])  # its own page may be written again
    assert MARK in (run / "report.html").read_text()


def test_scores_are_shown_with_their_protocol(tmp_path, report):
    run = write_run(tmp_path / "run")
    record = {
        "metric": "random-feature FVD (I3D, seed 0)",
        "value": 12.5,
        "protocol": {"name": "omnilatte", "num_videos": 64},
    }
    (tmp_path / "scores.jsonl").write_text(json.dumps(record) + "\n")
    page = report(run, "--records", tmp_path / "scores.jsonl")
    assert "random-feature FVD (I3D, seed 0) 12.5000 omnilatte 64" in page.text
    assert "../scores.jsonl" in [a["href"] for a in page.all("a")]


def test_a_link_is_a_link_and_a_curve_wears_the_colours_of_the_page(tmp_path):
    figure = curve_figure({"a": ([1, 2], [1.0, 100.0]), "none": ((), ())}, "c", log_y=True)
    section = Section("s", header=("k", "v"), rows=[("x", Link("<file>", "a%20b"))], figures=[figure])
    page = Page(write_page(tmp_path / "p.html", "t", "", [section]))
    assert page.all("a") == [{"href": "a%20b"}]
    assert "<file>" in page.text
    drawn = svg(figure.source)
    assert "currentColor" in drawn
    assert "prefers-color-scheme:dark" in drawn
    assert ">none<" not in drawn


@pytest.mark.parametrize("points", [6, 1000])
def test_curves_that_are_printed_in_grey_differ_by_their_markers(points):
    steps = list(range(points))
    figure = curve_figure({name: (steps, [float(k)] * points) for k, name in enumerate("abcdefgh")}, "c")
    outlines = re.findall(r'<path id="m\w+" d="([^"]+)" style="stroke: #', svg(figure.source))
    assert len(set(outlines)) == 8
