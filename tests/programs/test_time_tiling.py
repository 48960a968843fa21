"""Temporal tiling in stage two and sampling (paper, Table 4), clips of 9 frames in groups of 5."""

import json

import pytest
import torch
from safetensors.torch import load_file

from data.latents import LatentCache
from data.video import read_frames
from pipelines import cache_latents, sample, train_latte
from pipelines.training.open import open_vae
from pipelines.training.settings import VAEConfig
from vae import build_vae, load_vae

TILED = "vae.tiling_frames=5"


@pytest.fixture
def settings(latte_settings, own_vae, tmp_path):
    places = [f"vae.path={own_vae}", f"source.index_dir={tmp_path / 'index'}"]
    return [*latte_settings, *places, "cache.crops=1", "source.demo_videos=4", "steps=2", "save_every=2"]


@pytest.fixture
def cache(settings, tmp_path):
    def go(name, *more):
        cache_latents.main([*settings, f"cache.dir={tmp_path / name}", *more])
        return LatentCache(tmp_path / name)

    return go


@pytest.fixture
def train(settings, tmp_path):
    def go(name, *more):
        train_latte.main([*settings, f"run_dir={tmp_path / name}", *more])
        return tmp_path / name

    return go


def vae_of_checkpoint(run):
    return json.loads((run / "checkpoints/step_00000002/manifest.json").read_text())["vae"]


@torch.no_grad()
def test_a_tiled_cache_holds_the_groups_latents_and_a_word_of_it_only_when_tiled(cache, own_vae):
    plain, tiled = cache("plain"), cache("tiled", TILED)
    entries = {"name", "weights_sha256"}
    assert plain.index["fingerprint"]["vae"].keys() == entries
    assert tiled.index["fingerprint"]["vae"].keys() == entries | {"tiling_frames"}
    assert torch.equal(plain[0]["mean"][:, :2], tiled[0]["mean"][:, :2])  # the first group, a clip of its own
    assert not torch.equal(plain[0]["mean"][:, 2], tiled[0]["mean"][:, 2])


@torch.no_grad()
def test_a_tiled_vae_works_in_groups_that_share_a_frame(own_vae):
    x = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, tiled = load_vae(own_vae), open_vae(VAEConfig(path=str(own_vae), tiling_frames=5))
    groups = [plain.encode(part).latent_dist.mean for part in (x[:, :, :5], x[:, :, 4:])]
    assert torch.equal(tiled.encode(x).latent_dist.mean, torch.cat([groups[0], groups[1][:, :, 1:]], 2))


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_training_knows_the_tiling_of_its_latents(mode, cache, train, tmp_path):
    folder = f"cache.dir={tmp_path / 'tiled'}"
    cache("tiled", TILED)
    plain_cache = cache("plain").folder
    tiled = train("tiled_run", TILED, folder, f"mode={mode}")
    plain = train("plain_run", f"cache.dir={plain_cache}", f"mode={mode}")
    assert vae_of_checkpoint(tiled)["tiling_frames"] == 5
    assert vae_of_checkpoint(plain).keys() == {"name", "weights_sha256"}
    name = "checkpoints/step_00000002/latte/diffusion_pytorch_model.safetensors"
    a, b = load_file(tiled / name), load_file(plain / name)
    assert not all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="tiling_frames"):
        train("plain_run", TILED, folder, f"mode={mode}")


def test_training_refuses_a_cache_that_was_not_tiled(cache, train):
    folder = cache("plain").folder
    with pytest.raises(ValueError, match=r"vae.tiling_frames"):
        train("run", TILED, f"cache.dir={folder}")


def test_samples_are_decoded_in_groups_and_their_manifest_says_so(cache, train, tmp_path):
    run = train("run", f"cache.dir={cache('plain').folder}")

    def videos(name, *more):
        words = [f"pipeline={run / 'pipeline'}", f"out={tmp_path / name}", "num_videos=1", "num_steps=2"]
        sample.main([*words, "sampler=ddim", *more])
        return read_frames(tmp_path / name / "000000.mkv", range(9))

    plain, tiled = videos("whole"), videos("groups", "tiling_frames=5")
    assert (plain[:5] == tiled[:5]).all()
    assert (plain[5:] != tiled[5:]).any()
    file = tmp_path / "whole" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["settings"].pop("tiling_frames") == 0
    file.write_text(json.dumps(manifest))  # as one made before there was the setting
    videos("whole")
    with pytest.raises(ValueError, match=r"tiling_frames: 0 -> 5"):
        videos("whole", "tiling_frames=5")


@pytest.mark.parametrize("frames", [1, 3, 8, 32, -3])
def test_groups_of_another_length_are_refused_before_anything_is_opened(frames, train, tmp_path):
    with pytest.raises(ValueError, match=rf"^vae.tiling_frames={frames}: .*4k \+ 1 frames"):
        train("run", f"vae.tiling_frames={frames}")
    with pytest.raises(ValueError, match=rf"^tiling_frames={frames}: .*0 turns tiling off"):
        sample.main([f"tiling_frames={frames}", f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_vae_without_temporal_tiling_is_refused_with_the_reason(tmp_path):
    build_vae(
        "sd2_1", block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"^vae.tiling_frames=33: SDVAE.*frames are independent.*=0 goes"):
        open_vae(VAEConfig(name="sd2_1", path=str(tmp_path / "sd"), tiling_frames=33))
