"""What a user of diffusers does with the models and the pipeline: arguments, offloading, casting, tiling, compiling, exporting."""

import accelerate
import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn

from denoiser import Latte
from pipelines.video_pipeline import LatentVideoPipeline
from tests.unit.vae.test_baselines import TINY, clip
from vae import ODVAE, build_vae

OD = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
RELEASED = OD | {"norm_scope": "clip", "spatial_up": "trilinear", "temporal_up": "linear"}
VAES = {
    "odvae": ("odvae", OD),
    "osp_v1_2": ("odvae", RELEASED),
    **{n: (n, TINY[n]) for n in ("sd2_1", "cvvae")},
}


def latte(**config) -> Latte:
    size = {
        "depth": 4,
        "hidden_size": 16,
        "num_heads": 2,
        "num_frames": 3,
        "sample_size": 4,
        "num_classes": 5,
    }
    model = Latte(**size | config).eval()
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    for block in model.blocks:
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    return model


@pytest.fixture
def pipe():
    made = LatentVideoPipeline(build_vae("odvae", **OD).eval(), latte(), list("abcde"))
    made.set_progress_bar_config(disable=True)
    return made


def made(pipe, **call):
    return pipe(**{"class_labels": [1, 4], "num_inference_steps": 3, "output_type": "video"} | call).frames


# ---- the pipeline's arguments ----------------------------------------------------------------------------


def test_frames_of_every_output_type_are_the_same_video(pipe):
    video = made(pipe)  # (N, 3, T, H, W) in [-1, 1]
    pt, array, pil = (made(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.shape == (2, 9, 3, 32, 32)
    torch.testing.assert_close(pt, (video.movedim(1, 2) + 1) / 2)
    np.testing.assert_array_equal(array, pt.movedim(2, 4).numpy())
    assert (len(pil), len(pil[0])) == (2, 9)
    np.testing.assert_array_equal(np.asarray(pil[1][8]), (array[1, 8] * 255).round().astype("uint8"))
    assert torch.equal(pipe.decode_latents(made(pipe, output_type="latent")), video)
    assert torch.equal(pipe([1, 4], 3, output_type="video", return_dict=False)[0], video)


def test_seeds_generators_labels_and_latents_say_the_same_in_their_own_words(pipe):
    video = made(pipe, seeds=[0, 1])
    assert torch.equal(made(pipe), video)
    assert torch.equal(made(pipe, generator=[torch.Generator().manual_seed(s) for s in (0, 1)]), video)
    assert torch.equal(made(pipe, class_labels=["b", "e"]), video)
    assert torch.equal(made(pipe, class_labels=torch.tensor([1, 4])), video)
    assert torch.equal(made(pipe, class_labels="b"), made(pipe, class_labels=1))
    torch.testing.assert_close(made(pipe, class_labels=1), video[:1], atol=1e-5, rtol=0)
    noise = torch.cat(
        [torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    )
    given = made(pipe, sampler="ddim_upstream", latents=noise)  # its steps draw nothing
    assert torch.equal(given, made(pipe, sampler="ddim_upstream"))
    together = made(pipe, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together, made(pipe, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(together, video)


def test_a_callback_sees_each_step_and_may_change_latents_and_guidance(pipe):
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append((i, t))
        pipe._guidance_scale += 1
        return {"latents": torch.zeros_like(kwargs["latents"])} if i == 2 else kwargs

    assert not made(pipe, guidance_scale=2.0, output_type="latent", callback_on_step_end=callback).any()
    assert seen == [(0, 999), (1, 500), (2, 0)]
    assert (pipe.guidance_scale, pipe.num_timesteps) == (5.0, 3)
    grown = made(
        pipe, guidance_scale=2.0, callback_on_step_end=lambda p, i, t, kw: setattr(p, "_guidance_scale", 9.0)
    )
    assert not torch.equal(grown, made(pipe, guidance_scale=2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"output_type": "tensor"}, "output_type='tensor': one of pil, np"),
        ({"generator": [torch.Generator()]}, "1 seeds or generators for 2 videos"),
        ({"seeds": [1], "generator": torch.Generator()}, "give one of them"),
        ({"latents": torch.zeros(2, 4, 3, 4, 5)}, r"latents of shape \(2, 4, 3, 4, 5\): this model's are \(2, 4, 3, 4, 4\)"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "no prompt_embeds; only latents"),
        ({"class_labels": ["z"]}, "label 'z': the classes are a, b"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        made(pipe, **call)


# ---- memory ----------------------------------------------------------------------------------------------


def on_cpu(model: nn.Module) -> None:
    """Sequential offloading with the CPU as its device: weights are away (on "meta") until a layer is called."""
    accelerate.cpu_offload(model, torch.device("cpu"))


def by_group(model: nn.Module) -> None:
    if Version(torch.__version__) < Version("2.7") and not torch.accelerator.is_available():
        pytest.skip("not run: diffusers asks torch 2.6 for a GPU here")
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("how", [on_cpu, by_group])
def test_offloading_layer_by_layer_changes_nothing(pipe, how, monkeypatch):
    wanted = made(pipe, guidance_scale=2.0)
    how(pipe.vae)
    how(pipe.transformer)
    monkeypatch.setattr(LatentVideoPipeline, "_execution_device", torch.device("cpu"))
    torch.testing.assert_close(made(pipe, guidance_scale=2.0), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", list(VAES))
def test_a_vae_offloaded_layer_by_layer_encodes_and_decodes_images_and_clips(name):
    kind, config = VAES[name]
    model = build_vae(kind, **config).eval()
    clips = [clip(2, 9), clip(2, 1)]
    wanted = [(model.encode(x).latent_dist.mode(), model(x).sample) for x in clips]
    on_cpu(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for x, (z, y) in zip(clips, wanted, strict=True):
        torch.testing.assert_close(model.encode(x).latent_dist.mode(), z, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(z).sample, y, atol=1e-5, rtol=0)
    if name == "odvae":
        with pytest.raises(ValueError, match="cannot be streamed: its layers are offloaded"):
            next(model.stream_encode([clip(1, 9)]))


@torch.no_grad()
@pytest.mark.parametrize("cls", [ODVAE, Latte])
def test_a_device_map_that_leaves_parts_on_the_disk(cls, tmp_path):
    model = build_vae("odvae", **OD).eval() if cls is ODVAE else latte()
    inputs = (
        {"sample": clip(1, 5)}
        if cls is ODVAE
        else {"x": torch.randn(2, 4, 3, 4, 4), "t": 3, "y": torch.tensor([0, 5])}
    )
    wanted = model(**inputs).sample
    model.save_pretrained(tmp_path / "model")
    places = {name: "disk" if i else "cpu" for i, (name, _) in enumerate(model.named_children())}
    again = cls.from_pretrained(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "away"))
    assert {p.device.type for p in again.parameters()} == {"cpu", "meta"}
    torch.testing.assert_close(again.eval()(**inputs).sample, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_layerwise_casting_stores_eight_bits_and_computes_in_the_given_precision(pipe):
    wanted = made(pipe)
    for model in (pipe.vae, pipe.transformer):
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
    found = made(pipe)
    assert found.isfinite().all()
    assert 0 < (found - wanted).abs().mean() < 0.1
    pipe.vae(clip(1, 1))  # an image, whose kernels are summed over time


def test_tiling_and_slicing_are_switched_as_in_other_vaes(pipe):
    vae, x = pipe.vae, clip(2, 9)
    with torch.no_grad():
        whole = vae(x).sample
        for switch, state in (
            (vae.enable_tiling, True), (vae.disable_tiling, False), (lambda: vae.enable_tiling(True), True),
            (lambda: vae.enable_tiling(False), False), (lambda: vae.enable_tiling(use_tiling=True), True),
            (lambda: setattr(vae, "use_tiling", False), False), (lambda: setattr(vae, "use_tiling", True), True),
        ):  # fmt: skip
            switch()
            assert vae.use_tiling is state
        vae.disable_tiling()
        vae.enable_spatial_tiling(16)
        assert vae.use_tiling
        assert not torch.equal(made(pipe), made_untiled(pipe))
        vae.enable_slicing()
        torch.testing.assert_close(vae(x).sample, whole, atol=1e-5, rtol=0)
        vae.disable_slicing()
        assert torch.equal(vae(x).sample, whole)


def made_untiled(pipe) -> torch.Tensor:
    pipe.vae.disable_tiling()
    return made(pipe)


# ---- graphs ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_repeated_blocks_compile_to_one_graph_for_each_kind_of_block(pipe, monkeypatch):
    torch.compiler.reset()
    wanted, compile_module = made(pipe), nn.Module.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: compile_module(self, backend=backend, **kw))
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 1}):
        torch.testing.assert_close(made(pipe), wanted, atol=1e-5, rtol=0)
        made(pipe, seeds=[5, 6], class_labels=[0, 2])
    assert len(graphs) == 2
    torch.compiler.reset()


class Call(nn.Module):
    """A method as a module, which is what torch.export takes."""

    def __init__(self, model: nn.Module, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs):
        return self.method(self.model, *inputs)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("name", list(VAES))
def test_torch_export_of_encoder_and_decoder(name, T):
    kind, config = VAES[name]
    model, x = build_vae(kind, **config).eval(), clip(1, T)
    encode = Call(model, lambda m, x: m.encode(x).latent_dist.parameters)
    decode = Call(model, lambda m, z: m.decode(z).sample)
    z = model.encode(x).latent_dist.mode()
    for call, given in ((encode, x), (decode, z), (model, x)):
        exported = torch.export.export(call, (given,)).module()
        other = torch.randn_like(given).clamp(-1, 1)
        found, wanted = exported(other), call(other)
        found, wanted = (getattr(v, "sample", v) for v in (found, wanted))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_torch_export_of_the_denoiser_with_labels():
    model, x, t, y = latte(), torch.randn(2, 4, 3, 4, 4), torch.tensor([3, 500]), torch.tensor([0, 5])
    exported = torch.export.export(model, (x, t, y)).module()
    for labels in (y, torch.tensor([4, 1])):
        torch.testing.assert_close(
            exported(x, t, labels).sample, model(x, t, labels).sample, atol=1e-5, rtol=0
        )
    assert not torch.equal(exported(x, t, y).sample, exported(x, t, torch.tensor([4, 1])).sample)


@torch.no_grad()
def test_a_graph_holds_the_network_once_however_long_the_clip_is():
    model = build_vae("odvae", **OD).eval()
    sizes = [len(torch.export.export(model, (clip(1, T),)).graph.nodes) for T in (9, 17)]
    assert sizes[0] == sizes[1]
