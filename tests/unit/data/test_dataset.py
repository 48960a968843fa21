"""The endless stream: a pure function of (seed, n), with files that fail replaced in a fixed way."""

import itertools

import numpy as np
import pytest
import torch

from data.clip import ClipSpec, to_float, to_uint8
from data.dataset import VideoClips
from data.loader import StepBatches, make_loader
from data.sources import open_source


@pytest.fixture
def demo():
    return open_source("demo", num_videos=7, num_classes=3, size=16, num_frames=20)


SPEC = ClipSpec(num_frames=5, size=16, flip=True)


def same(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("video", "label", "index"))


def test_a_sample_depends_on_seed_and_number_alone(demo):
    clips = VideoClips(demo, SPEC, seed=3)
    in_order = [clips[n] for n in range(20)]
    fresh = VideoClips(open_source("demo", num_videos=7, num_classes=3, size=16, num_frames=20), SPEC, seed=3)
    assert all(same(fresh[n], in_order[n]) for n in (19, 4, 0, 12))
    assert not all(same(a, VideoClips(demo, SPEC, seed=4)[n]) for n, a in enumerate(in_order))


def test_a_sample_has_the_shapes_and_ranges_models_take(demo):
    sample = VideoClips(demo, SPEC)[0]
    assert sample["video"].shape == (5, 16, 16, 3)
    assert sample["video"].dtype == torch.uint8
    model_input = to_float(sample["video"])
    assert model_input.shape == (3, 5, 16, 16)
    assert model_input.dtype == torch.float32
    assert model_input.abs().max() <= 1
    assert sample["label"].dtype == sample["index"].dtype == torch.int64
    assert sample["label"] == demo.videos[int(sample["index"])].label


def test_each_pass_sees_every_video_once_in_a_new_order(demo):
    clips = VideoClips(demo, SPEC, seed=1)
    passes = [[int(clips[n]["index"]) for n in range(7 * e, 7 * e + 7)] for e in range(4)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    judged = VideoClips(demo, SPEC, seed=1, train=False)
    assert [int(judged[n]["index"]) for n in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_clip_uint8_is_what_a_sample_holds(demo):
    clips = VideoClips(demo, SPEC, seed=5)
    sample = clips[11]
    pixels = clips.clip_uint8(int(sample["index"]), np.random.default_rng((5, 11)))
    assert np.array_equal(sample["video"].numpy(), pixels)
    assert np.array_equal(to_uint8(to_float(sample["video"])), pixels)


def test_short_videos_are_counted_and_listed(tmp_path, scene, encode):
    for name, length in (("a", 4), ("b", 9), ("c", 12)):
        encode(tmp_path / f"{name}.avi", scene[:length], "mpeg4")
    source = open_source("folder", tmp_path, workers=1)
    clips = VideoClips(source, ClipSpec(num_frames=9, size=16))
    assert ([v.name for v in clips.videos], [v.name for v in clips.short]) == (["b.avi", "c.avi"], ["a.avi"])
    loop = VideoClips(source, ClipSpec(num_frames=9, size=16, short="loop"))
    assert (len(loop), len(loop.short)) == (3, 0)
    with pytest.raises(ValueError, match=r"3 found, 0 damaged, 3 shorter than 13 frames, the longest 12"):
        VideoClips(source, ClipSpec(num_frames=13, size=16))


@pytest.fixture
def folder(tmp_path, scene, encode):
    for n in range(6):
        encode(tmp_path / f"{n}.avi", scene[n * 10 : n * 10 + 10], "mpeg4")
    return open_source("folder", tmp_path, workers=1), tmp_path


def test_a_file_that_fails_later_is_replaced_the_same_way_every_time(folder, caplog):
    source, root = folder
    spec = ClipSpec(num_frames=4, size=16)
    before = [VideoClips(source, spec, seed=2)[n] for n in range(12)]
    (root / "3.avi").unlink()
    (root / "4.avi").write_bytes(b"RIFF")
    clips = VideoClips(source, spec, seed=2)
    after = [clips[n] for n in range(12)]
    for old, new in zip(before, after, strict=True):
        if int(old["index"]) in (3, 4):
            assert int(new["index"]) not in (3, 4)
            assert new["failed"] > 0
        else:
            assert same(old, new)
            assert new["failed"] == 0
    again = VideoClips(source, spec, seed=2)
    assert all(same(after[n], again[n]) for n in (11, 5, 0, 7))
    assert sorted(clips.failed) == ["3.avi", "4.avi"]
    warned = [r for r in caplog.records if "the next video" in r.message]
    assert len(warned) == 2 + len(again.failed)  # once for each dataset and file


def test_training_stops_with_a_reason_when_nothing_can_be_read(folder):
    source, root = folder
    clips = VideoClips(source, ClipSpec(num_frames=4, size=16))
    for path in root.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"none of the 6 videos can be read.*no such file"):
        clips[0]


def test_workers_and_resuming_do_not_change_the_samples(demo):
    clips = VideoClips(demo, SPEC, seed=8)
    runs = {}
    for start, workers in ((0, 0), (0, 2), (2, 1)):
        loader = make_loader(clips, StepBatches(start, 4, 2), workers)
        runs[start, workers] = list(itertools.islice(loader, 8 - 2 * start))
        loader.close()
    assert all(same(a, b) for a, b in zip(runs[0, 0], runs[0, 2], strict=True))
    assert all(same(a, b) for a, b in zip(runs[0, 0][4:], runs[2, 1], strict=True))
    assert runs[0, 0][0]["video"].shape == (2, 5, 16, 16, 3)
