"""One sitting of somebody with videos and a csv: look, train, read the log, fine-tune, compare, cache, train again, sample."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data.demo import DemoVideos
from data.encode import write_mp4
from pipelines import cache_latents, run_report, sample, scan, train_latte, train_vae
from tests.programs.test_report import Page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def listing(tmp_path):
    """Eight videos of two classes, one of them held out; and one that is not there."""
    demo = DemoVideos(8, num_classes=2, size=32, num_frames=20)
    rows = ["path,label,split"]
    for n in range(8):
        write_mp4(tmp_path / "videos" / f"{n}.mp4", demo.frames(n, range(20)), 8)
        rows.append(f"videos/{n}.mp4,{demo.class_names[n % 2]},{'val' if n == 7 else 'train'}")
    (tmp_path / "mine.csv").write_text("\n".join([*rows, "videos/gone.mp4,left,train"]))
    return tmp_path / "mine.csv"


def in_a_job(program, words, folder):
    """stderr of a program without a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"pipelines.{program}", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_a_csv_becomes_a_vae_a_finer_one_a_page_and_a_conditional_model(
    listing, tmp_path, vae_settings, latte_settings, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    # Look through the list.
    assert scan.main([str(listing), "source.index_dir=index", "sheet=sheet.png"]) == 0
    text = capsys.readouterr().out
    assert "8 videos, 0 damaged, 1 of the list not on disk" in text
    assert "2 classes  left: 4, right: 4" in text

    # Train; the log of a job says how far it is, where things are, and what comes next.
    own = ["source.name=csv", f"source.list_file={listing}", "source.index_dir=index"]
    tiny = [word for word in vae_settings if not word.startswith("source.")]
    log = in_a_job("train_vae", [*tiny, *own, "run_dir=first", "steps=4", "save_every=4"], tmp_path)
    assert "csv: 7 videos, 1 held_out, 0 damaged, 0 short" in log
    steps = re.findall(r"^\d{4}-\d\d-\d\d [0-9:]{8} \S+: step (\d)/4, (.*)$", log, re.MULTILINE)
    assert [step for step, _ in steps] == ["1", "2", "3", "4"]
    assert all("loss " in line and "lr " in line and "GiB" in line for _, line in steps[:2])
    assert re.search(r"held-out EMA PSNR .* raw PSNR ", log)
    assert log.count("\r") == 0
    following = re.search(r"next +python -m pipelines\.cache_latents (.*)", log)[1]

    # Fine-tune from it with a lower rate, and compare.
    begin = ["model.init=weights", "model.init_from=first/vae", "learning_rate=1e-4"]
    train_vae.main([*tiny, *own, "run_dir=second", "steps=2", "save_every=2", *begin])
    run_report.main(["first", "second", "--out", "compare.html"])
    page = Page(tmp_path / "compare.html")
    assert "learning_rate 0.001 0.0001" in page.text
    assert page.text.index("learning_rate") < page.text.index("Curves") < page.text.index("Videos: val")
    assert [v["aria-label"][:14] for v in page.all("video")][:2] == ["step 2: first ", "step 2: second"]

    # The printed command caches; Latte knows the classes of the csv by name.
    tiny = [word for word in latte_settings if not word.startswith(("source.", "clip."))]
    words = [*shlex.split(following), *tiny, "cache.dir=cache", "run_dir=latte", "steps=2", "save_every=2"]
    assert cache_latents.main(words) == 0
    assert train_latte.main([*words, "samples.every=2", "samples.steps=2", "samples.num_videos=4"]) == 0
    index = json.loads((tmp_path / "latte" / "pipeline" / "model_index.json").read_text())
    assert index["class_names"] == ["left", "right"]
    assert sample.main(["pipeline=latte/pipeline", "labels=[left]", "num_videos=1", "num_steps=2"]) == 0
    run_report.main(["latte"])
    shown = [v["aria-label"] for v in Page(tmp_path / "latte" / "report.html").all("video")]
    assert re.match(
        r"real clips; row by row: left \(\S+\), right \(\S+\) \| left \(\S+\), right \(\S+\) ", shown[0]
    )
    assert shown[1].startswith("step 2: generated; row by row: left, right | left, right")
