"""ODVAE: sizes, laws of causality, both paths of the forward, errors at the border, configuration kept."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unit.vae import reference
from tests.unit.vae.tiny import LiveBytes, clip, moments, tiny
from vae.interface import Autoencode, VideoGaussian
from vae.odvae import ODVAE
from vae.variants import LAYOUTS, PRESETS


@pytest.mark.parametrize(
    ("variant", "parameters"), [(1, 244_505_319), (2, 171_072_231), (3, 228_861_159), (4, 239_189_991)]
)
def test_variants_have_the_papers_parameter_counts(variant, parameters):
    with torch.device("meta"):
        model = ODVAE(variant=variant)
    assert sum(p.numel() for p in model.parameters()) == parameters == LAYOUTS[variant].parameters


@pytest.mark.parametrize("variant", ["osp_v1_0", "osp_v1_1"])
def test_older_released_layouts_have_their_parameter_counts(variant):
    with torch.device("meta"):
        model = ODVAE(variant=variant)
    assert sum(p.numel() for p in model.parameters()) == LAYOUTS[variant].parameters


def test_geometry_is_4x_in_time_and_8x_in_space():
    model = tiny(dtype=torch.float32)
    for T in (1, 5, 9):
        x = clip(T, 16, 24, B=2, dtype=torch.float32)
        with torch.no_grad():
            z = model.encode(x).latent_dist.mode()
            assert z.shape == (2, 4, model.latent_frames(T), 2, 3)
            assert model.decode(z).sample.shape == x.shape
            assert model.pixel_frames(z.shape[2]) == T


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_training_and_inference_paths_equal_the_plain_network(variant):
    model, x = tiny(variant=variant), clip(9, B=2)
    want = reference.encode(model, x)
    z = want.detach().chunk(2, dim=1)[0]
    frames = reference.decode(model, z)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(moments(model, x), want, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(model.decode(z).sample, frames, atol=1e-12, rtol=1e-12)


RELEASED = [("osp_v1_2", variant) for variant in (1, 2, 3, 4)]
RELEASED += [("osp_v1_1", "osp_v1_1"), ("osp_v1_0", "osp_v1_0")]


@pytest.mark.parametrize(("preset", "variant"), RELEASED)
def test_layouts_with_released_norms_and_upsampling_equal_the_plain_network(preset, variant):
    model = tiny(preset, variant=variant)
    for T in (1, 9):
        x = clip(T, B=2)
        want = reference.encode(model, x)
        z = want.detach().chunk(2, dim=1)[0]
        frames = reference.decode(model, z)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(moments(model, x), want, atol=1e-12, rtol=1e-12)
                torch.testing.assert_close(model.decode(z).sample, frames, atol=1e-12, rtol=1e-12)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_training_and_checkpointing_give_the_plain_networks_gradients():
    model, x = tiny(), clip(9)

    def plain():
        m = reference.encode(model, x)
        return reference.decode(model, m.chunk(2, dim=1)[0]).square().mean() + m.square().mean()

    def training():
        m = moments(model, x)
        return model.decode(m.chunk(2, dim=1)[0]).sample.square().mean() + m.square().mean()

    want = gradients(model, plain())
    torch.testing.assert_close(gradients(model, training()), want, atol=1e-12, rtol=1e-9)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(model, training()), want, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_paths_chosen_by_name_agree_and_only_the_plain_one_records_gradients(preset):
    model, x = tiny(preset), clip(9)
    found = {}
    for name in ("plain", "fast", "auto"):
        model.use_path(name)
        m = moments(model, x)
        assert m.requires_grad == (name != "fast")
        with torch.no_grad():
            found[name] = m, moments(model, x), model.decode(m.chunk(2, dim=1)[0]).sample
    assert torch.equal(found["plain"][0], found["auto"][0])
    assert torch.equal(found["fast"][1], found["auto"][1])
    for one, other in zip(found["plain"], found["fast"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="path 'quick'"):
        model.use_path("quick")


def test_gradient_checkpointing_keeps_fewer_bytes():
    model, peaks = tiny(dtype=torch.float32), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with LiveBytes() as live:
            model(clip(9, 32, 32, dtype=torch.float32)).sample.mean().backward()
        peaks.append(live.peak)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("grad", [False, True])
def test_later_frames_change_no_earlier_latent_and_later_latents_no_earlier_frame(grad):
    model, x = tiny(), clip(13)
    with torch.set_grad_enabled(grad):
        before = moments(model, x)
        z = before.detach().chunk(2, dim=1)[0].clone()
        frames = model.decode(z).sample
        for t in (1, 5, 10, 12):
            y = x.clone()
            y[:, :, t] += 1
            after, first = moments(model, y), -(-t // 4)  # latent ceil(t / 4) is the first to see frame t
            assert torch.equal(after[:, :, :first], before[:, :, :first])
            assert not torch.equal(after[:, :, first], before[:, :, first])
        for j in (1, 2, 3):
            changed = z.clone()
            changed[:, :, j] += 1
            after, first = model.decode(changed).sample, 4 * (j - 1) + 1
            assert torch.equal(after[:, :, :first], frames[:, :, :first])
            assert not torch.equal(after[:, :, first], frames[:, :, first])


def test_the_released_layout_does_look_ahead():
    model, x = tiny("osp_v1_2"), clip(9)
    y = x.clone()
    y[:, :, 8] += 1
    with torch.no_grad():
        assert (moments(model, x) - moments(model, y))[:, :, 0].abs().max() > 1e-4
    assert not model.causal


SLOW = pytest.mark.slow
COMPILED = [("odvae", torch.no_grad, "eager")]
COMPILED += [
    pytest.param(preset, mode, "aot_eager", marks=SLOW)
    for preset in PRESETS
    for mode in (torch.no_grad, torch.enable_grad)
]


@pytest.mark.parametrize(("preset", "mode", "backend"), COMPILED)
def test_a_compiled_model_is_one_graph(preset, mode, backend):
    model = tiny(preset, dtype=torch.float32, layers_per_block=1)
    x = clip(5, 16, 16, dtype=torch.float32)
    torch.compiler.reset()
    encode = torch.compile(lambda x: model.encode(x).latent_dist.mode(), fullgraph=True, backend=backend)
    decode = torch.compile(lambda z: model.decode(z).sample, fullgraph=True, backend=backend)
    with mode():
        z = model.encode(x).latent_dist.mode()
        torch.testing.assert_close(encode(x), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode(z), model.decode(z).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_a_traced_and_an_exported_model_give_what_the_model_gives():
    model = tiny("odvae", dtype=torch.float32, layers_per_block=1)
    encode, decode = (lambda x: model.encode(x).latent_dist.mode()), (lambda z: model.decode(z).sample)
    x, other = clip(5, 16, 16, dtype=torch.float32), clip(5, 16, 16, dtype=torch.float32)
    for function, first, second in ((encode, x, other), (decode, encode(x), encode(other))):
        whole = nn.Module()
        whole.model, whole.forward = model, function
        for graph in (
            torch.jit.trace(whole, first, check_trace=False),
            torch.export.export(whole, (first,)).module(),
        ):
            torch.testing.assert_close(graph(second), function(second), atol=1e-4, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor made inside the context; on the meta device it costs nothing."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@torch.no_grad()
def test_beyond_the_papers_125_frames_of_256_pixels_no_tensor_reaches_2_31_elements():
    with torch.device("meta"):
        model, z = ODVAE(), torch.empty(1, 4, 34, 32, 32)
        with LargestTensor() as seen:
            frames = model.decode(z).sample
    assert frames.shape == (1, 3, 133, 256, 256)
    assert seen.largest < 2**28
    assert 256 * 133 * 256 * 256 >= 2**31  # what the plain network's upsampling makes


def test_slicing_a_batch_changes_nothing():
    model, x = tiny(), clip(5, B=2)
    with torch.no_grad():
        want = moments(model, x)
        frames = model.decode(want[:, :4]).sample
        model.enable_slicing()
        torch.testing.assert_close(moments(model, x), want, atol=1e-13, rtol=1e-12)
        torch.testing.assert_close(model.decode(want[:, :4]).sample, frames, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 24, 16, 16), "T=24: ODVAE needs T = 4k \\+ 1 frames, e.g. 25"),
        ((1, 3, 2, 16, 16), "T=2: ODVAE needs T = 4k \\+ 1 frames, e.g. 1"),
        ((1, 3, 0, 16, 16), "e.g. 1"),
        ((1, 3, 5, 20, 16), "H=20, W=16: sides must be multiples of 8, e.g. crop to 16 x 16"),
        ((1, 3, 16, 16), "needs \\(B, 3, T, H, W\\)"),
        ((1, 4, 5, 16, 16), "needs \\(B, 3, T, H, W\\)"),
    ],
)
def test_wrong_clips_are_refused_with_the_rule_and_a_way_out(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny().encode(torch.zeros(shape))


def test_wrong_dtype_latents_and_settings_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"x.float\(\) / 127.5 - 1"):
        model.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"needs \(B, 4, t, h, w\)"):
        model.decode(torch.zeros(1, 3, 1, 2, 2))
    for wrong in (
        {"variant": 5},
        {"norm_scope": "batch"},
        {"temporal_up": "cubic"},
        {"block_out_channels": (8, 8)},
    ):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            tiny(**wrong)
    with pytest.raises(ValueError, match="odvae, osp_v1_2"):
        ODVAE.preset("sd")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_saved_model_comes_back_with_its_config_and_its_bits(preset, tmp_path):
    model, x = tiny(preset, dtype=torch.float32), clip(5, dtype=torch.float32)
    model.set_latent_statistics([0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4])
    model.save_pretrained(tmp_path)
    again = ODVAE.from_pretrained(tmp_path)
    own = {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert {k: v for k, v in again.config.items() if k in own} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in own.items()
    }
    assert again.config.latents_mean == [0.1, 0.2, 0.3, 0.4]
    with torch.no_grad():
        z = model.encode(x).latent_dist.mode()
        assert torch.equal(again.encode(x).latent_dist.mode(), z)
        assert torch.equal(again.normalize(z), model.normalize(z))


def test_normalize_uses_channel_statistics_then_the_scaling_factor_and_is_undone_by_denormalize():
    model, z = tiny(), torch.randn(1, 4, 2, 3, 3).double()
    assert model.has_scaling_rule
    torch.testing.assert_close(model.normalize(z), z * 0.18215)
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    model.set_latent_statistics(mean, std)
    scaled = model.normalize(z)
    torch.testing.assert_close(scaled.mean((0, 2, 3, 4)), torch.zeros(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3, 4)), torch.ones(4).double())
    torch.testing.assert_close(model.denormalize(scaled), z)
    none = tiny(scaling_factor=None)
    assert not none.has_scaling_rule
    with pytest.raises(ValueError, match="measure latent statistics first"):
        none.normalize(z)
    with pytest.raises(ValueError, match="one value per latent channel"):
        model.set_latent_statistics([0.0], [1.0])
    with pytest.raises(ValueError, match="above 0"):
        model.set_latent_statistics([0.0] * 4, [1.0, 1.0, 0.0, 1.0])


def test_posterior_sums_kl_over_time_and_samples_with_a_generator():
    parameters = torch.randn(2, 8, 3, 2, 2)
    posterior = VideoGaussian(parameters)
    mean, logvar = parameters.chunk(2, dim=1)
    want = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3, 4))
    torch.testing.assert_close(posterior.kl(), want)
    torch.testing.assert_close(VideoGaussian(torch.zeros(2, 8, 3, 2, 2)).kl(), torch.zeros(2))
    draws = [posterior.sample(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], posterior.mode())
    assert VideoGaussian(100 + parameters).logvar.max() == 20
    assert VideoGaussian(parameters - 100).logvar.min() == -30
    torch.testing.assert_close(posterior.std, (0.5 * logvar).exp())
    torch.testing.assert_close(posterior.var, logvar.exp())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draws[0], mean + (0.5 * logvar).exp() * noise)
    many = VideoGaussian(
        torch.cat((torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)), 1).expand(1, 2, 50, 50, 50)
    )
    assert abs(many.sample().std().item() - 1) < 0.01
    with pytest.raises(ValueError, match="2C channels"):
        VideoGaussian(torch.zeros(1, 3, 1, 1, 1))


@torch.no_grad()
def test_a_training_forward_decodes_mean_plus_std_times_noise():
    model, x = tiny(dtype=torch.float32), clip(5, dtype=torch.float32)
    mean, logvar = model.encode(x).latent_dist.parameters.chunk(2, dim=1)
    noise = torch.randn_like(mean)
    decoded = model.decode(mean + (0.5 * logvar).exp() * noise).sample
    torch.testing.assert_close(Autoencode(model)(x, noise)[0], decoded)


@torch.no_grad()
def test_forward_decodes_the_mean_unless_a_draw_is_asked_for():
    model, x = tiny(dtype=torch.float32), clip(5, dtype=torch.float32)
    posterior = model.encode(x).latent_dist
    assert torch.equal(model(x).sample, model.decode(posterior.mode()).sample)
    draws = [model(x, True, generator=torch.Generator().manual_seed(s)).sample for s in (1, 1, 2)]
    z = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(draws[0], model.decode(z).sample)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@torch.no_grad()
def test_decode_takes_the_number_of_frames_as_every_vae_does():
    model, z = tiny(), torch.randn(1, 4, 2, 2, 2).double()
    assert torch.equal(model.decode(z, num_frames=5).sample, model.decode(z, return_dict=False)[0])
    with pytest.raises(ValueError, match="num_frames=9 is 3 latent frames, but z has 2"):
        model.decode(z, num_frames=9)


def test_last_decoder_layer_is_the_weight_of_conv_out():
    for variant in (3, 4):
        weight = tiny(variant=variant).last_decoder_layer
        assert weight.shape[:2] == (3, 8)
        assert weight.requires_grad
