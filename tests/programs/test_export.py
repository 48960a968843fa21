"""A trained model as a folder to share, and its way to a (false) hub."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipelines.export import main
from pipelines.results.card import public
from pipelines.training.open import weights_digest
from pipelines.video_pipeline import LatentVideoPipeline
from tests.programs.runs import write_samples
from vae import ODVAE

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(trained_vae):
    return trained_vae.parent


@pytest.fixture
def pipeline(trained_vae, tmp_path):
    """A pipeline of tiny random networks with three classes."""
    from denoiser import Latte

    vae = ODVAE.from_pretrained(trained_vae)
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    latte = Latte(
        depth=2, hidden_size=16, num_heads=2, patch_size=1, num_frames=3, sample_size=2, num_classes=3
    )
    pipe = LatentVideoPipeline(vae=vae, transformer=latte, class_names=["a", "b|", "<c>"])
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def summary(trained_vae, tmp_path):
    """What pipelines.reconstruct writes about the run's VAE."""
    settings = {
        "clip": {"num_frames": 25, "size": 256},
        "source": {"name": "webvid", "root": "/home/me/videos"},
    }
    scores = {"psnr": 31.25, "ssim": 0.875, "videos": 64}
    digest = weights_digest(ODVAE.from_pretrained(trained_vae))
    (tmp_path / "summary.json").write_text(
        json.dumps(scores | {"weights_sha256": digest, "settings": settings})
    )
    return tmp_path / "summary.json"


def card(folder):
    text = (folder / "README.md").read_text()
    head, body = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    return yaml.safe_load(head), body


def export(*arguments):
    assert main([*map(str, arguments)]) == 0


def test_the_exported_vae_is_the_run_s_and_the_card_has_its_numbers(run, summary, tmp_path, caplog):
    out = tmp_path / "share"
    caplog.set_level("INFO")
    export(run, "--out", out, "--records", summary, "--license", "mit")
    words = f"{run} --out {out} --records {summary} --license mit --push NAME/REPO"
    assert f"python -m pipelines.export {words}" in caplog.messages[-1]
    kept, made = (load_file(f / WEIGHTS) for f in (run / "vae", out))
    assert kept.keys() == made.keys()
    assert all(torch.equal(kept[k], made[k]) for k in kept)
    head, body = card(out)
    (index,) = head.pop("model-index")  # the Hub's own form of the numbers
    values = {
        m["type"]: m["value"]
        for r in index["results"]
        for m in r["metrics"]
        if r["dataset"]["name"] == "webvid"
    }
    assert (index["name"], values) == ("share", {"psnr": 31.25, "ssim": 0.875})
    assert head == {
        "license": "mit",
        "library_name": "diffusers",
        "tags": ["omnilatte", "video", "video-vae"],
        "metrics": ["psnr", "ssim"],
    }
    how = "webvid, 64 videos, 25 frames of 256 pixels, on uint8 in memory | [summary.json](records/summary.json)"
    assert f"| PSNR | 31.2500 | {how} |" in body
    assert "| LPIPS | not measured |  |  |" in body
    assert "step 4 of 4, global batch 4" in body
    assert "2 held-out clips, EMA weights | log of the run |" in body
    assert (out / "samples" / "val_00000004.mp4").is_file()
    assert not list(out.rglob("*.bin"))


def test_an_exported_pipeline_generates_what_the_original_does(pipeline, tmp_path):
    export(
        pipeline, "--out", tmp_path / "share", "--samples", write_samples_of(pipeline, tmp_path / "samples")
    )
    a, b = (
        LatentVideoPipeline.from_pretrained(f)(["b|"], 2, seeds=[3], output_type="video").frames
        for f in (pipeline, tmp_path / "share")
    )
    assert torch.equal(a, b)
    _, body = card(tmp_path / "share")
    assert "3 classes: a, b\\|, &lt;c>" in body
    assert all(f"| {m} | not measured |  |  |" in body for m in ("FVD", "KVD", "IS"))
    assert "Not known: this folder was exported without its run." in body
    shown = sorted(p.name for p in (tmp_path / "share" / "samples").iterdir())
    assert len(shown) == 8
    assert shown[:3] == ["000000-cat.mp4", "000001-dog.mp4", "000002-cat.mp4"]
    assert all(f"(samples/{name})" in body for name in shown)


def write_samples_of(pipeline, folder):
    write_samples(folder, count=9)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    digest = weights_digest(LatentVideoPipeline.from_pretrained(pipeline).transformer)
    content["settings"]["weights_sha256"] = digest
    manifest.write_text(json.dumps(content))
    return folder


def test_numbers_and_videos_of_other_weights_are_refused(run, pipeline, summary, tmp_path):
    content = json.loads(summary.read_text())
    summary.write_text(json.dumps(content | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="measured with another VAE"):
        main([str(run), "--out", str(tmp_path / "share"), "--records", str(summary)])
    samples = write_samples(tmp_path / "samples", count=2)
    with pytest.raises(ValueError, match="made with other weights"):
        main([str(pipeline), "--out", str(tmp_path / "share"), "--samples", str(samples)])
    assert not (tmp_path / "share").exists()


def test_a_random_feature_score_does_not_fill_the_place_of_fvd(pipeline, tmp_path):
    record = {
        "metric": "random-feature FVD (I3D, seed 0)",
        "value": 3.0,
        "protocol": {"name": "omnilatte", "num_videos": 64},
    }
    (tmp_path / "scores.jsonl").write_text(
        json.dumps(record | {"real": {"storage": "x", "path": "/home/me/ucf"}}) + "\n"
    )
    export(pipeline, "--out", tmp_path / "share", "--records", tmp_path / "scores.jsonl")
    head, body = card(tmp_path / "share")
    assert head["metrics"] == []
    assert "model-index" not in head
    assert "| random-feature FVD (I3D, seed 0) | 3.0000 |" in body
    assert "| FVD | not measured |  |  |" in body


def test_no_folder_of_this_machine_is_published(run, pipeline, summary, tmp_path):
    export(run, "--out", tmp_path / "vae", "--records", summary)
    export(pipeline, "--out", tmp_path / "pipe")
    texts = [
        p
        for f in ("vae", "pipe")
        for p in (tmp_path / f).rglob("*")
        if p.suffix in {".json", ".md", ".jsonl"}
    ]
    assert len(texts) >= 7
    assert not [p for p in texts if str(tmp_path.parent) in p.read_text() or "/home/me" in p.read_text()]
    assert public({"a": ["/home/me/x y", "out=/home/me/x", "https://a.org/b/c", "1/2", 3]}) == {
        "a": ["x y", "out=x", "https://a.org/b/c", "1/2", 3]
    }


def test_what_others_put_into_the_folder_is_never_replaced(run, tmp_path):
    out = tmp_path / "share"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not made by this program"):
        export(run, "--out", out)
    (out / "notes.txt").unlink()
    export(run, "--out", out)
    export(run, "--out", out)  # its own folder may be made again
    card_before = (out / "README.md").read_text()
    (out / "README.md").write_text(card_before + "my words")
    with pytest.raises(ValueError, match="README.md was added or edited and would be lost"):
        export(run, "--out", out)
    assert (out / "README.md").read_text().endswith("my words")
    (out / "README.md").write_text(card_before)
    (out / "extra.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="extra.bin was added"):
        export(run, "--out", out)


def test_an_input_inside_the_output_and_the_reverse_are_refused(run, summary, tmp_path):
    export(run, "--out", tmp_path / "share")
    for model, out in ((run, run), (run, run / "vae"), (run, summary.parent), (tmp_path / "share",) * 2):
        with pytest.raises(ValueError, match="lies in it and would be replaced"):
            export(model, "--out", out, "--records", summary)
    with pytest.raises(ValueError, match="inside the model's own folder"):
        export(run, "--out", run / "vae" / "share")
    assert (run / "vae" / WEIGHTS).is_file()
    assert (tmp_path / "share" / WEIGHTS).is_file()


def test_a_failure_in_the_middle_leaves_the_folder_as_it_was(run, tmp_path, monkeypatch):
    out = tmp_path / "share"
    export(run, "--out", out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.results.shared.write_videos", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, "--out", out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["share"]


def test_a_run_without_weights_and_a_folder_without_anything_name_the_way_out(run, tmp_path):
    (tmp_path / "early").mkdir()
    for name in ("config.yaml", "env.json"):
        (tmp_path / "early" / name).write_text((run / name).read_text())
    with pytest.raises(ValueError, match=r"exported nothing yet.*checkpoints/step_00000100/vae_ema"):
        export(tmp_path / "early", "--out", tmp_path / "share")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a run nor a folder of weights"):
        export(tmp_path / "empty", "--out", tmp_path / "share")
    export(run / "checkpoints" / "step_00000004" / "vae_ema", "--out", tmp_path / "share")
