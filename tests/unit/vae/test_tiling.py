"""Tiling: which frames and squares are worked on together, and how they are joined."""

import pytest
import torch

from tests.unit.vae.tiny import clip, four_tiles, moments, tiny
from vae.tiling import over_groups, over_tiles, temporal_groups, tile_starts


def test_groups_share_one_frame_and_cover_every_frame():
    assert temporal_groups(97, 33) == [(0, 33), (32, 65), (64, 97)]
    assert temporal_groups(1, 33) == [(0, 1)]
    for T in range(1, 140, 4):
        for size in (5, 9, 17, 33):
            groups = temporal_groups(T, size)
            assert [a for a, _ in groups[1:]] == [b - 1 for _, b in groups[:-1]]
            assert groups[0][0] == 0
            assert groups[-1][1] == T
            assert all((b - a - 1) % 4 == 0 and b - a <= size for a, b in groups)


def test_encoder_and_decoder_groups_have_the_same_boundaries():
    model = tiny()
    model.enable_tiling(9)
    for T in (9, 13, 25, 33):
        pixels, latents = temporal_groups(T, 9), temporal_groups(model.latent_frames(T), 3)
        assert [(a // 4, (b - 1) // 4 + 1) for a, b in pixels] == latents


@torch.no_grad()
@pytest.mark.parametrize("preset", ["odvae", "osp_v1_2"])
def test_tiled_groups_are_encoded_and_decoded_on_their_own(preset):
    model, x = tiny(preset), clip(17)
    parts = [moments(model, x[:, :, :9]), moments(model, x[:, :, 8:17])[:, :, 1:]]
    z = torch.randn(1, 4, 5, 2, 3).double()
    frames = [model.decode(z[:, :, :3]).sample, model.decode(z[:, :, 2:]).sample[:, :, 1:]]
    model.enable_tiling(9)
    torch.testing.assert_close(moments(model, x), torch.cat(parts, 2))
    torch.testing.assert_close(model.decode(z).sample, torch.cat(frames, 2))
    model.disable_tiling()
    assert not torch.allclose(moments(model, x), torch.cat(parts, 2))


@torch.no_grad()
def test_one_group_is_exact_and_decoding_groups_can_be_upstreams():
    model, x = tiny(), clip(17)
    whole = moments(model, x)
    z = whole[:, :4]
    frames = model.decode(z).sample
    model.enable_tiling(17)
    assert torch.equal(moments(model, x), whole)
    model.enable_tiling(9, num_latents=16)
    assert torch.equal(model.decode(z).sample, frames)
    assert not torch.equal(moments(model, x), whole)


def test_tiles_reach_the_edge_once():
    assert tile_starts(256, 256, 192) == [0]
    assert tile_starts(64, 256, 192) == [0]
    assert tile_starts(448, 256, 192) == [0, 192]
    assert tile_starts(449, 256, 192) == [0, 192, 384]
    for length in range(1, 80):
        starts = tile_starts(length, 16, 12)
        assert starts[-1] + 16 >= length
        assert all(s + 16 < length for s in starts[:-1])


def test_tiles_of_the_identity_give_back_the_picture():
    for H, W in ((8, 8), (17, 40), (31, 23)):
        x = torch.randn(1, 2, 3, H, W, dtype=torch.float64)
        y = over_tiles(torch.clone, x, 16, 12, 16, 12)
        torch.testing.assert_close(y, x, atol=1e-14, rtol=1e-13)


def test_overlaps_ramp_from_one_tile_to_the_next():
    values = iter((0.0, 1.0))
    row = over_tiles(lambda v: torch.full_like(v, next(values)), torch.zeros(1, 1, 1, 4, 12), 8, 4, 8, 4)[
        0, 0, 0, 0
    ]
    torch.testing.assert_close(row, torch.tensor([0.0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]))


@torch.no_grad()
def test_spatial_and_temporal_tiling_are_independent():
    model, long = tiny(), clip(13, 16, 16)
    whole = moments(model, long)
    model.enable_spatial_tiling(16)
    assert torch.equal(moments(model, long), whole)  # a long clip no larger than a tile is never split
    wide = clip(5, 16, 40)
    tiled = moments(model, wide)
    model.disable_tiling()
    assert tiled.shape == (1, 8, 2, 2, 5)
    assert not torch.equal(tiled, moments(model, wide))
    z = torch.randn(1, 4, 2, 2, 5).double()
    model.enable_spatial_tiling(16, overlap=0.5)
    model.enable_tiling(5)
    assert model.decode(z).sample.shape == (1, 3, 5, 16, 40)


@torch.no_grad()
def test_spatial_tiles_equal_the_whole_away_from_edges_when_nothing_crosses_them():
    x = torch.randn(1, 1, 1, 24, 40, dtype=torch.float64)
    shrink = lambda v: torch.nn.functional.avg_pool3d(v, (1, 8, 8))  # noqa: E731
    torch.testing.assert_close(over_tiles(shrink, x, 16, 8, 2, 1), shrink(x))


@torch.no_grad()
@pytest.mark.parametrize("preset", ["odvae", "osp_v1_2"])
def test_spatial_tiles_are_joined_as_upstream_joins_them(preset):
    model, x = tiny(preset), clip(5, 96, 96)
    z = torch.randn(1, 4, 2, 12, 12).double()
    want = four_tiles(lambda v: moments(model, v), x, 64, 48, 2)
    frames = four_tiles(lambda v: model.decode(v).sample, z, 8, 6, 16)
    model.enable_spatial_tiling(64, overlap=0.25)
    torch.testing.assert_close(moments(model, x), want)
    torch.testing.assert_close(model.decode(z).sample, frames)


def test_impossible_groups_and_tiles_are_refused():
    model = tiny()
    for call in (
        lambda: model.enable_tiling(32),
        lambda: model.enable_tiling(1),
        lambda: model.enable_tiling(33, num_latents=1),
        lambda: model.enable_spatial_tiling(100),
        lambda: model.enable_spatial_tiling(256, overlap=0.9),
        lambda: model.enable_spatial_tiling(8),
    ):
        with pytest.raises(ValueError, match=r"33|2 latents|size="):
            call()


def test_joining_drops_the_shared_frame_once():
    x = torch.arange(9.0).view(1, 1, 9, 1, 1)
    assert over_groups(lambda v: v, x, 4).flatten().tolist() == list(range(9))


def test_tiling_is_switched_as_in_other_vaes_of_diffusers():
    from tests.unit.vae.tiny import tiny

    vae = tiny()
    for on, off in (((True,), (False,)), ((), (33, None, False))):
        vae.enable_tiling(*on)
        assert vae.tiling_groups == (33, 9)
        vae.enable_tiling(*off)
        assert vae.tiling_groups is None
    vae.enable_tiling(use_tiling=False)
    assert vae.tiling_groups is None
