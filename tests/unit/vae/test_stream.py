"""Streams equal the whole clip to the bit, need constant memory and do not disturb each other."""

import pytest
import torch

from tests.unit.vae import reference
from tests.unit.vae.tiny import LiveBytes, clip, moments, pieces, tiny

ENCODE_PLANS = ([13], [1, 4, 4, 4], [1] * 13, [5, 8], [9, 4], [2, 3, 7, 1], [3, 10])
DECODE_PLANS = ([4], [1, 1, 1, 1], [1, 3], [2, 2], [3, 1])


def streamed(model, x, plan):
    return torch.cat([p.parameters for p in model.stream_encode(pieces(x, plan))], dim=2)


def assert_streams_equal_the_clip(model, x):
    """All plans, to the bit; returns the moments of the clip x of 13 frames, its latents, and the frames decoded of them."""
    whole = moments(model, x)
    z = whole.chunk(2, dim=1)[0]
    frames = model.decode(z).sample
    assert all(torch.equal(streamed(model, x, plan), whole) for plan in ENCODE_PLANS)
    for plan in DECODE_PLANS:
        assert torch.equal(torch.cat(list(model.stream_decode(pieces(z, plan))), dim=2), frames)
    return whole, z, frames


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_streams_equal_the_whole_clip_to_the_bit_in_float64(variant):
    model, x = tiny(variant=variant), clip(13)
    with torch.no_grad():
        whole, z, frames = assert_streams_equal_the_clip(model, x)
        # The bits agree by construction; that they are right is measured against the plain network.
        torch.testing.assert_close(whole, reference.encode(model, x), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(frames, reference.decode(model, z), atol=1e-12, rtol=1e-12)


def test_streams_are_within_1e_5_of_the_plain_network_in_float32():
    model, x = tiny(dtype=torch.float32), clip(13, dtype=torch.float32)
    with torch.no_grad():
        want = reference.encode(model, x)
        z = want.chunk(2, dim=1)[0]
        got = streamed(model, x, [1, 4, 8])
        frames = torch.cat(list(model.stream_decode(pieces(z, [1, 3]))), dim=2)
        assert torch.equal(got, moments(model, x))
        assert (got - want).abs().max() < 1e-5
        assert (frames - reference.decode(model, z)).abs().max() < 1e-5


def test_first_frames_of_a_clip_encode_and_decode_as_the_clip_they_begin():
    model, x = tiny(), clip(13)
    with torch.no_grad():
        whole = moments(model, x)
        z = whole.chunk(2, dim=1)[0]
        frames = model.decode(z).sample
        for t in (1, 2, 3):
            T = 4 * (t - 1) + 1
            assert torch.equal(moments(model, x[:, :, :T]), whole[:, :, :t])
            assert torch.equal(model.decode(z[:, :, :t]).sample, frames[:, :, :T])


def test_two_interleaved_streams_do_not_disturb_each_other():
    model, a, b = tiny(), clip(9), clip(9)
    with torch.no_grad():
        streams = [model.stream_encode(pieces(x, [1, 4, 4])) for x in (a, b)]
        turns = [[next(s).parameters for s in streams] for _ in range(3)]
        for i, x in enumerate((a, b)):
            assert torch.equal(torch.cat([turn[i] for turn in turns], dim=2), moments(model, x))


def test_a_stream_leaves_its_input_alone_and_may_see_it_overwritten():
    model, x = tiny(), clip(5)
    buffer = torch.empty_like(x[:, :, :1])

    def one_buffer():
        for frame in x.split(1, dim=2):
            buffer.copy_(frame)
            yield buffer

    with torch.no_grad():
        got = torch.cat([p.parameters for p in model.stream_encode(one_buffer())], dim=2)
        assert torch.equal(got, moments(model, x))


def test_memory_of_a_stream_does_not_grow_with_the_clip():
    model = tiny(dtype=torch.float32)
    encode_peaks, decode_peaks = [], []
    for T in (17, 65):
        with torch.no_grad(), LiveBytes() as live:
            for _ in model.stream_encode(
                clip(4, 32, 32, dtype=torch.float32)[:, :, :n] for n in [1] + [4] * (T // 4)
            ):
                pass
        encode_peaks.append(live.peak)
        with torch.no_grad(), LiveBytes() as live:
            for _ in model.stream_decode(torch.randn(1, 4, 1, 4, 4) for _ in range(T // 4 + 1)):
                pass
        decode_peaks.append(live.peak)
    assert encode_peaks[1] < 1.02 * encode_peaks[0]
    assert decode_peaks[1] < 1.02 * decode_peaks[0]


def test_models_that_look_ahead_refuse_to_stream_and_say_why():
    for config, reason in (({"norm_scope": "clip"}, "norm_scope"), ({"temporal_up": "linear"}, "linear")):
        model = tiny(**config)
        with pytest.raises(ValueError, match=reason):
            next(model.stream_encode([clip(1)]))
        assert not model.causal
    model = tiny()
    model.enable_spatial_tiling(64)
    with pytest.raises(ValueError, match="disable_tiling"):
        next(model.stream_decode([torch.randn(1, 4, 1, 2, 3).double()]))


def test_pieces_that_do_not_belong_together_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="only the number of frames may differ"):
        list(model.stream_encode([clip(1), clip(4, 24, 24)]))
    with pytest.raises(ValueError, match="only the number of frames may differ"):
        list(model.stream_decode([torch.randn(B, 4, 1, 2, 3).double() for B in (1, 2)]))
    with pytest.raises(ValueError, match="video of dtype torch.float32, weights of torch.float64"):
        list(model.stream_encode([clip(1), clip(4, dtype=torch.float32)]))
    with pytest.raises(ValueError, match="latents of dtype torch.float32"):
        list(model.stream_decode([torch.randn(1, 4, 1, 2, 3)]))


def test_a_stream_that_ends_between_latent_frames_is_an_error():
    model = tiny()
    with pytest.raises(ValueError, match=r"T=7: ODVAE needs T = 4k \+ 1 frames, e.g. 9"):
        list(model.stream_encode(pieces(clip(7), [3, 4])))
