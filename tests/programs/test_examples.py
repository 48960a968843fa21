"""The examples, as a user calls them, with tiny weights."""

import runpy
from pathlib import Path

import pytest
import torch

from data.video import probe
from tests.programs.runs import write_samples
from vae import ODVAE

ROOT = Path(__file__).parents[2]


def test_the_example_encodes_decodes_and_generates(trained_vae, tmp_path, monkeypatch, capsys):
    from denoiser import Latte
    from pipelines.video_pipeline import LatentVideoPipeline

    vae = ODVAE.from_pretrained(trained_vae)
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    torch.manual_seed(0)
    latte = Latte(depth=2, hidden_size=16, num_heads=2, patch_size=1, num_frames=3, sample_size=2)
    LatentVideoPipeline(vae=vae, transformer=latte).save_pretrained(tmp_path / "pipeline")
    video = write_samples(tmp_path / "videos", count=1, frames=9) / "000000.mkv"
    words = [tmp_path / "pipeline", video, tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["example", *map(str, words)])
    runpy.run_module("examples.encode_decode_generate", run_name="__main__")
    line = "(1, 3, 9, 16, 16) -> (1, 4, 3, 2, 2) -> (1, 3, 9, 16, 16); generated (1, 3, 9, 16, 16)"
    assert line in capsys.readouterr().out
    for name in ("decoded.mp4", "generated.mp4"):
        info = probe(tmp_path / "out" / name)
        assert (info.num_frames, info.width, info.height) == (9, 16, 16)


def test_the_example_before_the_demo_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["example", str(tmp_path / "pipeline"), "x.mkv", "out"])
    with pytest.raises(SystemExit, match="pipeline is not there; run bash scripts/demo.sh first"):
        runpy.run_module("examples.encode_decode_generate", run_name="__main__")


def test_the_example_stays_short():
    lines = (ROOT / "examples" / "encode_decode_generate.py").read_text().splitlines()
    assert len(lines) <= 35
