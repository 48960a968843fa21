"""Pages in a real browser. Debian and Ubuntu: apt-get install chromium; elsewhere any Chromium or Chrome on the PATH."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from pipelines.run_report import main
from tests.programs.runs import write_run, write_samples

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="not run: no Chromium (apt-get install chromium)")
# Added to a copy of the page: what the browser has decoded, and what it could not.
COUNT = """<script>
addEventListener("load", async () => {
  const videos = [...document.querySelectorAll("video")], pictures = [...document.querySelectorAll("img")];
  const ready = v => v.readyState >= 2 || v.error || new Promise(r => { v.onloadeddata = v.onerror = r; });
  await Promise.all(videos.map(ready));
  const wide = document.documentElement.scrollWidth > innerWidth;
  const charts = document.querySelectorAll(".chart svg path.curve").length;
  const found = {charts, pictures: pictures.filter(p => p.naturalWidth > 0).length, wide,
    videos: videos.filter(v => v.videoWidth > 0 && !v.error).length, all: pictures.length + videos.length};
  document.body.dataset.found = JSON.stringify(found);
});
</script>"""


def browse(page, folder, *more):
    """(standard output, console lines) of one headless visit."""
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def page(tmp_path):
    """A run's page with videos, samples and curves."""
    curve = [{"step": s, "loss": 1 / (s + 1), "val/psnr": 20 + s / 10} for s in range(100)]
    videos = ["val_00000000.mp4", "val_00000050.mp4", "val_00000100.mp4"]
    run = write_run(tmp_path / "run", metrics=curve, videos=videos)
    write_samples(run / "samples")
    main([str(run)])
    return run / "report.html"


def look(page, folder, *more):
    copy = page.with_name("counted.html")
    copy.write_text(page.read_text().replace("</body>", COUNT + "</body>"))
    dom, console = browse(copy, folder, "--dump-dom", *more)
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found, dom[-500:]
    return json.loads(found[1].replace("&quot;", '"')), console


def test_a_browser_decodes_every_picture_and_video_without_a_complaint(page, tmp_path):
    found, console = look(page, tmp_path)
    assert found == {"charts": 2, "pictures": 8, "videos": 3, "all": 11, "wide": False}
    assert not console


def test_the_page_fits_a_narrow_screen(page, tmp_path):
    found, _ = look(page, tmp_path, "--window-size=500,900")
    assert not found["wide"]


def test_this_test_sees_a_broken_picture_and_a_console_error(page, tmp_path):
    broken = '<img src="data:image/png;base64,AAAA"><script>console.error("oh")</script>'
    page.write_text(page.read_text().replace("<h1>", broken + "<h1>"))
    found, console = look(page, tmp_path)
    assert found["pictures"] == found["all"] - found["videos"] - 1
    assert any("oh" in line for line in console)


def brightness(page, folder, scheme):
    """Mean grey value, 0 to 255, of the corner of a screenshot; scheme: 0 dark, 1 light."""
    picture = folder / f"{scheme}.png"
    browse(
        page,
        folder,
        f"--screenshot={picture}",
        "--window-size=1000,3000",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    pixels = np.asarray(Image.open(picture).convert("L"), dtype=float)
    assert pixels.std() > 10  # not an empty page
    return pixels[:20, :20].mean()


def test_the_page_follows_the_reader_s_light_or_dark_screen(page, tmp_path):
    assert brightness(page, tmp_path, 1) > 240
    assert brightness(page, tmp_path, 0) < 40


ACT = """<script>
addEventListener("load", async () => {
  const wait = () => new Promise(done => setTimeout(done, 300));
  await wait();
  const chart = document.querySelectorAll("figure[data-chart]")[1], box = chart.querySelector(".chart");
  const curve = () => box.querySelector("path.curve").getAttribute("d"), found = {};
  const hover = x => { const at = box.querySelector("svg").getBoundingClientRect();
    box.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", {clientX: at.left + x})); };
  hover(56); found.first = box.querySelector(".tip").innerText;
  hover(box.clientWidth - 12); found.last = box.querySelector(".tip").innerText;
  const plain = curve();
  chart.querySelector("input[type=checkbox]").click(); found.logged = curve() !== plain; const logged = curve();
  const slider = document.querySelector("input[type=range]");
  slider.value = 0.9; slider.dispatchEvent(new Event("input")); found.smoothed = curve() !== logged;
  hover(box.clientWidth - 12); found.smooth = box.querySelector(".tip").innerText;
  chart.querySelector(".legend button").click(); found.curves = box.querySelectorAll("path.curve").length;
  const videos = [...document.querySelectorAll("video")], button = document.querySelector("button.play");
  button.click(); found.paused = videos.every(v => v.paused); found.words = button.textContent;
  button.click(); await wait(); found.playing = videos.every(v => !v.paused);
  document.body.dataset.found = JSON.stringify(found);
});
</script>"""


def test_curves_answer_to_the_pointer_and_one_button_plays_a_section(page, tmp_path):
    copy = page.with_name("acted.html")
    copy.write_text(page.read_text().replace("</body>", ACT + "</body>"))
    dom, console = browse(copy, tmp_path, "--dump-dom", "--window-size=1280,900")
    found = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert not console
    assert found["first"].split() == ["step", "0", "loss", "1"]
    assert found["last"].split() == ["step", "99", "loss", "0.01"]
    assert float(found["smooth"].split()[-1]) > 0.01
    assert {k: found[k] for k in ("logged", "smoothed", "curves", "paused", "words", "playing")} == {
        "logged": True,
        "smoothed": True,
        "curves": 0,
        "paused": True,
        "words": "play all",
        "playing": True,
    }


def test_without_scripts_the_page_shows_its_curves_as_pictures(page, tmp_path):
    page.write_text(re.sub("<script>.*?</script>", "", page.read_text(), flags=re.DOTALL))
    found, _ = look(page, tmp_path)
    assert found == {"charts": 0, "pictures": 2 + 8, "videos": 3, "all": 13, "wide": False}


@pytest.mark.parametrize("width", [1280, 500])
def test_a_comparison_with_scores_fits_the_screen(page, tmp_path, width):
    record = {
        "metric": "FVD",
        "value": 1234.5,
        "tag": "ucf101/OD-VAE",
        "interval": {"low": 1111.1, "high": 2222.2},
    }
    record |= {
        "protocol": {"name": "tats/fvd2048_16f", "num_videos": 2048},
        "device": "NVIDIA H200",
        "git": "0" * 40,
    }
    record |= {"time": "2026-11-27T10:00:00Z", "storage": {"real": ["h264"], "fake": ["ffv1"]}}
    record |= {"weights": {"file": "i3d_torchscript.pt", "sha256": "a" * 64, "known": True, "seed": None}}
    (tmp_path / "scores.jsonl").write_text(json.dumps(record))
    other = write_run(tmp_path / "other", metrics=[{"step": 1, "loss": 1}], settings={"learning_rate": 1})
    out = tmp_path / "compare.html"
    main([str(page.parent), str(other), "--out", str(out), "--records", str(tmp_path / "scores.jsonl")])
    wide = "<script>addEventListener('load', () => { document.body.dataset.over = [...document.querySelectorAll('.wide')].filter(w => w.scrollWidth > w.clientWidth).length; });</script>"
    out.write_text(out.read_text().replace("</body>", wide + "</body>"))
    found, console = look(out, tmp_path, f"--window-size={width},900")
    assert not found["wide"]
    assert not console
    if width == 1280:
        dom, _ = browse(out, tmp_path, "--dump-dom", "--window-size=1280,900")
        assert 'data-over="0"' in dom
