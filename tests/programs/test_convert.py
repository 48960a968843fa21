"""scripts/convert.py: official layouts in, folders out, strictly; synthetic checkpoints of reduced width."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from data.core.cli import run
from scripts.convert import main, write_file, write_folder
from tests.parity.rule import draw
from vae import build_vae, load_vae

WIDTHS = (32, 32, 64, 64)


class Callback:
    """As Lightning leaves one in a checkpoint; unpickling it for real would be seen."""

    touched = False

    def __init__(self, value):
        self.value = value

    def __setstate__(self, state):
        Callback.touched = True


def clip(T=5):
    return torch.rand(1, 3, T, 32, 32) * 2 - 1


def to_compvis(state, levels=4):
    """diffusers' names -> CompVis' names, written apart from the converter."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
        if ".attentions." in key:
            names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
            for ours, theirs in names.items():
                if f".{ours}." in key:
                    key = key.replace(f".{ours}.", f".{theirs}.")
                    break
            value = value[..., None, None].clone() if value.ndim == 2 else value
        for ours, theirs in (
            ("down_blocks", "down"),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("samplers.0", "sample"),
            ("resnets", "block"),
            ("attentions", "attn"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("quantize.embedding", "quantize.embed"),
        ):
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def image_vae():
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()


def convert(family, src, dst, *more):
    return main([family, "--src", str(src), "--dst", str(dst), *more])


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@torch.no_grad()
def test_a_compvis_sd_vae_becomes_the_same_diffusers_vae(tmp_path, prefix):
    plain = image_vae()
    state = {prefix + key: value for key, value in to_compvis(plain.state_dict()).items()}
    assert prefix + "encoder.mid.attn_1.q.weight" in state
    state["model.other" if prefix else "loss.logvar"] = torch.zeros(1)
    torch.save({"state_dict": state, "global_step": 840000}, tmp_path / "vae.ckpt")
    convert("sd-vae", tmp_path / "vae.ckpt", tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    frames = clip()[0].transpose(0, 1)
    opened = AutoencoderKL.from_pretrained(tmp_path / "out")
    assert torch.equal(opened(frames).sample, plain(frames).sample)
    assert opened.config.scaling_factor == 0.18215
    assert load_vae("sd2_1", path=tmp_path / "out")(clip()).sample.shape == (1, 3, 5, 32, 32)


@torch.no_grad()
def test_a_taming_checkpoint_with_stored_callbacks_converts_and_runs_none_of_them(tmp_path, golden, caplog):
    rows = json.loads((golden / "zoo_vqgan_gumbel.json").read_text())["state_dict"]
    state = {key: draw(key, row["shape"]) for key, row in rows.items()}
    state["loss.discriminator.main.0.weight"] = torch.zeros(4)
    content = {"state_dict": state, "callbacks": {Callback: {"best": Callback(3)}}}
    torch.save(content, tmp_path / "last.ckpt")
    convert("vqgan", tmp_path / "last.ckpt", tmp_path / "out")
    assert "Callback" in caplog.text
    assert not Callback.touched
    model = load_vae("vqgan", path=tmp_path / "out")
    assert model.config.num_codes == 64
    assert torch.equal(model.quantize.embedding.weight, state["quantize.embed.weight"])
    q = state["encoder.down.3.attn.1.q.weight"]
    assert torch.equal(model.encoder.down_blocks[3].attentions[1].to_q.weight, q[:, :, 0, 0])


@pytest.mark.parametrize("norm_type", ["batch", "group"])
@torch.no_grad()
def test_a_tats_checkpoint_with_its_arguments_converts(tmp_path, norm_type):
    model = build_vae(
        "tats", hidden_channels=32, latent_channels=16, num_codes=64, norm_type=norm_type
    ).eval()
    state = {
        **model.state_dict(),
        "image_discriminator.model0.0.weight": torch.zeros(2),
        "perceptual_model.lin0.model.1.weight": torch.zeros(2),
    }
    arguments = argparse.Namespace(downsample=[4, 8, 8], n_hiddens=32)
    torch.save({"state_dict": state, "hyper_parameters": {"args": arguments}}, tmp_path / "tats.ckpt")
    convert("tats", tmp_path, tmp_path / "out")  # the only weight file of a folder is found
    loaded = load_vae(tmp_path / "out")
    assert loaded.config.norm_type == norm_type
    assert list(loaded.config.downsample) == [4, 8, 8]
    x = clip(8)
    assert torch.equal(loaded(x).sample, model(x).sample)
    arguments.padding_type = "reflect"
    torch.save({"state_dict": state, "hyper_parameters": {"args": arguments}}, tmp_path / "tats.ckpt")
    with pytest.raises(ValueError, match="padding_type='reflect', TATSVQGAN pads with 'replicate'"):
        convert("tats", tmp_path / "tats.ckpt", tmp_path / "other")


@torch.no_grad()
def test_a_cvvae_folder_keeps_its_config(tmp_path):
    model = build_vae("cvvae", block_out_channels=WIDTHS).eval()
    source = tmp_path / "vae3d"
    source.mkdir()
    save_file(model.state_dict(), source / "diffusion_pytorch_model.safetensors")
    upstream = {
        "_class_name": "CVVAEModel",
        "en_de_n_frames_a_time": 8,
        "tile_spatial_size": None,
        "half_3d": True,
    }
    (source / "config.json").write_text(json.dumps(upstream))
    convert("cvvae", source, tmp_path / "out")
    loaded = load_vae("cvvae", path=tmp_path / "out")
    assert (loaded.config.frames_at_a_time, loaded.config.tile_spatial_size) == (8, None)
    x = clip()
    assert torch.equal(loaded(x).sample, model(x).sample)
    (source / "config.json").write_text(json.dumps({**upstream, "causal_decoder": True}))
    with pytest.raises(ValueError, match="causal_decoder=True"):
        convert("cvvae", source, tmp_path / "other")


@torch.no_grad()
def test_an_open_sora_file_keeps_its_shift_and_scale(tmp_path):
    model = build_vae(
        "ops",
        spatial_block_out_channels=WIDTHS,
        spatial_layers_per_block=1,
        filters=32,
        channel_multipliers=(1, 2),
        temporal_downsample=(True,),
        num_res_blocks=1,
    ).eval()
    state = model.state_dict()
    state["shift"] = torch.tensor([0.5, 1.0, 1.5, 2.0]).view(1, 4, 1, 1, 1)
    state["scale"] = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1, 1)
    save_file(state, tmp_path / "model.safetensors")
    convert("ops", tmp_path / "model.safetensors", tmp_path / "out")
    loaded = load_vae("ops", path=tmp_path / "out")
    assert loaded.config.latents_mean == [0.5, 1.0, 1.5, 2.0]
    assert loaded.config.latents_std == [1.0, 2.0, 4.0, 8.0]
    assert loaded.temporal_compression_ratio == 2
    x = clip()
    assert torch.equal(loaded(x).sample, model(x).sample)


@pytest.mark.parametrize("family", ["sd-vae", "vqgan", "tats", "cvvae", "ops"])
def test_missing_extra_and_misshapen_keys_are_listed_and_nothing_is_written(family, tmp_path, capsys, golden):
    if family == "sd-vae":
        state, key = to_compvis(image_vae().state_dict()), "decoder.norm_out.bias"
    elif family == "vqgan":
        rows = json.loads((golden / "zoo_vqgan_gumbel.json").read_text())["state_dict"]
        state, key = {k: draw(k, row["shape"]) for k, row in rows.items()}, "decoder.norm_out.bias"
    else:
        upstream = json.loads((golden / f"zoo_fullkeys_{family}.json").read_text())
        # every shape is kept, the storage is one number: a full-size model is checked without its memory
        with torch.device("meta"):
            state = {k: torch.empty(shape) for k, shape in upstream.items()}
        key = {"tats": "decoder.final_block.0.bias", "cvvae": "decoder.norm_out.bias"}.get(
            family, "temporal_vae.decoder.norm1.bias"
        )
        if family == "ops":
            state |= {"shift": torch.zeros(1, 4, 1, 1, 1), "scale": torch.ones(1, 4, 1, 1, 1)}
    moved = key.removesuffix("bias") + "weight"
    state["decoder.surprise"] = state.pop(key)
    state[moved] = state[moved][:1].clone()
    file = tmp_path / "weights.ckpt"
    torch.save(state, file)
    with pytest.raises(SystemExit) as stop:
        run(lambda: convert(family, file, tmp_path / "out"))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "1 missing: " in text
    assert "1 extra: decoder.surprise" in text
    assert "1 wrong shapes: " in text
    assert "(1,) instead of (" in text
    assert [f.name for f in tmp_path.iterdir()] == ["weights.ckpt"]


def test_a_file_of_something_else_is_refused_by_name_of_the_first_key_it_lacks(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    for family in ("sd-vae", "vqgan", "tats", "cvvae", "ops"):
        with pytest.raises(ValueError, match=r"no key '.+'; it has 1 keys, e\.g\. a"):
            convert(family, tmp_path / "a.safetensors", tmp_path / "out")
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="damaged safetensors"):
        convert("ops", tmp_path / "a.safetensors", tmp_path / "out")
    (tmp_path / "b.ckpt").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="b.ckpt: damaged, or not a plain weight file"):
        convert("ops", tmp_path / "b.ckpt", tmp_path / "out")
    with pytest.raises(ValueError, match="no such file or folder"):
        convert("ops", tmp_path / "c", tmp_path / "out")
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="no weight file"):
        convert("ops", tmp_path / "two", tmp_path / "out")
    for name in "ab":
        save_file({"a": torch.zeros(1)}, tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several weight files"):
        convert("ops", tmp_path / "two", tmp_path / "out")


# The keys from which each reader takes its sizes.
SIZES = {
    "sd-vae": "encoder.down.0.block.0.conv1.weight encoder.conv_in.weight decoder.conv_out.weight post_quant_conv.weight",
    "vqgan": "encoder.down.0.block.0.conv1.weight encoder.conv_in.weight decoder.conv_out.weight post_quant_conv.weight "
    "quantize.embed.weight",
    "tats": "encoder.conv_blocks.0.x codebook.embeddings encoder.conv_first.conv.weight decoder.conv_last.conv.weight",
    "cvvae": "encoder.down.0.block.0.conv1.weight encoder.conv_in.weight decoder.conv_out.weight decoder.conv_in.weight",
    "ops": "temporal_vae.encoder.block_res_blocks.0.0.conv1.conv.weight temporal_vae.post_quant_conv.conv.weight shift scale "
    "spatial_vae.module.encoder.down_blocks.0.resnets.0.conv1.weight spatial_vae.module.encoder.conv_in.weight "
    "spatial_vae.module.decoder.conv_out.weight temporal_vae.encoder.conv_in.conv.weight",
    "open-sora-plan": "a",
    "latte": "x_embedder.proj.weight blocks.0.mlp.fc1.weight final_layer.linear.weight pos_embed temp_embed",
    "i3d": "conv3d_1a_7x7.conv3d.weight",
    "c3d": "conv1a/W",
}


def odd_contents(family):
    """Files that torch or JSON can write and no converter can use."""
    keys = SIZES[family].split()
    for shape in ((), (1,), (4, 4), (0, 0, 0, 0), (1, 0, 2, 3, 3)):
        yield {key: torch.zeros(shape) for key in keys}
    whole = {key: torch.zeros(4, 4, 3, 3, 3) for key in keys}
    yield {key.replace(".0.", f".{10**20}."): value for key, value in whole.items()}
    yield {key: torch.eye(4).to_sparse() for key in keys}
    for arguments in ({"args": 5}, [1], "abc", {"downsample": 3}):
        yield {"state_dict": whole, "hyper_parameters": arguments}
    yield from (torch.zeros(3), [1], {1: torch.zeros(2)}, {"state_dict": {(1, 2): torch.zeros(2)}}, {}, None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", SIZES)
def test_any_other_file_is_one_line(family, tmp_path, capsys):
    def refused(*more):
        with pytest.raises(SystemExit) as stop:
            run(lambda: convert(family, source, tmp_path / "out", *more))
        text = capsys.readouterr().err
        assert stop.value.code == 2, text
        assert text.count("\n") == 1
        assert str(tmp_path) in text
        assert sorted(p.name for p in tmp_path.iterdir()) == [source.name]

    source = tmp_path / "a.ckpt"
    for content in odd_contents(family):
        torch.save(content, source)
        refused()
    for data in (b"", b"hello\n", b"abc", b"PK\3\4junk", b"\x80\2}q\0.", b"\x80\4N."):
        source.write_bytes(data)
        refused()
    source.unlink()
    source = tmp_path / "folder"
    source.mkdir()
    torch.save({key: torch.zeros(4, 4, 3, 3, 3) for key in SIZES[family].split()}, source / "a.ckpt")
    for text in (
        "[",
        "[" * 100_000,
        "3",
        '{"hidden_size": "a"}',
        '{"tile_overlap_ratio": [], "frames_at_a_time": "x"}',
    ):
        (source / "config.json").write_text(text)
        refused(*(["--export"] if family in ("latte", "open-sora-plan") else []))
        refused()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("field", ["hidden_size", "hidden_size_mult", "num_res_blocks", "z_channels"])
def test_odd_numbers_in_an_open_sora_plan_config_are_one_line(field, tmp_path):
    from vae import ODVAE
    from vae.release import config_to_upstream

    good = config_to_upstream(ODVAE.preset("osp_v1_2", block_out_channels=WIDTHS, layers_per_block=1))
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")

    def refusal(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as refused:  # noqa: PT011  # compared below
            convert("open-sora-plan", tmp_path, tmp_path / "out")
        return str(refused.value)

    of_the_weights = refusal(good)  # the config is right, the weights are not
    for value in ("a", None, 0, [4], {}):
        assert refusal({**good, field: value}) != of_the_weights


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Bomb()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="no key"):  # read, without the object
        convert("ops", tmp_path / "bad.ckpt", tmp_path / "out")
    assert not (tmp_path / "boom").exists()


def test_an_existing_result_is_never_overwritten(tmp_path):
    torch.save(to_compvis(image_vae().state_dict()), tmp_path / "vae.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert("sd-vae", tmp_path / "vae.ckpt", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    convert("sd-vae", tmp_path / "vae.ckpt", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, write):
    def save(target):
        (target / "half" if target.is_dir() else target).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "out", save)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_an_open_sora_plan_vae_exports_and_converts_back_to_the_same_model(tmp_path):
    from vae import ODVAE

    model = ODVAE.preset("osp_v1_2", block_out_channels=WIDTHS, layers_per_block=1).eval()
    model.save_pretrained(tmp_path / "ours")
    convert("open-sora-plan", tmp_path / "ours", tmp_path / "upstream", "--export")
    assert json.loads((tmp_path / "upstream" / "config.json").read_text())["_class_name"] == "CausalVAEModel"
    with pytest.raises(ValueError, match=r"convert\.py open-sora-plan"):
        load_vae(tmp_path / "upstream")
    convert("open-sora-plan", tmp_path / "upstream", tmp_path / "back")
    loaded = load_vae("odvae", path=tmp_path / "back")
    x = clip()
    assert torch.equal(loaded(x).sample, model(x).sample)


@torch.no_grad()
def test_latte_converts_and_exports_back_to_the_same_tensors(tmp_path):
    from denoiser import Latte
    from denoiser.release import save_release

    config = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "num_frames": 5,
        "sample_size": 8,
        "num_classes": 3,
    }
    model = Latte(patch_size=2, **config).eval()
    for key, parameter in model.named_parameters():
        parameter.copy_(draw(key, parameter.shape))
    save_release(model, tmp_path / "latte.pt")
    with pytest.raises(ValueError, match="num_heads"):
        convert("latte", tmp_path / "latte.pt", tmp_path / "ours")
    convert("latte", tmp_path / "latte.pt", tmp_path / "ours", "--num-heads", "2")
    loaded = Latte.from_pretrained(tmp_path / "ours")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    convert("latte", tmp_path / "latte.pt", tmp_path / "long", "--num-heads", "2", "--num-frames", "9")
    longer = Latte.from_pretrained(tmp_path / "long")
    assert longer.config.num_frames == 9
    assert torch.equal(longer.final_layer.linear.weight, model.final_layer.linear.weight)
    convert("latte", tmp_path / "ours", tmp_path / "back.pt", "--export")
    first, second = (
        torch.load(tmp_path / name, weights_only=True)["ema"] for name in ("latte.pt", "back.pt")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match=r"back\.pt exists"):
        convert("latte", tmp_path / "ours", tmp_path / "back.pt", "--export")


def test_i3d_converts_to_a_file_that_the_judge_opens(tmp_path):
    from eval.i3d import I3D
    from eval.weights import load_i3d

    network = I3D()
    torch.save(network.state_dict(), tmp_path / "i3d_pretrained_400.pt")
    convert("i3d", tmp_path / "i3d_pretrained_400.pt", tmp_path / "out")
    state = load_file(tmp_path / "out" / "i3d_pretrained_400.safetensors")
    assert state.keys() == network.state_dict().keys()
    loaded, _ = load_i3d(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in network.state_dict().items())


def test_wrong_options_are_refused(tmp_path):
    for argv, message in (
        (["vqgan", "--export"], "only open-sora-plan and latte"),
        (["vqgan", "--num-heads", "2"], "--num-heads belongs to"),
        (["latte", "--num-frames", "9", "--export"], "--num-frames belongs to"),
        (["latte", "--num-frames", "0"], "--num-frames 0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(argv[0], tmp_path, tmp_path / "out", *argv[1:])


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom scripts.convert import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert "open-sora-plan" in done.stdout
