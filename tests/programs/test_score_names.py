"""A score of random weights is never called by the score's own name, whoever writes it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from data.encode import write_ffv1
from eval import fidelity, fvd
from eval.weights import Provenance, score_name
from pipelines import demo_scores, reconstruct
from pipelines.export import main as export
from pipelines.reconstruct import scores_of
from pipelines.results.card import Card, read_scores
from pipelines.results.card import render as render_card
from pipelines.results.records import Command, find
from pipelines.results.runs import read_run
from pipelines.scores import read_records, render
from vae import ODVAE

SCORE = re.compile(r"(?<!random-feature )\b(?:LPIPS|lpips|FVD|KVD|IS)\b")
RANDOM = Provenance("AlexNet", "random:0", "", False, 0).as_dict()


def unlabelled(text: str) -> list[str]:
    """Names of scores in a text that stand there without their label; settings and places of weights are none."""
    text = re.sub(r"lpips_weights|lpips\b[\"']?\s*[:=] ?(?:true|false)|val_lpips", "", text)
    return SCORE.findall(text)


@pytest.fixture
def videos(tmp_path):
    rng = np.random.default_rng(0)
    for side in ("real", "fake"):
        (tmp_path / side).mkdir()
        for n in range(2):
            write_ffv1(tmp_path / side / f"{n}.mkv", rng.integers(0, 255, (9, 32, 32, 3)).astype(np.uint8), 8)
    return tmp_path


def test_one_function_names_scores_and_real_weights_keep_the_name():
    assert score_name("LPIPS", RANDOM) == "random-feature LPIPS (AlexNet, seed 0)"
    assert score_name("LPIPS", RANDOM | {"seed": None}) == score_name("LPIPS", None) == "LPIPS"


def test_reconstruct_names_it_in_console_json_card_and_table(videos, trained_vae, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        f"vae.path={trained_vae}",
        f"source.root={videos / 'real'}",
        f"source.index_dir={tmp_path / 'index'}",
        f"out={out}",
        "lpips_weights=random:0",
        "clip.num_frames=9",
        "clip.size=32",
        "pictures=0",
    ]
    assert reconstruct.main(words) == 0
    console = capsys.readouterr().out
    assert "random-feature LPIPS (AlexNet, seed 0)" in console
    summary = json.loads((out / "summary.json").read_text())
    per_video = (out / "videos.jsonl").read_text()
    stored = json.dumps({k: v for k, v in summary.items() if k != "versions"})
    for text in (console, stored, per_video):
        assert unlabelled(text) == []
    assert summary["random-feature lpips (AlexNet, seed 0)"] > 0

    name, measured = scores_of(summary)[fidelity.METRICS[-1]]
    step = Command("reconstruct", "pipelines.reconstruct", tuple(words), out)
    found = find(step)
    assert found.state == "done", found.note
    assert found.label == "random-feature LPIPS"
    assert found.values["lpips"] == measured > 0
    records = read_records([out / "summary.json"])
    assert [r["metric"] for r in records] == ["PSNR", "SSIM", name]
    assert "reconstruct" in render(records, "md")
    (out / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="give the judges' JSONL or reconstruct's summary.json"):
        read_records([out / "other.json"])

    old = {k: v for k, v in summary.items() if not k.startswith("random-feature")} | {"lpips": 0.1276}
    for content, value in ((summary, measured), (old, 0.1276)):  # as commit 397c5c1 wrote it
        (out / "summary.json").write_text(json.dumps(content))
        share = tmp_path / f"share{value}"
        assert export([str(trained_vae), "--out", str(share), "--records", str(out / "summary.json")]) == 0
        card = (share / "README.md").read_text()
        assert f"| random-feature LPIPS (AlexNet, seed 0) | {value:.4f} |" in card
        assert "| LPIPS | not measured |  |  |" in card
        assert unlabelled(card.replace("| LPIPS | not measured", "")) == []
        assert find(step).values["lpips"] == value


def test_the_judges_name_it_in_console_records_and_all_reports(videos, tmp_path, capsys):
    sides = ["--real", str(videos / "real"), "--fake", str(videos / "fake"), "--weights", "random:0"]
    file = tmp_path / "scores.jsonl"
    fidelity.main([*sides, "--device", "cpu", "--out", str(file)])
    few = ["--num-videos", "2", "--num-frames", "9", "--workers", "0", "--no-cache", "--device", "cpu"]
    fvd.main([*sides, *few, "--out", str(file)])
    console = re.sub(r"note: .*", "", capsys.readouterr().out)  # a note on FVD is not a score
    records = read_records([file])
    names = [record["metric"] for record in records]
    reports = [render(records, form) for form in ("md", "csv", "html")]
    for text in (console, *names, *reports):
        assert unlabelled(text) == []
    for text in (console, *reports):
        for name in ("LPIPS (AlexNet", "FVD (I3D", "KVD (I3D"):
            assert f"random-feature {name}, seed 0)" in text


def test_the_demo_s_page_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNILATTE_WEIGHTS", str(tmp_path))
    rng = np.random.default_rng(0)
    clips = list(rng.integers(0, 255, (4, 9, 32, 32, 3)).astype(np.uint8))
    sets = {"real": clips, "fake": clips[:2], "untrained": clips[2:], "decoded": clips[1:3]}
    found, protocol, provenance = demo_scores.score(sets, np.arange(4))
    assert found["FVD"]["value"] == pytest.approx(0, abs=1e-6) != found["FVD"]["untrained"]
    assert found["FVD"]["floor"]["value"] == pytest.approx(found["FVD"]["untrained"])  # the same clips
    rows = demo_scores.score_rows(found, protocol, provenance)
    names = [f"random-feature {m} (I3D, seed 0)" for m in ("FVD", "KVD")]
    assert [row[0] for row in rows[0:4:2]] == names
    assert [row[0] for row in rows[1:4:2]] == [f"{name} of the VAE alone" for name in names]
    assert rows[4][1] == demo_scores.lpips_row(None, None, "")[1] == "not run"  # no random network stands in
    assert "C3D weights are missing" in rows[4][2]
    assert unlabelled(" ".join(row[0] for row in rows[:4])) == []


def test_the_card_says_which_weights_taught_a_model(trained_vae):
    run, vae = read_run(trained_vae.parent), ODVAE.from_pretrained(trained_vae)

    def card(start: dict) -> str:
        return render_card(Card("vae", vae, "x", "other", run=replace(run, starts=[start]), step=1))

    files = {"file": "lpips_vgg16.safetensors", "sha256": "ab" * 32}
    for known, text in ((True, "the published tensors"), (False, "UNKNOWN tensors")):
        found = card({"weights": {"loss": {**files, "known": known}}})
        assert f"LPIPS of the loss: `lpips_vgg16.safetensors`, {text}, sha256 `{'ab' * 32}`" in found
    assert "LPIPS of the loss" not in card({})


def test_the_demo_s_rule_tells_shapes_from_blobs():
    """FVD untrained, trained, VAE alone of three real runs: shapes that move twice, and coloured blobs."""
    from pipelines.demo_scores import FVD_WAY, reached

    assert reached(617.75, 331.47, 301.69) > 2 * FVD_WAY
    assert reached(612.35, 436.52, 311.8) > 1.4 * FVD_WAY
    assert reached(2482.29, 2243.03, 1204.9) < 0.5 * FVD_WAY


def test_a_card_takes_no_scores_of_another_denoiser(tmp_path):
    file = tmp_path / "scores.jsonl"
    for digest in ("a" * 64, "b" * 64):
        manifest = {"sha256": "0", "settings": {"weights_sha256": digest}}
        record = {
            "metric": "FVD",
            "value": 1.0,
            "protocol": {},
            "fake": {"manifest": manifest, "storage": "lossless"},
        }
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        if digest[0] == "a":
            assert [score.metric for score in read_scores([file], "vae", "a" * 64)] == ["FVD"]
    with pytest.raises(
        ValueError,
        match=r"its FVD is of videos of another denoiser .weights bbbbbbbbbbbb, exported aaaaaaaaaaaa",
    ):
        read_scores([file], "vae", "a" * 64)
