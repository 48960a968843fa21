"""What every VAE that can be named promises: saved, loaded, in a pipeline, exported, it makes the same videos.

Yours too: OMNILATTE_PLUGINS=my_parts python -m pytest tests/ecosystem/test_contract.py
"""

import os

import pytest
import torch

from data.core import registry
from pipelines.export import main
from pipelines.video_pipeline import LatentVideoPipeline
from tests.ecosystem.test_in_diffusers import OD, latte
from tests.parity.diffusers_small import SMALL
from tests.unit.vae.test_baselines import TINY
from vae import build_vae, list_vaes, load_vae
from vae.adapter import NAMES

registry.load_plugins(os.environ.get("OMNILATTE_PLUGINS", ""))
CONFIGS = {"odvae": OD, **TINY, **{name: row[1] for name, row in SMALL.items()}}


@pytest.mark.parametrize("name", [*list_vaes(), *NAMES, *registry.vaes])
def test_a_vae_makes_the_same_videos_saved_loaded_and_exported(name, tmp_path):
    torch.manual_seed(0)
    try:
        vae = build_vae(name, **CONFIGS.get(name, {})).eval()
    except ValueError as error:  # a class that the installed diffusers does not have
        if "has no such class" not in str(error):
            raise
        pytest.skip(f"not run: {error}")
    if not vae.has_scaling_rule:
        vae.set_latent_statistics([0.1] * vae.latent_channels, [0.9] * vae.latent_channels)
    T = next(n for n in range(1, 99) if accepts(vae, n) and vae.pixel_frames(vae.latent_frames(n)) == n)
    S = next(n for n in range(4 * vae.spatial_compression_ratio, 999) if accepts_side(vae, n))
    t, s = vae.latent_frames(T), S // vae.spatial_compression_ratio
    pipe = LatentVideoPipeline(
        vae, latte(in_channels=vae.latent_channels, num_frames=t, sample_size=s, patch_size=1)
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    if vae.discrete:
        with pytest.raises(ValueError, match="not a class of this project"):
            LatentVideoPipeline.from_pretrained(tmp_path / "pipeline")
        return
    call = {"class_labels": [1], "num_inference_steps": 2, "output_type": "video"}
    wanted = pipe(**call).frames
    assert wanted.shape == (1, 3, T, S, S)
    same(LatentVideoPipeline.from_pretrained(tmp_path / "pipeline")(**call).frames, wanted)
    assert main([str(tmp_path / "pipeline"), "--out", str(tmp_path / "share")]) == 0
    same(LatentVideoPipeline.from_pretrained(tmp_path / "share")(**call).frames, wanted)
    x = torch.rand(1, 3, T, S, S) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        for folder in ("pipeline", "share"):
            again = load_vae(tmp_path / folder / "vae")
            same(again.encode(x).latent_dist.mode(), z)
            same(again.normalize(z), vae.normalize(z))
        torch.testing.assert_close(vae.denormalize(vae.normalize(z)), z, atol=1e-4, rtol=1e-4)


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To rounding: where a file's tensors lie in memory decides on a CPU which kernels take them."""
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def accepts(vae, T: int) -> bool:
    try:
        vae.check_frames(T)
    except ValueError:
        return False
    return True


def accepts_side(vae, side: int) -> bool:
    try:
        vae.check_sides(side, side)
    except ValueError:
        return False
    return True
