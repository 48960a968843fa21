"""PSNR and SSIM by their definitions; SSIM against scikit-image where it is installed."""

import numpy as np
import pytest
import torch

from eval.fidelity import load_lpips, lpips_distance, measure_pair, pair_videos, psnr, read_pair, ssim


def videos(T=3, H=40, W=52, noise=20):
    rng = np.random.default_rng(0)
    real = np.cumsum(rng.integers(-9, 10, (T, H, W, 3)), axis=2).clip(-128, 127) + 128
    fake = (real + rng.integers(-noise, noise + 1, real.shape)).clip(0, 255)
    return real.astype(np.uint8), fake.astype(np.uint8)


def test_psnr_of_a_known_error():
    real = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(real, real + 1) == pytest.approx(20 * np.log10(255), abs=1e-12)
    assert psnr(real, real) == 100.0


def test_psnr_is_the_mean_over_frames_and_not_of_the_pooled_error():
    real = np.zeros((2, 4, 4, 3), np.uint8)
    fake = np.stack([np.full((4, 4, 3), 1, np.uint8), np.full((4, 4, 3), 100, np.uint8)])
    assert psnr(real, fake) == pytest.approx((20 * np.log10(255) + 20 * np.log10(2.55)) / 2)


def test_ssim_equals_scikit_image_with_a_gaussian_window():
    metrics = pytest.importorskip("skimage.metrics")
    real, fake = videos()
    expected = [
        metrics.structural_similarity(
            a / 255.0,
            b / 255.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
        )
        for a, b in zip(real, fake, strict=True)
    ]
    assert ssim(real, fake) == pytest.approx(np.mean(expected), abs=1e-8)


def test_ssim_is_one_for_equal_videos_symmetric_and_falls_with_noise():
    real, fake = videos()
    assert ssim(real, real) == pytest.approx(1.0, abs=1e-12)
    assert ssim(real, fake) == pytest.approx(ssim(fake, real), abs=1e-12)
    assert ssim(real, videos(noise=5)[1]) > ssim(real, fake) > ssim(real, videos(noise=60)[1])


def test_order_of_frames_does_not_matter_but_pairing_does():
    real, fake = videos()
    assert psnr(real[::-1], fake[::-1]) == pytest.approx(psnr(real, fake), abs=1e-12)
    assert psnr(real[::-1], fake) < psnr(real, fake)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_is_no_pair_of_uint8_videos_is_refused(metric):
    real, fake = videos()
    with pytest.raises(ValueError, match="differ"):
        metric(real, fake[:2])
    with pytest.raises(ValueError, match="uint8"):
        metric(real / 255.0, fake / 255.0)
    with pytest.raises(ValueError, match="uint8"):
        metric(real.transpose(0, 3, 1, 2), fake.transpose(0, 3, 1, 2))


def test_frames_smaller_than_the_window_are_refused_by_ssim():
    real, fake = videos(H=10)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(real, fake)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30)])
def test_frames_that_leave_alexnet_nothing_are_refused_by_lpips_and_one_pixel_more_is_not(height, width):
    network, _ = load_lpips("random:0")
    with pytest.raises(ValueError, match=f"{height}x{width}: LPIPS's AlexNet needs at least 31 x 31"):
        lpips_distance(*videos(1, height, width), network)
    with pytest.raises(RuntimeError, match="too small"):  # what the network itself would say
        network(torch.zeros(1, 3, height, width), torch.zeros(1, 3, height, width))
    assert lpips_distance(*videos(1, max(31, height), max(31, width)), network) > 0


def test_pairs_are_made_by_name_and_a_video_without_partner_is_an_error(tmp_path):
    for name in ("real/a/0.npy", "real/b.npy", "fake/a/0.npy", "fake/b.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / name, np.zeros((2, 12, 12, 3), np.uint8))
    pairs = pair_videos(str(tmp_path / "real"), str(tmp_path / "fake"))
    assert [(r.name, f.name) for r, f in pairs] == [("a/0.npy", "a/0.npy"), ("b.npy", "b.npy")]
    (tmp_path / "fake/b.npy").unlink()
    with pytest.raises(ValueError, match=r"1 videos have no partner.*b\.npy"):
        pair_videos(str(tmp_path / "real"), str(tmp_path / "fake"))


def test_rows_of_two_array_files_are_pairs(tmp_path):
    for name in ("real.npy", "fake.npy"):
        np.save(tmp_path / name, np.zeros((3, 2, 12, 12, 3), np.uint8))
    pairs = pair_videos(str(tmp_path / "real.npy"), str(tmp_path / "fake.npy"))
    assert [(r.row, f.row) for r, f in pairs] == [(0, 0), (1, 1), (2, 2)]


def test_a_long_video_is_measured_in_blocks_as_in_one(tmp_path, monkeypatch):
    real, fake = videos(T=7)
    fake[-2:] = real[-2:]  # frames of very different error, so that their weights matter
    for name, pixels in (("real", real), ("fake", fake)):
        np.save(tmp_path / f"{name}.npy", pixels[None])
    (pair,) = pair_videos(str(tmp_path / "real.npy"), str(tmp_path / "fake.npy"))
    monkeypatch.setattr("eval.videos.BLOCK_BYTES", 3 * 3 * 40 * 52)
    assert [len(a) for a, _ in read_pair(pair, None, None)] == [3, 3, 1]
    assert [len(a) for a, _ in read_pair(pair, 5, None)] == [3, 2]
    found = {metric.name: value for metric, value in measure_pair(read_pair(pair, None, None)).items()}
    assert found == pytest.approx({"PSNR": psnr(real, fake), "SSIM": ssim(real, fake)}, abs=1e-9)
