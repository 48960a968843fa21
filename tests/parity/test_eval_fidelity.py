"""PSNR, SSIM, LPIPS against common_metrics, Open-Sora-Plan v1.2 and WF-VAE on a real clip."""

import json
import zlib

import numpy as np
import pytest
import torch

from eval.fidelity import load_lpips, lpips_distance, psnr, ssim


@pytest.fixture
def pair(golden):
    with np.load(golden / "eval_recon.npz") as arrays:
        return arrays["pristine"], arrays["blur"], json.loads(str(arrays["results"]))


def test_psnr_equals_upstream_per_frame_and_on_average(pair):
    real, fake, expected = pair
    each = [psnr(real[n : n + 1], fake[n : n + 1]) for n in range(len(real))]
    np.testing.assert_allclose(each, expected["blur_common_psnr_per_frame"], atol=1e-4)
    assert psnr(real, fake) == pytest.approx(expected["blur_osp_psnr_mean"], abs=1e-4)
    assert psnr(real, fake) == pytest.approx(expected["blur_wfvae_psnr"], abs=1e-4)


def test_ssim_equals_upstream_per_frame_and_on_average(pair):
    real, fake, expected = pair
    each = [ssim(real[n : n + 1], fake[n : n + 1]) for n in range(len(real))]
    np.testing.assert_allclose(each, expected["blur_common_ssim_per_frame"], atol=1e-6)
    assert ssim(real, fake) == pytest.approx(expected["blur_osp_ssim_mean"], abs=1e-6)


def test_lpips_equals_upstream_with_rule_weights(pair, tmp_path):
    real, fake, expected = pair
    network, _ = load_lpips("random:0")
    state = {}
    for key, value in network.net.state_dict().items():
        name = f"features.{key.split('.', 1)[1]}"  # torchvision's
        z = np.random.default_rng(zlib.crc32(f"alex/net.{key}".encode())).standard_normal(tuple(value.shape))
        scale = np.sqrt(2 / np.prod(value.shape[1:])) if value.ndim == 4 else 0.05
        state[name] = torch.from_numpy(z.astype(np.float32) * np.float32(scale))
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({**state, "classifier.1.weight": torch.zeros(1)}, path)
    network, provenance = load_lpips(path)
    assert not provenance.known  # rule weights are not the published file
    assert lpips_distance(real, fake, network) == pytest.approx(
        np.mean(expected["blur_lpips_alex_ruleweights_per_frame"]), rel=1e-4
    )
    network, _ = load_lpips(tmp_path)  # the folder that holds it
    each = [lpips_distance(real[n : n + 1], fake[n : n + 1], network) for n in range(len(real))]
    np.testing.assert_allclose(each, expected["blur_lpips_alex_ruleweights_per_frame"], rtol=1e-4)
