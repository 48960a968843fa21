"""A video VAE of diffusers is fine-tuned, resumed, opened by plain diffusers, and carries a Latte."""

import shlex

import diffusers
import pytest
import torch

from data.latents import LatentCache
from pipelines import cache_latents, sample, train_latte, train_vae
from pipelines.training.checkpoints import Checkpoints
from tests.parity.diffusers_small import OTHER, SMALL
from vae import load_vae
from vae.interface import makes_latents

FIVE = ["wan", "cogvideox", "ltx", "mochi", "hunyuanvideo"]
SMALL = SMALL | {"ltx-noisy": OTHER["ltx 0.9.1"]}


def add_noise(model):
    for key, value in model.named_parameters():
        if "per_channel_scale" in key:
            torch.nn.init.normal_(value, std=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name): what diffusers writes for a small random VAE."""
    made = {}

    def go(name):
        if name not in made:
            torch.manual_seed(1)
            made[name] = tmp_path_factory.mktemp(name)
            model = getattr(diffusers, SMALL[name][0])(**SMALL[name][1])
            add_noise(model)
            model.save_pretrained(made[name])
        return made[name]

    return go


def clip_of(name):
    return [f"clip.num_frames={SMALL[name][2]}", f"clip.size={SMALL[name][3]}"]


@pytest.fixture
def finetune(vae_settings, folders, tmp_path):
    """finetune(name, run, *settings): stage one from that VAE; returns the run's folder."""

    def go(name, run, *more):
        kept = [s for s in vae_settings if not s.startswith(("model.", "clip."))]
        more = ["global_batch=2", "micro_batch=1", "val_every=4", *more]
        start = ["model.init=weights", f"model.init_from={folders(name)}", "loss.gan_start=1"]
        paths = [f"run_dir={tmp_path / run}", f"source.index_dir={tmp_path / 'index'}"]
        train_vae.main([*kept, *clip_of(name), *start, *paths, *more])
        return tmp_path / run

    return go


def state(folder, name):
    """Tensors of a folder as plain diffusers opens it; every key must fit."""
    model, info = getattr(diffusers, SMALL[name][0]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.state_dict()


@pytest.mark.parametrize("name", [*FIVE, "ltx-noisy"])
def test_a_decoder_is_fine_tuned_resumed_and_opened_by_plain_diffusers(finetune, folders, name, caplog):
    caplog.set_level("INFO")
    whole = finetune(name, "whole", "steps=3", "save_every=1", "clip.flip=true")
    finetune(name, "parts", "steps=1", "save_every=1", "clip.flip=true")
    parts = finetune(name, "parts", "steps=3", "save_every=1", "clip.flip=true")
    before, after = state(folders(name), name), state(whole / "vae", name)
    assert before.keys() == after.keys()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed
    assert not any(makes_latents(key) for key in changed)
    again = state(parts / "vae", name)
    assert all(torch.equal(value, again[key]) for key, value in after.items())
    words = shlex.split(caplog.text.rpartition("pipelines.cache_latents ")[2].splitlines()[0])
    # the command that the run names as the next one
    assert cache_latents.main([*words, f"cache.dir={whole / 'cache'}"]) == 0
    step = Checkpoints(whole).path(3) / "vae"
    assert {k for k, v in state(step, name).items() if not torch.equal(v, before[k])} >= changed


@pytest.mark.parametrize("name", ["wan", "cosmos", "kvae", "vidtok", "magvit"])
def test_the_whole_vae_is_fine_tuned_with_recomputation(finetune, folders, name):
    run = finetune(
        name, "all", "steps=1", "model.train=all", "gradient_checkpointing=true", "loss.gan_weight=0"
    )
    before, after = state(folders(name), name), state(run / "vae", name)
    assert any(makes_latents(k) for k, v in after.items() if not torch.equal(v, before[k]))
    logged = (run / "metrics.jsonl").read_text()
    assert ("loss/kl" in logged) == (name not in ("cosmos", "kvae"))


def test_our_own_vae_can_have_only_its_decoder_trained(vae_settings, trained_vae, tmp_path):
    kept = [s for s in vae_settings if s != "model.init=random"]
    start = [
        "model.init=weights",
        f"model.init_from={trained_vae}",
        "model.train=decoder",
        "loss.gan_weight=0",
    ]
    train_vae.main([*kept, *start, f"run_dir={tmp_path / 'run'}", "steps=1"])
    before, after = load_vae(trained_vae).state_dict(), load_vae(tmp_path / "run/vae").state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed
    assert not any(makes_latents(k) for k in changed)


@pytest.fixture
def stage_two(latte_settings, tmp_path):
    """stage_two(name, folder, *settings): (cache, pipeline) of two steps of Latte on the latents of that VAE."""

    def go(name, folder, run="latte", *more):
        kept = [s for s in latte_settings if not s.startswith("clip.")]
        common = [*kept, *clip_of(name), f"vae.name={name}", f"vae.path={folder}", *more]
        common += [f"cache.dir={tmp_path / 'cache'}", f"source.index_dir={tmp_path / 'index'}"]
        cache_latents.main(common)
        train_latte.main([*common, f"run_dir={tmp_path / run}", "steps=2"])
        return LatentCache(tmp_path / "cache"), tmp_path / run / "pipeline"

    return go


@pytest.mark.parametrize("name", FIVE)
def test_cache_latte_and_samples_on_it(stage_two, folders, tmp_path, name):
    cache, pipeline = stage_two(name, folders(name))
    vae = load_vae(folders(name))
    assert cache[0]["mean"].shape[:2] == (vae.latent_channels, vae.latent_frames(SMALL[name][2]))
    out = tmp_path / "samples"
    sample.main([f"pipeline={pipeline}", f"out={out}", "num_videos=1", "num_steps=2"])
    assert len(list(out.glob("*.mkv"))) == 1


def test_a_tuned_decoder_leaves_the_cache_and_the_denoiser_valid(finetune, stage_two, folders):
    cache, _ = stage_two("wan", folders("wan"))
    tuned = finetune("wan", "tuned", "steps=1", "loss.gan_weight=0") / "vae"
    again, pipeline = stage_two("wan", tuned)  # same cache, and the same run goes on with the other decoder
    assert cache.fingerprint == again.fingerprint
    everything = finetune("wan", "everything", "steps=1", "loss.gan_weight=0", "model.train=all") / "vae"
    with pytest.raises(ValueError, match=r"was made otherwise .*latents_sha256"):
        stage_two("wan", everything)
    with pytest.raises(ValueError, match="learned on the latents of another VAE .*AutoencoderKLWan there"):
        stage_two("cogvideox", folders("cogvideox"), "next", f"denoiser.init_from={pipeline}", "mode=online")


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("wan", ["clip.num_frames=8"], r"T=8: AutoencoderKLWan needs T = 4k \+ 1 frames, e.g. 9"),
        ("mochi", ["clip.num_frames=17"], r"needs T = 6k \+ 1 frames, e.g. 19"),
        ("wan", ["clip.size=60"], r"clip.size=60: must be a multiple of 8"),
        ("allegro", ["clip.num_frames=24", "clip.size=128"], "AutoencoderKLAllegro cannot be trained here"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(finetune, tmp_path, name, more, message):
    with pytest.raises(ValueError, match=message):
        finetune(name, "run", *more)
    assert not (tmp_path / "run").exists()


def test_a_patch_that_does_not_fit_the_latents_is_refused(stage_two, folders):
    with pytest.raises(ValueError, match="patch"):
        stage_two("ltx", folders("ltx"), "latte", "denoiser.patch_size=4")


def test_a_folder_that_is_no_video_vae_is_refused(vae_settings, tmp_path):
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).save_pretrained(tmp_path / "tiny")
    kept = [s for s in vae_settings if s != "model.init=random"]
    with pytest.raises(ValueError, match="'AutoencoderTiny' is none of ODVAE, .*AutoencoderKLWan, .*Allegro"):
        train_vae.main(
            [*kept, "model.init=weights", f"model.init_from={tmp_path / 'tiny'}", f"run_dir={tmp_path / 'r'}"]
        )
    assert not (tmp_path / "r").exists()
