"""I3D: both implementations agree, the frame rule holds, random weights keep the scale."""

import numpy as np
import pytest
import torch

from data.core import convolution, winograd
from eval.features import extract_features, i3d_extractor
from eval.i3d import head, max_pool_same, to_i3d_input
from eval.i3d_fast import FastI3D, max_pool_separable
from eval.weights import load_i3d


@pytest.fixture(scope="module")
def extractor():
    return i3d_extractor("random:0", "cpu")


def clips(n=2, T=9, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, T, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(5, 12, 13), (4, 9, 8), (1, 7, 7), (2, 1, 3)])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
def test_max_pool_axis_by_axis_equals_the_cubic_window(shape, kernel, stride):
    x = torch.randn(2, 3, *shape).relu()
    assert torch.equal(max_pool_separable(x, kernel, stride), max_pool_same(x, kernel, stride))


@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("T", [9, 12])
def test_the_fast_network_equals_the_plain_one(T, threads, monkeypatch):
    convolve, taken = winograd.convolve_3x3, []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(
        winograd,
        "convolve_3x3",
        lambda conv, *rest, **more: taken.append(conv) or convolve(conv, *rest, **more),
    )
    network, _ = load_i3d("random:1", eps=1e-3)
    for module in network.modules():  # batch norms that do something
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.1)
    x = torch.stack([to_i3d_input(torch.from_numpy(clip)) for clip in clips(1, T)])
    made = FastI3D(network)
    two = torch.cat([x, x.flip(3)])
    with torch.inference_mode():
        plain, once = network(two), made(x)
        taken.clear()
        again, both = made(x), made(two)
    assert torch.equal(once, again)
    for fast in (again, both):
        assert (plain[: len(fast)] - fast).abs().max() < 1e-5 * plain.abs().max()
    if convolution.ONEDNN and winograd.X86:
        assert len(taken) == (
            22 if threads == 1 else 0
        )  # 11 of 19, twice; with many threads the direct convolution


def test_random_weights_are_a_function_of_the_seed_and_give_features_of_order_one(extractor):
    features = extract_features(clips(), extractor)
    assert features.shape == (2, 400)
    assert features.dtype == np.float32
    assert 0.1 < features.std() < 10
    assert np.abs(features[0] - features[1]).max() > 1e-3  # different clips, different features
    again = extract_features(clips(), i3d_extractor("random:0", "cpu"))
    np.testing.assert_array_equal(features, again)
    assert np.abs(features - extract_features(clips(), i3d_extractor("random:1", "cpu"))).max() > 0.1


def test_features_do_not_depend_on_the_batch_size(extractor):
    videos = clips(3)
    one = extract_features(iter(videos), extractor, batch_size=1)
    two = extract_features(list(videos), extractor, batch_size=2)
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max())


def test_fewer_than_nine_frames_are_refused(extractor):
    with pytest.raises(ValueError, match=r"T=8.*9"):
        extract_features(clips(T=8), extractor)


def test_clips_of_another_type_or_mixed_shapes_are_refused(extractor):
    with pytest.raises(ValueError, match="uint8"):
        extract_features(clips() / 255.0, extractor)
    with pytest.raises(ValueError, match="one shape"):
        extract_features([clips()[0], clips(side=40)[0]], extractor)
    with pytest.raises(ValueError, match="no clips"):
        extract_features([], extractor)


@torch.inference_mode()
def test_a_picture_of_another_size_is_refused_by_the_network(extractor):
    with pytest.raises(ValueError, match="224"):
        extractor.network(torch.zeros(1, 3, 9, 256, 256))


def test_short_side_resize_keeps_the_centre_of_a_wide_clip():
    clip = torch.zeros(9, 32, 64, 3, dtype=torch.uint8)
    clip[:, :, 16:48] = 255
    assert to_i3d_input(clip, "short")[..., 8:-8].min() > 0.9  # only the white middle is seen
    assert to_i3d_input(clip, "squash").min() == -1.0
    assert to_i3d_input(clip, "short").shape == (3, 9, 224, 224)
    tall = to_i3d_input(clip.transpose(1, 2), "short")
    torch.testing.assert_close(tall, to_i3d_input(clip, "short").transpose(2, 3), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_clip_of_repeated_time_has_the_logits_of_its_windows_mean(extractor):
    """25 frames are three windows of the last pooling; the head averages their logits."""
    features = torch.rand(1, 1024, 4, 7, 7)
    logits = extractor.network.logits
    windows = [head(logits, features[:, :, t : t + 2]) for t in range(3)]
    torch.testing.assert_close(head(logits, features), torch.stack(windows).mean(0), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
@pytest.mark.slow
def test_81_and_256_frames_are_taken(extractor):
    for frames in (81, 256):
        assert extract_features(clips(1, frames), extractor, 1).shape == (1, 400)
