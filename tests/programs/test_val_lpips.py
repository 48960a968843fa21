"""LPIPS in the validations of stage one, by the judge's network with random weights from a file."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.clip import to_float, to_uint8
from data.video import read_frames
from eval.fidelity import load_lpips, lpips_distance
from pipelines.train_vae import main
from vae import load_vae


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder with a file of AlexNet's layers, random ones, where programs look for it."""
    state = load_lpips("random:0")[0].net.state_dict()
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(
        {f"features.{k.split('.', 1)[1]}": v for k, v in state.items()},
        folder / "alexnet-owt-7be5be79.safetensors",
    )
    monkeypatch.setenv("OMNILATTE_WEIGHTS", str(folder))
    return folder


@pytest.fixture
def train(vae_settings, tmp_path):
    def go(name, *more):
        places = [f"run_dir={tmp_path / name}", f"source.index_dir={tmp_path / 'index'}"]
        main([*vae_settings, *places, "clip.num_frames=5", "clip.size=32", "steps=2", *more])
        return tmp_path / name

    return go


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_validation_has_the_judges_lpips_and_the_training_stays_the_same_to_the_bit(weights, train):
    judged, plain = train("judged", "val_lpips=true"), train("plain")
    assert [r["step"] for r in records(judged) if "val/lpips" in r] == [0, 2]
    assert not [r for r in records(plain) if "val/lpips" in r]
    name = "checkpoints/step_00000002/vae/diffusion_pytorch_model.safetensors"
    a, b = load_file(judged / name), load_file(plain / name)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_logged_lpips_is_that_of_the_exported_vae_on_the_held_out_clips(weights, train, tmp_path):
    from data.clip import ClipSpec
    from pipelines.training.open import open_clips
    from pipelines.training.settings import SourceConfig

    run = train("run", "val_lpips=true")
    spec = ClipSpec(num_frames=5, size=32, position="center")
    source = SourceConfig(name="demo", demo_videos=8, index_dir=str(tmp_path / "index"))
    clips, vae, network = open_clips(source, spec, 0, held_out=True), load_vae(run / "vae"), load_lpips()[0]
    values = []
    with torch.no_grad():
        for n in (0, len(clips) // 2):  # spread over all held-out clips
            x = to_float(clips[n]["video"])[None]
            decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample
            values.append(lpips_distance(to_uint8(x)[0], to_uint8(decoded)[0], network))
    assert records(run)[-1]["val/lpips"] == pytest.approx(np.mean(values), rel=1e-5)
    assert read_frames(run / "media" / "val_00000002.mp4", [0]).shape[0] == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clip.size=24", "24x24: LPIPS's AlexNet needs at least 31 x 31"),
        ("source.val_fraction=0", "val_lpips=true: source.val_fraction=0 holds no clips out"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_written(
    setting, message, weights, train, tmp_path
):
    with pytest.raises(ValueError, match=message):
        train("run", "val_lpips=true", setting)
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_missing_weights_are_named_before_anything_is_written(train, tmp_path):
    with pytest.raises(ValueError, match=r"LPIPS weights are missing .*val_lpips=false"):
        train("run", "val_lpips=true")
    assert list(tmp_path.iterdir()) == []


def network_file(folder, net, seed=0):
    """Random layers of a trunk under the name that is looked for: readable, and not the published ones."""
    trunk = load_lpips(f"random:{seed}", net=net)[0].net.state_dict()
    folder.mkdir(exist_ok=True)
    file = folder / {"alex": "lpips_alexnet.safetensors", "vgg": "lpips_vgg16.safetensors"}[net]
    save_file({f"features.{k.split('.', 1)[1]}": v for k, v in trunk.items()}, file)
    return file


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_stage_one_trains_with_either_network_and_env_json_says_which_weights_it_had(
    net, train, tmp_path, monkeypatch, caplog
):
    file = network_file(tmp_path / "nets", net)
    settings = ["loss.perceptual_weight=1", f"loss.perceptual_net={net}", "loss.gan_weight=0"]
    by_folder = train("folder", *settings, f"loss.perceptual_weights={file.parent}")
    assert f"{file.name}: tensors differ from the trunk" in caplog.text
    monkeypatch.setenv("OMNILATTE_WEIGHTS", str(file.parent))
    found = train("found", *settings)
    used = json.loads((found / "env.json").read_text())["starts"][0]["weights"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert used == {
        "loss": {
            "network": "LPIPS",
            "file": file.name,
            "sha256": digest,
            "known": False,
            "seed": None,
            "tensors": used["loss"]["tensors"],
        }
    }
    losses = [[r["loss/lpips"] for r in records(run) if "loss/lpips" in r] for run in (by_folder, found)]
    assert losses[0] == losses[1]
    assert min(losses[0]) > 0
    assert not [r for r in records(train("off")) if "loss/lpips" in r]


def test_a_missing_network_is_said_before_videos_are_scanned_and_by_the_dry_run(train, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"vgg16-397923af.pth .*loss.perceptual_weight=0\) leaves LPIPS out"):
        train("run", "loss.perceptual_weight=1")
    assert list(tmp_path.iterdir()) == []
    train("run", "loss.perceptual_weight=1", "val_lpips=true", "--dry-run")
    plan = capsys.readouterr().out
    assert "LPIPS of the loss (vgg): MISSING: LPIPS weights are missing" in plan
    assert "LPIPS of the validations (alex): MISSING: " in plan
    file = network_file(tmp_path / "nets", "alex")
    given = ["loss.perceptual_weight=1", "loss.perceptual_net=alex", f"loss.perceptual_weights={file}"]
    train("run", *given, "--dry-run")
    assert f"LPIPS of the loss (alex): {file}" in capsys.readouterr().out


def test_a_loss_of_random_features_is_refused(train):
    with pytest.raises(ValueError, match="a loss of random features teaches nothing"):
        train("run", "loss.perceptual_weight=1", "loss.perceptual_weights=random:0")
    with pytest.raises(ValueError, match="24x24: LPIPS's AlexNet needs at least 31 x 31"):
        train("run", "loss.perceptual_weight=1", "loss.perceptual_net=alex", "clip.size=24")
