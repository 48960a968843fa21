"""Every video autoencoder of diffusers behind our interface: outputs, refusals, scaling, gradients, what is saved."""

import json
import re
import subprocess
import sys

import diffusers
import pytest
import torch

from pipelines.training.open import check_scaling, imagined_vae
from pipelines.training.settings import VAEConfig
from tests.parity.diffusers_small import OTHER, SMALL
from vae import build_like, load_vae
from vae.adapter import ROWS, adapted
from vae.interface import Autoencode

ALL = SMALL | OTHER
TRAINED = [name for name in ALL if name != "allegro"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name): what diffusers itself writes for that small config, with latent statistics in LTX's buffers."""
    made = {}

    def go(name):
        if name not in made:
            cls, config, _, _ = ALL[name]
            torch.manual_seed(1)
            model = getattr(diffusers, cls)(**config)
            if "latents_mean" in dict(model.named_buffers()):
                model.latents_mean.normal_()
                model.latents_std.uniform_(0.5, 2.0)
            made[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
            model.save_pretrained(made[name])
        return made[name]

    return go


@pytest.fixture
def pair(folders):
    """pair(name): (diffusers' model, ours) of one folder, and a clip."""

    def go(name):
        cls, _, frames, side = ALL[name]
        theirs = getattr(diffusers, cls).from_pretrained(folders(name)).eval()
        return theirs, load_vae(folders(name)), torch.rand(1, 3, frames, side, side) * 2 - 1

    return go


def diffusers_own(theirs, x):
    """(mean, pixels) as one gets them from diffusers with what its own pipelines do for that class."""
    if isinstance(theirs, diffusers.AutoencoderVidTok):
        inputs = []
        theirs.encode, encode = lambda clip: inputs.append(encode(clip)) or inputs[-1], theirs.encode
        pixels = theirs(x, sample_posterior=False).sample
        return inputs[0].latent_dist.mode(), pixels
    if isinstance(theirs, diffusers.AutoencoderKLAllegro):
        theirs.enable_tiling()
    mean = theirs.encode(x).latent_dist.mode()
    timed = {"temb": torch.zeros(len(x))} if theirs.config.get("timestep_conditioning") else {}
    pixels = theirs.decode(mean, **timed).sample
    return mean, pixels.transpose(1, 2) if isinstance(theirs, diffusers.AutoencoderKLAllegro) else pixels


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_those_of_diffusers_to_the_bit(pair, name):
    theirs, ours, x = pair(name)
    with torch.no_grad():
        posterior = ours.encode(x).latent_dist
        pixels = ours.decode(posterior.mode(), num_frames=x.shape[2]).sample
        mean, expected = diffusers_own(theirs, x)
    t, s = ours.latent_frames(x.shape[2]), ours.spatial_compression_ratio
    assert posterior.mean.shape == (1, ours.latent_channels, t, x.shape[3] // s, x.shape[4] // s)
    assert torch.equal(posterior.mode(), mean)
    assert torch.equal(pixels, expected)
    assert pixels.shape == x.shape
    with torch.no_grad():
        assert torch.equal(ours(x).sample, expected)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_gives_what_its_clips_give_alone(pair, name):
    _, ours, x = pair(name)
    x = torch.cat([x, x.flip(2) * 0.5])
    with torch.no_grad():
        z = ours.encode(x).latent_dist.mode()
        alone = torch.cat([ours.encode(one).latent_dist.mode() for one in x.split(1)])
        torch.testing.assert_close(z, alone, rtol=0, atol=2e-4)
        pixels = torch.cat([ours.decode(one).sample for one in z.split(1)])
        torch.testing.assert_close(ours.decode(z).sample, pixels, rtol=0, atol=2e-4)


def test_a_batch_of_hunyuanvideo_15_is_trained(pair):
    _, ours, x = pair("hunyuanvideo15")
    ours.train().enable_gradient_checkpointing()
    pixels, _ = Autoencode(ours)(
        torch.cat([x, x]), torch.zeros(2, *ours.encode(x).latent_dist.mode().shape[1:])
    )
    pixels.square().mean().backward()
    assert ours.last_decoder_layer.grad.abs().max() > 0


@pytest.mark.parametrize("name", ALL)
def test_the_code_of_a_card_does_in_diffusers_what_we_do(pair, name):
    theirs, ours, x = pair(name)
    names = {"vae": theirs, "x": x, "torch": torch}
    with torch.no_grad():
        exec("\n".join(ours.plain_code()), names)
        z = ours.encode(x).latent_dist.mode()
        assert torch.equal(names["z"], z)
        assert torch.equal(names["video"], ours.decode(z).sample)


def test_a_decoder_that_adds_noise_gives_a_latent_one_picture_and_trains_on_many(pair):
    _, ours, x = pair("ltx 0.9.1")
    scales = [p for n, p in ours.named_parameters() if "per_channel_scale" in n]
    with torch.no_grad():
        plain = ours(x).sample
        assert scales
        for scale in scales:
            torch.nn.init.normal_(scale, std=0.5)
        z, random = ours.encode(x).latent_dist.mode(), torch.get_rng_state()
        first = ours.decode(z).sample
        assert torch.equal(ours.decode(z).sample, first)
        torch.testing.assert_close(ours.decode(torch.cat([z, z])).sample[1:], first, rtol=0, atol=2e-4)
        assert torch.equal(torch.get_rng_state(), random)
        assert not torch.allclose(first, plain, atol=1e-2)
        ours.train()
        assert not torch.allclose(ours.decode(z).sample, ours.decode(z).sample, atol=1e-2)


@pytest.mark.parametrize("name", ["wan", "qwenimage", "wan 2.2"])
def test_a_step_without_gradients_sees_the_same_pixels_as_one_with(pair, name):
    theirs, ours, x = pair(name)
    for model in (theirs, ours):
        with torch.no_grad():
            model.decoder.conv_out.bias.fill_(3.0)
    ours.train().enable_gradient_checkpointing()
    z = ours.encode(x).latent_dist.mode().detach()
    pixels = ours.decode(z).sample.detach()
    assert pixels.max() > 1.5
    with torch.no_grad():
        assert torch.equal(ours.decode(z).sample, pixels)
        assert torch.equal(ours.eval().decode(z).sample, theirs.decode(z).sample)


def test_a_key_of_a_config_that_the_class_lacks_is_left_out(folders):
    config = load_vae(folders("wan")).config
    model = build_like("wan", dict(config) | {"clip_output": False, "auto_map": {}})
    assert all(model.config[key] == value for key, value in config.items() if key[0] != "_")
    settings = VAEConfig(name="wan", path=str(folders("wan")))
    file = folders("wan") / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"clip_output": False}))
    assert imagined_vae(settings).config.z_dim == 4
    file.write_text(before)


def test_a_clip_longer_than_the_statistics_is_refused_before_it_is_cached(pair):
    _, ours, _ = pair("cosmos")
    check_scaling(ours, 17)
    with pytest.raises(ValueError, match=r"5 latent frames: .* has statistics of 3 frames"):
        check_scaling(ours, 33)
    check_scaling(pair("kvae")[1], 33)  # no rule yet: the cache measures one


def test_every_row_has_a_small_config_and_only_those():
    assert {cls for cls, *_ in SMALL.values()} == set(ROWS)
    assert all(ROWS[cls].name == name for name, (cls, *_) in SMALL.items())


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("allegro", "vidtok, not causal")])
def test_other_lengths_and_sides_are_refused_before_the_network_sees_them(pair, name, monkeypatch):
    _, ours, x = pair(name)
    monkeypatch.setattr(ours.encoder, "forward", lambda *_: pytest.fail("the network saw the clip"))
    group, _ = ours.clip_lengths
    with pytest.raises(
        ValueError, match=rf"T={group + 2}: \w+ needs T = {group}k \+ 1 frames.* e.g. {group + 1}"
    ):
        ours.encode(torch.zeros(1, 3, group + 2, *x.shape[3:]))
    with pytest.raises(ValueError, match="sides must be multiples of"):
        ours.encode(torch.zeros(1, 3, 1, 60 + 1, 60))


@pytest.mark.parametrize("name", [n for n in ALL if n != "allegro"])
def test_every_length_that_is_taken_comes_back_whole(pair, name):
    _, ours, _ = pair(name)
    side = max(16, ours.spatial_compression_ratio * (2 if name == "ltx2" else 1))
    for T in range(1, 28):
        try:
            ours.check_frames(T)
        except ValueError as error:
            nearest = int(re.search(r"e\.g\. (\d+)$", str(error))[1])
            assert abs(nearest - T) <= ours.clip_lengths[0]
            ours.check_frames(nearest)
            continue
        with torch.no_grad():
            z = ours.encode(torch.zeros(1, 3, T, side, side)).latent_dist.mode()
            assert z.shape[2] == ours.latent_frames(T)
            assert ours.decode(z).sample.shape == (1, 3, T, side, side)


@pytest.mark.parametrize(
    ("name", "frames", "nearest"),
    [
        ("wan", 8, 9),
        ("mochi", 17, 19),
        ("cogvideox", 8, 9),
        ("cogvideox", 13, 17),
        ("ltx", 13, 17),
        ("kvae", 21, 17),
    ],
)
def test_lengths_that_diffusers_would_change_without_a_word(pair, name, frames, nearest):
    theirs, ours, x = pair(name)
    clip = torch.zeros(1, 3, frames, *x.shape[3:])
    with pytest.raises(ValueError, match=f"T={frames}: .* e.g. {nearest}"):
        ours.check_frames(frames)
    with torch.no_grad():
        try:
            mean, pixels = diffusers_own(theirs, clip)
        except RuntimeError:
            return
    assert pixels.shape[2] != frames or mean.shape[2] * 4 == frames  # CogVideoX: the other alignment


def test_an_even_number_of_cogvideox_latents_is_refused(pair):
    _, ours, _ = pair("cogvideox")
    with pytest.raises(ValueError, match=r"T=5: .* 8k \+ 1"):
        ours.decode(torch.zeros(1, 4, 2, 2, 2))


def test_ltx_2_needs_two_latents_a_side_to_reflect(pair):
    _, ours, _ = pair("ltx2")
    with pytest.raises(ValueError, match="64 pixels a side at least"):
        ours.encode(torch.zeros(1, 3, 9, 32, 64))


def test_allegro_takes_only_what_its_tiles_cover(pair):
    _, ours, _ = pair("allegro")
    for shape, message in (
        ((24, 128, 136), r"128 \+ 8i x 128 \+ 48j"),
        ((28, 128, 128), r"16k \+ 24 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.encode(torch.zeros(1, 3, *shape))
    assert not ours.trainable


@pytest.mark.parametrize("name", TRAINED)
def test_a_clip_that_fails_inside_leaves_nothing_behind(pair, name):
    """A failure in the middle of the encoder or decoder, as a lack of memory would be."""
    _, ours, x = pair(name)
    with torch.no_grad():
        mean = ours.encode(x).latent_dist.mode()
        pixels = ours.decode(mean).sample
        for stage, call in (
            (ours.encoder, lambda: ours.encode(x)),
            (ours.decoder, lambda: ours.decode(mean)),
        ):
            last = [m for m in stage.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.Linear)][-1]

            def fail(*_):
                raise RuntimeError("no memory")

            handle = last.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="no memory"):
                call()
            handle.remove()
            held = [m for m in ours.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
            assert not held
        assert torch.equal(ours.encode(x).latent_dist.mode(), mean)
        assert torch.equal(ours.decode(mean).sample, pixels)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuanvideo", "ltx", "mochi", "cosmos", "magvit"])
def test_latents_are_scaled_as_the_pipelines_of_diffusers_scale_them(pair, name):
    _, ours, x = pair(name)
    config = ours.config
    z = torch.randn(1, ours.latent_channels, ours.latent_frames(x.shape[2]), 2, 2)
    if name == "ltx":
        expected = diffusers.LTXPipeline._normalize_latents(
            z, ours.latents_mean, ours.latents_std, config.scaling_factor
        )
    elif name in ("wan", "mochi", "cosmos"):
        mean, std = (
            torch.tensor(config[k]).view(1, ours.latent_channels, -1, 1, 1)
            for k in ("latents_mean", "latents_std")
        )
        expected = (z - mean[:, :, : z.shape[2]]) / std[:, :, : z.shape[2]]
    else:
        expected = z * config.scaling_factor
    torch.testing.assert_close(ours.normalize(z), expected)
    torch.testing.assert_close(ours.denormalize(ours.normalize(z)), z)


def test_a_shift_comes_before_the_scale_and_statistics_by_frame_cover_no_longer_clip(pair, tmp_path):
    cls, config, *_ = SMALL["cogvideox"]
    shifted = {**config, "shift_factor": 0.5, "scaling_factor": 2.0}
    getattr(diffusers, cls)(**shifted).save_pretrained(tmp_path)
    z, ours = torch.randn(1, 4, 2, 3, 3), load_vae(tmp_path)
    torch.testing.assert_close(ours.normalize(z), (z - 0.5) * 2)
    torch.testing.assert_close(ours.denormalize(ours.normalize(z)), z)
    with pytest.raises(ValueError, match=r"4 latent frames: .* has statistics of 3 frames"):
        pair("cosmos")[1].normalize(torch.zeros(1, 4, 4, 2, 2))


def test_classes_without_a_rule_take_measured_statistics_and_keep_them(pair, tmp_path):
    for name in ("kvae", "vidtok"):
        _, ours, _ = pair(name)
        assert not ours.has_scaling_rule
        ours.set_latent_statistics([0.5] * 4, [2.0] * 4)
        ours.save_pretrained(tmp_path / name)
        again = load_vae(tmp_path / name)
        assert again.normalize(torch.ones(1, 4, 1, 1, 1)).flatten().tolist() == [0.25] * 4


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_diffusers_to_the_bit(pair, name, recompute):
    """Of a loss on pixels that no clamp has touched; with checkpoints everything is computed twice, to the same bits."""
    theirs, ours, x = pair(name)
    for model in (theirs, ours) if hasattr(ours, "clear_cache") else ():
        with torch.no_grad():
            model.decoder.conv_out.weight.mul_(0.1)  # inside [-1, 1], where their clamp changes nothing
    random = torch.get_rng_state()
    mean, expected = diffusers_own(theirs, x)
    (expected - x).square().mean().backward()
    torch.set_rng_state(random)  # LTX 0.9.1 adds noise
    if recompute:
        ours.enable_gradient_checkpointing()
    ours.train()
    pixels, _ = Autoencode(ours)(x, torch.zeros_like(mean))
    assert torch.equal(pixels, expected)
    (pixels - x).square().mean().backward()
    own = dict(theirs.named_parameters())
    for key, value in ours.named_parameters():
        if own[key].grad is None:
            assert value.grad is None, key
        else:
            assert torch.equal(value.grad, own[key].grad), key


def test_training_sees_saturated_pixels_of_wan(pair):
    theirs, ours, x = pair("wan")
    for model in (theirs, ours):
        with torch.no_grad():
            model.decoder.conv_out.bias.fill_(3.0)
    z = ours.encode(x).latent_dist.mode().detach()
    assert ours.decode(z).sample.max() > 1.5
    with torch.no_grad():
        assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)


@pytest.mark.parametrize("name", SMALL)
def test_what_we_save_opens_in_plain_diffusers(folders, name, tmp_path):
    ours = load_vae(folders(name))
    ours.save_pretrained(tmp_path)
    code = (
        f"import sys; from diffusers import {SMALL[name][0]} as cls; model, info = cls.from_pretrained("
        f"{str(tmp_path)!r}, output_loading_info=True); assert not any(info.values()), info; "
        f"assert 'vae' not in sys.modules; print(type(model).__module__)"
    )
    if name in ("wan", "cosmos"):  # one process each takes seconds; the others in this one
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert done.stdout.startswith("diffusers.")
    again = getattr(diffusers, SMALL[name][0]).from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def test_other_folders_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"holds a AutoencoderKLMochi \(mochi\), not wan"):
        load_vae("wan", folders("mochi"))
    fsq = diffusers.AutoencoderVidTok(
        ch=32,
        ch_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        z_channels=4,
        double_z=False,
        regularizer="fsq",
        codebook_size=4096,
    )
    fsq.save_pretrained(tmp_path / "fsq")
    with pytest.raises(ValueError, match="regularizer=fsq: discrete codes"):
        load_vae(tmp_path / "fsq")
    config = dict(SMALL["qwenimage"][1], input_channels=4)
    diffusers.AutoencoderKLQwenImage(**config).save_pretrained(tmp_path / "rgba")
    with pytest.raises(ValueError, match="4 channels, not RGB video"):
        load_vae(tmp_path / "rgba")
    with pytest.raises(ValueError, match="neither a folder nor one of odvae, .*wan, qwenimage, .*allegro"):
        load_vae("wan3")


def test_a_class_that_diffusers_lacks_is_told(monkeypatch):
    monkeypatch.setitem(ROWS, "AutoencoderOfLater", ROWS["AutoencoderKLWan"])
    with pytest.raises(ValueError, match="has no such class; install a later one"):
        adapted("AutoencoderOfLater")
