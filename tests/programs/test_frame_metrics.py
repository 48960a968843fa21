"""A frame metric is added in one place: a row of eval.fidelity.METRICS."""

import json

import numpy as np
import pytest
import torch

from data.encode import write_ffv1
from eval import fidelity
from pipelines import reconstruct
from pipelines.results.records import Command, find
from pipelines.scores import read_records
from pipelines.train_vae import _scores_text, evaluate
from vae import ODVAE


def mean_error(real: np.ndarray, fake: np.ndarray) -> float:
    return float(np.abs(real.astype(np.float64) - fake).mean())


@pytest.fixture
def added(monkeypatch):
    """One more metric, in the table and nowhere else."""
    metric = fidelity.FrameMetric("MAE", mean_error, 1, "levels")
    monkeypatch.setattr(fidelity, "METRICS", (*fidelity.METRICS, metric))
    return metric


@pytest.fixture
def videos(tmp_path):
    rng = np.random.default_rng(0)
    kept = {}
    for side in ("real", "fake"):
        (tmp_path / side).mkdir()
        kept[side] = rng.integers(0, 255, (9, 32, 32, 3)).astype(np.uint8)
        write_ffv1(tmp_path / side / "0.mkv", kept[side], 8)
    return tmp_path, kept


def test_the_judge_measures_an_added_metric(added, videos, capsys):
    folder, kept = videos
    out = folder / "scores.jsonl"
    sides = ["--real", str(folder / "real"), "--fake", str(folder / "fake")]
    fidelity.main([*sides, "--no-lpips", "--device", "cpu", "--out", str(out)])
    found = {record["metric"]: record["value"] for record in read_records([out])}
    assert list(found) == ["PSNR", "SSIM", "MAE"]
    assert found["MAE"] == pytest.approx(mean_error(kept["real"], kept["fake"]))
    assert f"MAE {found['MAE']:.4f} levels" in capsys.readouterr().out


def test_reconstruct_and_its_readers_take_it(added, videos, trained_vae, capsys):
    folder, _ = videos
    out = folder / "out"
    words = [
        f"vae.path={trained_vae}",
        f"source.root={folder / 'real'}",
        f"source.index_dir={folder / 'index'}",
        f"out={out}",
        "lpips=false",
        "clip.num_frames=9",
        "clip.size=32",
        "pictures=0",
    ]
    assert reconstruct.main(words) == 0
    value = json.loads((out / "summary.json").read_text())["mae"]
    assert value > 0
    head, line = capsys.readouterr().out.splitlines()[:2]
    assert (head.split()[-1], line.split()[-1]) == ("MAE", f"{value:.1f}")
    # The judges' records, and a cell of a table
    assert [r["metric"] for r in read_records([out / "summary.json"])] == ["PSNR", "SSIM", "MAE"]
    assert find(Command("reconstruct", "pipelines.reconstruct", tuple(words), out)).values["mae"] == value


def test_stage_one_validates_with_it(added):
    vae = ODVAE(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)
    clips = [{"video": torch.zeros(5, 16, 16, 3, dtype=torch.uint8)}]
    scores, _ = evaluate(vae, clips, 1, torch.device("cpu"))
    assert list(scores) == ["val/psnr", "val/ssim", "val/mae"]
    assert _scores_text(scores).endswith(f"MAE {scores['val/mae']:.1f} levels")
