"""The inference path against the plain network (reference.py): CPU seconds and bytes, outputs equal within 1e-4.

`python -m pytest -s --slow tests/unit/vae/test_speed.py` prints the ratios that docs/results/vae-speed.md holds.
"""

import time

import pytest
import torch

from tests.unit.vae import reference
from tests.unit.vae.tiny import LiveBytes, clip, moments
from vae.odvae import ODVAE


@pytest.fixture(scope="module")
def model():
    return ODVAE(block_out_channels=(32, 64, 128, 128)).eval()


def paired(ours, plain, rounds=5) -> float:
    """How many times faster `ours` is: ratio of the best CPU seconds, the two taking turns."""
    seconds = {ours: [], plain: []}
    for _ in range(rounds):
        for fn in (plain, ours):
            start = time.process_time()
            fn()
            seconds[fn].append(time.process_time() - start)
    best = {fn: min(values[1:]) for fn, values in seconds.items()}
    ratio = best[plain] / best[ours]
    print(f"\nCPU seconds: plain {best[plain]:.2f}, ours {best[ours]:.2f}: {ratio:.2f} times faster")
    return ratio


def memory(ours, plain) -> float:
    """Share of the plain network's peak bytes that `ours` needs, beside the kernels that are prepared once a model."""
    peaks = []
    ours()
    for fn in (ours, plain):
        with LiveBytes() as live:
            fn()
        peaks.append(live.peak)
    print(
        f"\npeak MiB: plain {peaks[1] / 2**20:.1f}, ours {peaks[0] / 2**20:.1f}: {peaks[0] / peaks[1]:.2f} of it"
    )
    return peaks[0] / peaks[1]


@torch.no_grad()
def test_decoding_is_faster_than_the_plain_network(model):
    z = torch.randn(1, 4, 3, 12, 12)
    assert (model.decode(z).sample - reference.decode(model, z)).abs().max() < 1e-4
    # Measured 1.3 at this width and 1.35 to 1.65 at width 64; a loaded machine costs some of it.
    assert paired(lambda: model.decode(z), lambda: reference.decode(model, z)) > 1.1


@torch.no_grad()
def test_encoding_is_no_slower_than_the_plain_network(model):
    x = clip(9, 96, 96, dtype=torch.float32)
    assert (moments(model, x) - reference.encode(model, x)).abs().max() < 1e-4
    assert paired(lambda: model.encode(x), lambda: reference.encode(model, x)) > 0.95


@torch.no_grad()
def test_an_image_costs_less_than_half(model):
    x = clip(1, 128, 128, dtype=torch.float32)
    z = moments(model, x)[:, :4]
    assert paired(lambda: model.decode(z), lambda: reference.decode(model, z)) > 2


@torch.no_grad()
def test_decoding_a_whole_clip_needs_less_than_0_65_of_the_plain_networks_memory(model):
    z = torch.randn(1, 4, 5, 8, 8)  # 17 frames; the ratio falls with length
    assert memory(lambda: model.decode(z), lambda: reference.decode(model, z)) < 0.65


@torch.no_grad()
def test_a_streamed_encode_of_65_frames_needs_less_than_a_fifth_of_the_plain_networks_memory(model):
    x = clip(65, 32, 32, dtype=torch.float32)

    def stream():
        for _ in model.stream_encode(x.split(1, dim=2)):
            pass

    assert memory(stream, lambda: reference.encode(model, x)) < 0.2


@pytest.mark.slow
@torch.no_grad()
def test_at_half_width_decoding_is_a_quarter_faster_and_needs_less_than_0_65_of_the_memory():
    model = ODVAE(block_out_channels=(64, 128, 256, 256)).eval()
    z = torch.randn(1, 4, 5, 16, 16)
    assert (model.decode(z).sample - reference.decode(model, z)).abs().max() < 1e-4
    assert paired(lambda: model.decode(z), lambda: reference.decode(model, z), rounds=3) > 1.25
    assert memory(lambda: model.decode(z), lambda: reference.decode(model, z)) < 0.65


@pytest.mark.slow
@torch.no_grad()
def test_at_half_width_encoding_is_no_slower():
    model = ODVAE(block_out_channels=(64, 128, 256, 256)).eval()
    x = clip(17, 128, 128, dtype=torch.float32)
    assert (moments(model, x) - reference.encode(model, x)).abs().max() < 1e-4
    assert paired(lambda: model.encode(x), lambda: reference.encode(model, x), rounds=3) > 1
