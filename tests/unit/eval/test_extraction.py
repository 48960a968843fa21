"""Features of selected clips: any number of processes, resumed, cached, with failing videos replaced."""

import multiprocessing
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.decoder import BadVideo
from eval.extraction import Ranks, RunOptions, extract_selected, judge_folder
from eval.feature_cache import FeatureCache, cache_folder
from eval.features import Extractor
from eval.selection import Selection
from eval.weights import Provenance

SIZE = (16, 16)


class Moments(torch.nn.Module):
    """A network whose features tell every clip apart."""

    calls = 0

    def forward(self, x):
        type(self).calls += len(x)
        flat = x.flatten(1)
        return torch.stack([flat.mean(1), flat.std(1), flat[:, 0], flat[:, -1]], dim=1)


@pytest.fixture
def extractor():
    Moments.calls = 0
    provenance = Provenance("moments", "none", "", False, 0)
    return Extractor(
        Moments(), lambda clip: clip.permute(3, 0, 1, 2).float(), provenance, torch.device("cpu")
    )


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for n in range(11):
        video = np.random.default_rng(n).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.save(root / f"{n}.npy", video)
    return root


class Threads:
    """Ranks that meet in memory: the same calls as over gloo."""

    def __init__(self, world: int):
        self.world, self.barrier, self.slots = world, threading.Barrier(world), [None] * world

    def rank(self, number: int) -> Ranks:
        meeting = self

        class Rank(Ranks):
            def all_gather(self, value):
                meeting.slots[self.rank] = value
                meeting.barrier.wait(30)
                values = list(meeting.slots)
                meeting.barrier.wait(30)
                return values

        return Rank(number, self.world)

    def run(self, fn) -> list:
        results = [None] * self.world

        def one(number):
            try:
                results[number] = fn(self.rank(number))
            except ValueError as error:
                results[number] = error

        threads = [threading.Thread(target=one, args=(n,)) for n in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


def judge(folder, extractor, ranks=None, num=10, **options):
    ranks = ranks or Ranks()
    selection = Selection(folder, 9) if ranks.main else None
    return judge_folder(selection, num, SIZE, extractor, RunOptions(ranks=ranks, workers=0, **options))


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_any_number_of_processes_gives_the_same_features_to_the_bit(folder, extractor, world, batch_size):
    alone = judge(folder, extractor, batch_size=batch_size)
    Moments.calls = 0
    together = Threads(world).run(lambda ranks: judge(folder, extractor, ranks, batch_size=batch_size))
    assert Moments.calls == 10  # each clip once, none for padding
    for judged in together:
        np.testing.assert_array_equal(judged.features, alone.features)
        np.testing.assert_array_equal(judged.groups, alone.groups)
        assert judged.summary == alone.summary


def test_an_error_in_one_process_is_raised_in_all(folder, extractor):
    results = Threads(3).run(lambda ranks: judge(folder, extractor, ranks, num=12))
    assert all(isinstance(r, ValueError) and "11 clips, 12 needed" in str(r) for r in results)

    def only_second(ranks):
        return ranks.everywhere(lambda: int("x" if ranks.rank == 1 else "1"))

    results = Threads(3).run(only_second)
    assert all(isinstance(r, ValueError) and "invalid literal" in str(r) for r in results)


def test_worker_processes_give_the_same_clips_in_the_same_order(folder, extractor):
    clips = Selection(folder, 9).take(11)
    here, _ = extract_selected(clips, SIZE, extractor, RunOptions(3, workers=0))
    there, _ = extract_selected(clips, SIZE, extractor, RunOptions(3, workers=2))
    np.testing.assert_array_equal(here, there)


def test_features_are_those_of_their_own_clip(folder, extractor):
    judged = judge(folder, extractor)
    for clip, feature in zip(Selection(folder, 9).take(10), judged.features, strict=True):
        pixels = np.load(clip.video.path)[list(clip.indices)]
        assert feature[2] == pixels[0, 0, 0, 0]
        assert feature[0] == pytest.approx(pixels.mean(), rel=1e-6)


def test_a_second_run_reads_the_cache_and_a_changed_file_or_setting_does_not(folder, extractor, tmp_path):
    cache = tmp_path / "cache"
    first = judge(folder, extractor, cache=cache)
    assert Moments.calls == 10
    np.testing.assert_array_equal(judge(folder, extractor, cache=cache).features, first.features)
    assert Moments.calls == 10
    judge(folder, replace(extractor, settings={"eps": 1e-3}), cache=cache)
    assert Moments.calls == 20
    used = Selection(folder, 9).take(10)[0].video.path
    np.save(used, np.load(used) // 2)
    changed = judge(folder, extractor, cache=cache)
    assert Moments.calls == 30
    assert np.abs(changed.features[0] - first.features[0]).max() > 1
    assert sorted(p.suffix for p in folder.iterdir()) == [".npy"] * 11  # nothing written among the videos
    assert not list(cache.rglob(".*tmp*"))


def test_an_interrupted_run_resumes_with_other_numbers_of_processes(folder, extractor, tmp_path):
    expected = judge(folder, extractor, batch_size=2).features

    class Interrupted(Moments):
        def forward(self, x):
            if self.calls >= 6:
                raise KeyboardInterrupt
            return super().forward(x)

    Moments.calls = Interrupted.calls = 0
    with pytest.raises(KeyboardInterrupt):
        judge(folder, replace(extractor, network=Interrupted()), batch_size=2, cache=tmp_path)
    Moments.calls = 0
    results = Threads(2).run(lambda ranks: judge(folder, extractor, ranks, batch_size=2, cache=tmp_path))
    assert Moments.calls == 4
    for judged in results:
        np.testing.assert_array_equal(judged.features, expected)


def test_two_runs_at_once_and_a_damaged_cache_are_harmless(folder, extractor, tmp_path):
    expected = judge(folder, extractor, batch_size=2).features

    def one():
        for _ in range(3):
            found = judge(folder, extractor, batch_size=2, cache=tmp_path).features
            np.testing.assert_array_equal(found, expected)

    processes = [multiprocessing.get_context("fork").Process(target=one) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    judge(folder, extractor, batch_size=2, cache=tmp_path)
    (whole,) = (path for path in (tmp_path / "features").glob("*.npy") if "-" not in path.name)
    whole.write_bytes(whole.read_bytes()[:-3])
    np.testing.assert_array_equal(judge(folder, extractor, batch_size=2, cache=tmp_path).features, expected)


def test_a_part_of_another_shape_is_not_used(tmp_path):
    cache = FeatureCache(tmp_path, {"a": 1})
    cache.store(0, np.ones((2, 4), np.float32))
    cache.store(2, np.ones((1, 4), np.float32))
    assert set(cache.load(4, 2)) == {0}
    assert cache.key != FeatureCache(tmp_path, {"a": 2}).key


def test_the_cache_never_lies_among_the_videos(folder):
    for place in (folder, folder / "deep" / "cache"):
        with pytest.raises(ValueError, match="choose a folder outside"):
            cache_folder(str(place), folder)
    assert cache_folder(str(folder.parent / "cache"), folder) == folder.parent / "cache"


@pytest.mark.parametrize("world", [1, 3])
def test_a_video_that_vanishes_after_the_choice_is_replaced_and_counted(
    folder, extractor, world, monkeypatch
):
    victim = Selection(folder, 9).take(10)[4].video

    def judge_without(ranks):
        selection = Selection(folder, 9) if ranks.main else None
        options = RunOptions(2, workers=0, ranks=ranks)
        return judge_folder(selection, 10, SIZE, extractor, options)

    from eval import extraction

    real_read = extraction.read_clip

    def read(video, *arguments):
        if video == victim:
            raise BadVideo("gone")
        return real_read(video, *arguments)

    monkeypatch.setattr(extraction, "read_clip", read)
    for judged in Threads(world).run(judge_without):
        assert judged.features.shape == (10, 4)
        assert judged.summary["damaged_reasons"] == {victim.name: "gone"}
        assert judged.summary["clips"] == 10


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        RunOptions(0)
    with pytest.raises(ValueError, match="workers=-1"):
        RunOptions(workers=-1)
    assert [RunOptions().batch_of(frames) for frames in (9, 16, 81, 256)] == [14, 8, 1, 1]


@pytest.mark.parametrize("what", ["weights", "size", "batch_size", "frames"])
def test_features_of_other_weights_sizes_batches_or_frames_are_not_the_cached_ones(
    what, folder, extractor, tmp_path
):
    def run(network, frames=9, size=SIZE, batch=2):
        options = RunOptions(batch, workers=0, cache=tmp_path / "cache")
        return judge_folder(Selection(folder, frames, position="start"), 10, size, network, options)

    run(extractor)
    assert Moments.calls == 10
    other = replace(extractor, provenance=Provenance("moments", "other.pt", "ab" * 32, True))
    run(
        other if what == "weights" else extractor,
        10 if what == "frames" else 9,
        (12, 12) if what == "size" else SIZE,
        5 if what == "batch_size" else 2,
    )
    assert Moments.calls == 20
