"""Several sources as one stream: exact shares, each video once a pass, a pure function of (seed, n)."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clip import ClipSpec
from data.dataset import VideoClips
from data.loader import StepBatches, make_loader
from data.mixture import BLOCK, CYCLE, MixedClips, Shares, part_seed
from data.sources import open_source

SPEC = ClipSpec(num_frames=5, size=16, flip=True)
VIDEOS = {"a": 9, "b": 4, "c": 3}


def mixed(weights=None, seed=3, train=True, names="abc"):
    parts = {}
    for name in names:
        options = {"num_videos": VIDEOS[name], "size": 16, "num_frames": 20, "seed": ord(name)}
        parts[name] = VideoClips(open_source("demo", **options), SPEC, part_seed(seed, name), train)
    return MixedClips(parts, weights, seed, train)


def same(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("video", "label", "index", "number", "part"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 2**32), st.integers(0, 10**9))
def test_after_every_block_each_source_had_its_share_to_within_one_sample(weights, seed, start):
    shares = Shares(weights, seed)
    assert sum(shares.counts) == CYCLE
    total = sum(weights)
    assert all(
        abs(c - w / total * CYCLE) < 1 + len(weights) for c, w in zip(shares.counts, weights, strict=True)
    )
    exact = [Fraction(count, CYCLE) for count in shares.counts]
    first = start // BLOCK * BLOCK  # anywhere in the stream, without what lies before it
    for n in range(first, first + 3 * BLOCK):
        s, k = shares[n]
        # k samples of s came among the n before this one
        assert abs(k - n * exact[s]) < (1 if n % BLOCK == 0 else 1 + BLOCK / 4)


def test_the_samples_of_each_source_are_numbered_without_gap_over_blocks_and_cycles():
    for begin in (0, CYCLE - 3 * BLOCK):
        shares = Shares([5, 2, 0.01], seed=1)
        seen = [shares[n] for n in range(begin, begin + 6 * BLOCK + 5)]
        for s in {s for s, _ in seen}:
            numbers = [k for source, k in seen if source == s]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert begin or numbers[0] == 0


def test_no_source_keeps_to_one_half_of_the_steps():
    shares = Shares([1, 1])
    even = Counter(shares[n][0] for n in range(0, 8 * BLOCK, 2))
    assert min(even.values()) > 0.4 * sum(even.values())
    other = Shares([1, 1], seed=1)
    assert [shares[n] for n in range(BLOCK)] != [other[n] for n in range(BLOCK)]


def test_a_mixture_without_weights_has_shares_like_the_numbers_of_videos():
    clips = mixed()
    seen = Counter(int(clips[n]["part"]) for n in range(BLOCK))
    assert [seen[s] for s in range(3)] == [
        pytest.approx(BLOCK * count / 16, abs=1) for count in VIDEOS.values()
    ]
    assert len(clips) == 16


def test_each_pass_of_a_source_takes_each_of_its_videos_once():
    clips = mixed([2, 3, 1])
    seen = {s: [] for s in range(3)}
    for n in range(120):
        sample = clips[n]
        seen[int(sample["part"])].append(int(sample["index"]))
    first = 0
    for s, count in enumerate(VIDEOS.values()):
        assert len(seen[s]) > 2 * count
        passes = [seen[s][at : at + count] for at in range(0, len(seen[s]) - count + 1, count)]
        assert all(sorted(p) == list(range(first, first + count)) for p in passes)
        assert passes[0] != passes[1]
        first += count


def test_a_sample_depends_on_seed_and_number_alone_and_names_its_video():
    clips = mixed([2, 1, 1])
    in_order = [clips[n] for n in range(30)]
    fresh = mixed([2, 1, 1])
    for n in reversed(range(30)):
        assert same(fresh[n], in_order[n])
        assert (int(in_order[n]["number"]), int(in_order[n]["label"])) == (n, -1)
        name, path = clips.name(int(in_order[n]["index"])).split("/")
        assert name == "abc"[int(in_order[n]["part"])]
        assert int(path) < VIDEOS[name]
    assert not all(same(mixed([2, 1, 1], seed=4)[n], in_order[n]) for n in range(30))


def test_a_further_source_leaves_the_clips_of_the_others_as_they_were():
    def stream(clips, name):
        part = clips.names.index(name)
        return [clips.parts[part][k]["video"] for k in range(12)]

    two, three = mixed(names="ab"), mixed()
    for name in "ab":
        pairs = zip(stream(two, name), stream(three, name), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_workers_and_resuming_do_not_change_the_samples():
    clips = mixed([2, 1, 1])
    runs = {}
    for start, workers in ((0, 0), (0, 2), (2, 1)):
        loader = make_loader(clips, StepBatches(start, 4, 2), workers)
        runs[start, workers] = list(itertools.islice(loader, 8 - 2 * start))
    assert all(same(a, b) for a, b in zip(runs[0, 0], runs[0, 2], strict=True))
    assert all(same(a, b) for a, b in zip(runs[0, 0][4:], runs[2, 1], strict=True))


def test_the_held_out_part_is_that_of_each_source_in_order():
    clips = mixed(train=False)
    assert [int(clips[n]["index"]) for n in range(18)] == [*range(16), 0, 1]
    assert [clips.name(n) for n in (0, 8, 9, 12, 13, 15)] == ["a/0", "a/8", "b/0", "b/3", "c/0", "c/2"]
    pixels = clips.clip_uint8(9, np.random.default_rng((part_seed(3, "b"), 0)))
    assert torch.equal(clips[9]["video"], torch.from_numpy(pixels))


def test_damaged_short_and_failed_videos_are_those_of_all_sources(tmp_path, scene, encode):
    parts = {}
    for name, lengths in (("a", (9, 3)), ("b", (9, 9))):
        for n, frames in enumerate(lengths):
            encode(tmp_path / name / f"{n}.avi", scene[:frames], "mpeg4")
        (tmp_path / name / "bad.avi").write_bytes(b"RIFF")
        parts[name] = VideoClips(open_source("folder", tmp_path / name, workers=1), SPEC, part_seed(0, name))
    clips = MixedClips(parts, [1, 1])
    assert [r.path.split("/")[-2:] for r in clips.source.damaged] == [["a", "bad.avi"], ["b", "bad.avi"]]
    assert ([v.name for v in clips.short], len(clips), clips.class_names) == (["1.avi"], 3, [])
    assert clips.videos[2].record.num_frames == 9
    (tmp_path / "b" / "0.avi").unlink()
    failed = [int(clips[n]["failed"]) for n in range(8)]
    assert sum(failed) > 0
    assert "no such file" in clips.failed["b/0.avi"]


def test_wrong_weights_say_what_to_do():
    for weights in ([], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match="one number above 0 a source"):
            Shares(weights)
    with pytest.raises(ValueError, match="2 weights for 3 sources"):
        mixed([1, 2])
    with pytest.raises(ValueError, match="two sources or more"):
        mixed(names="a")
