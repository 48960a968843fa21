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
  const found = {pictures: pictures.filter(p => p.naturalWidth > 0).length, wide,
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
    assert found == {"pictures": 2 + 8, "videos": 3, "all": 13, "wide": False}
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
