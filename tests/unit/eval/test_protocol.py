"""Protocols are data: their names, their knobs, what they refuse."""

import pytest

from eval.protocol import (
    INCEPTION_PROTOCOLS,
    PROTOCOLS,
    InceptionProtocol,
    Protocol,
    named_protocol,
    parse_size,
)


def test_the_published_protocols_have_their_published_knobs():
    knobs = {
        n: (p.eps, p.resize, p.ddof, p.sampling, p.num_videos, p.num_frames) for n, p in PROTOCOLS.items()
    }
    assert knobs == {
        "omnilatte": (1e-5, "squash", 1, "videos", 2048, 16),
        "tats": (1e-5, "squash", 1, "clips", 2048, 16),
        "stylegan-v": (1e-3, "squash", 0, "videos", 2048, 16),
        "videogpt": (1e-5, "short", 1, "videos", 2048, 16),
    }
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
    splits = {name: (p.splits, p.shuffle_seed) for name, p in INCEPTION_PROTOCOLS.items()}
    assert splits == {"tgan2": (1, None), "stylegan-v": (10, 42)}
    for p in PROTOCOLS.values():
        others = p.position, p.clips_per_video, p.real_interval, p.fake_interval, p.size, p.seed
        assert others == ("random", 1, 1, 1, None, 0)
    for p in INCEPTION_PROTOCOLS.values():
        others = p.num_videos, p.sampling, p.position, p.clips_per_video, p.interval, p.size, p.seed
        assert others == (2048, "videos", "start", 1, 1, None, 0)


@pytest.mark.parametrize(
    "score",
    [
        "fvd2048_16f",
        "fvd256_81f",
        "fvd64_9f_step3",
        "fvd64_9f_step3_fakestep2",
        "fvd64_9f_8fps",
        "kvd64_9f_step2_23.976fps",
    ],
)
def test_a_scores_name_is_read_back_from_its_label(score):
    protocol = named_protocol(f"stylegan-v/{score}")
    assert protocol.label(score[:3]) == score
    assert (protocol.name, protocol.ddof, protocol.overrides()) == ("stylegan-v", 0, {})


def test_every_knob_can_be_changed_and_is_then_named():
    protocol = named_protocol("tats/fvd2048_16f", eps=1e-3, num_videos=64, ddof=None)
    assert (protocol.num_videos, protocol.eps, protocol.ddof) == (64, 1e-3, 1)
    assert protocol.overrides() == {"eps": 1e-3}
    assert protocol.title() == "tats with eps=0.001"
    assert protocol.as_dict()["overrides"] == {"eps": 1e-3}
    assert named_protocol("tats").title() == "tats"


@pytest.mark.parametrize(
    ("text", "message"),
    [("fid", "one of omnilatte, tats"), ("tats/fvd2048", "written like fvd2048_16f"), ("tats/", None)],
)
def test_a_name_that_is_no_protocol_is_refused(text, message):
    if message is None:
        assert named_protocol(text) == PROTOCOLS["tats"]
        return
    with pytest.raises(ValueError, match=message):
        named_protocol(text)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_frames": 8}, "9 to 256"),
        ({"num_frames": 257}, "9 to 256"),
        ({"num_videos": 1}, "at least 2"),
        ({"real_interval": 0}, "real_interval=0"),
        ({"seed": -1}, "seed=-1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"resize": "stretch"}, "one of squash, short"),
        ({"ddof": 2}, "one of 0, 1"),
        ({"sampling": "all"}, "one of videos, clips"),
        ({"clips_per_video": 2, "position": "start"}, "would be equal"),
        ({"clips_per_video": 2, "sampling": "clips"}, "would be equal"),
        ({"size": (0, 4)}, "height and width"),
    ],
)
def test_impossible_knobs_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**knobs)


def test_splits_are_part_of_the_name_and_at_most_the_number_of_videos():
    assert INCEPTION_PROTOCOLS["stylegan-v"].label() == "is2048_16f_splits10"
    assert InceptionProtocol(interval=3, num_videos=20).label() == "is20_16f_step3_splits1"
    with pytest.raises(ValueError, match="splits=5"):
        InceptionProtocol(num_videos=4, splits=5)


def test_sizes_are_squares_or_height_times_width():
    assert parse_size("256") == (256, 256)
    assert parse_size("144x176") == (144, 176)
    for text in ("", "x", "12x", "-3", "1x2x3"):
        with pytest.raises(ValueError, match="144x176"):
            parse_size(text)
