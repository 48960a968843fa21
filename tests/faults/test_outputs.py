"""What a program writes goes to a place that is new, empty or its own; nothing of a user's is overwritten or filled."""

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest

from data.core.files import claim_file, claim_folder, is_json_object, machine, remove_leftovers
from data.demo import DemoVideos
from data.encode import write_mp4
from data.latent_writer import LatentCacheWriter
from eval.feature_cache import FeatureCache, cache_folder
from eval.records import append_record
from pipelines import cache_latents, reconstruct, sample, scores, stand_in, train_vae
from pipelines.training.checkpoints import Checkpoints, replace_folder
from pipelines.training.folder import ROOT


@pytest.fixture
def videos(tmp_path):
    scenes = DemoVideos(3, num_frames=9, size=32)
    for n in range(3):
        write_mp4(tmp_path / "videos" / f"{n:05d}.mp4", scenes.frames(n, range(9)), 8)
    return tmp_path / "videos"


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_taken_when_new_or_empty_or_marked_by_the_same_program(tmp_path):
    for name in ("new", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        for _ in range(2):
            claim_folder(tmp_path / name, "sample")
        with pytest.raises(ValueError, match="output of sample, not of reconstruct"):
            claim_folder(tmp_path / name, "reconstruct")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and not made by sample"):
        claim_folder(tmp_path / "mine", "sample")
    claim_folder(tmp_path / "mine", "sample", lambda folder: (folder / "thesis.txt").is_file())
    with pytest.raises(ValueError, match="a file"):
        claim_folder(tmp_path / "mine" / "thesis.txt", "sample")
    with pytest.raises(ValueError, match="holds something else"):
        claim_file(tmp_path / "mine" / "thesis.txt", is_json_object)


def test_reconstruct_writes_over_no_video_of_the_user(trained_vae, videos, tmp_path):
    settings = [f"vae.path={trained_vae}", f"source.root={videos}", f"source.index_dir={tmp_path / 'index'}"]
    settings += ["source.scan_workers=1", "clip.num_frames=9", "clip.size=16", "lpips=false", "num_videos=1"]
    before = content(videos)
    for out in (videos, videos / "out"):
        with pytest.raises(ValueError, match="lies inside the data|not empty"):
            reconstruct.main([*settings, f"out={out}"])
    other = shutil.copytree(videos, tmp_path / "other")
    with pytest.raises(ValueError, match="not empty and not made by reconstruct"):
        reconstruct.main([*settings, f"out={other}"])
    assert content(videos) == content(other) == before
    for _ in range(2):
        reconstruct.main([*settings, f"out={tmp_path / 'out'}"])
    (tmp_path / "out" / ".omnilatte.json").unlink()  # as folders of before have none
    reconstruct.main([*settings, f"out={tmp_path / 'out'}"])


def test_a_run_among_the_videos_is_refused(vae_settings, videos, tmp_path):
    settings = [word for word in vae_settings if not word.startswith("source.")]
    settings += [f"source.root={videos}", f"source.index_dir={tmp_path / 'index'}", "source.scan_workers=1"]
    with pytest.raises(ValueError, match="run_dir=.* lies inside the data"):
        train_vae.main([*settings, f"run_dir={videos / 'run'}", "source.val_fraction=0"])
    assert not (videos / "run").exists()


def test_a_report_replaces_reports_only(tmp_path):
    records = tmp_path / "scores.jsonl"
    row = {"metric": "FVD", "value": 1.0, "protocol": {}, "weights": {}, "versions": {}}
    records.write_text(json.dumps(row) + "\n")
    for name in (records, tmp_path / "notes.md"):
        if name != records:
            name.write_text("# My notes\n")
        before = name.read_text()
        with pytest.raises(ValueError, match="holds something else"):
            scores.main([str(records), "--format", "md", "--out", str(name)])
        assert name.read_text() == before
    for _ in range(2):
        scores.main([str(records), "--out", str(tmp_path / "report.md")])


def test_a_stand_in_is_replaced_unless_something_was_put_into_it(tmp_path):
    command = ["videos", "count=1", "size=16", "num_frames=2", "classes=1", "--out", str(tmp_path / "videos")]
    for _ in range(2):
        stand_in.main(command)
    mine = next((tmp_path / "videos").iterdir()) / "mine.mp4"
    mine.write_text("x")
    with pytest.raises(ValueError, match=r"mine\.mp4 was added and would be lost"):
        stand_in.main(command)
    assert mine.read_text() == "x"


def test_a_cache_fills_no_folder_of_other_things(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files and is not a cache"):
        LatentCacheWriter(tmp_path, {}, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "mine", ['{"path": "a.mp4"}\n', '{"name": "a", "cap": "a dog"}\n', '{"name": "a"}\n[1]\n', "a.mp4\n", ""]
)
def test_a_list_of_the_users_own_is_not_taken_for_the_names_of_a_cache(tmp_path, mine):
    file = tmp_path / "videos.jsonl"
    file.write_text(mine)
    with pytest.raises(ValueError, match="holds other files and is not a cache"):
        LatentCacheWriter(tmp_path, {}, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["videos.jsonl"]
    file.write_text('{"name": "a"}\n{"name": "b"}\n')  # as a cache writes it
    LatentCacheWriter(tmp_path, {}, 4)


def test_a_preview_of_the_users_own_stays_and_a_number_in_a_name_costs_no_memory(
    latte_settings, own_vae, tmp_path, caplog
):
    from pipelines import train_latte

    common = [*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"]
    cache_latents.main(common)
    train_latte.main([*common, f"run_dir={tmp_path / 'run'}", "steps=1"])
    settings = [f"pipeline={tmp_path / 'run/pipeline'}", f"out={tmp_path / 'out'}", "num_steps=2", "batch=2"]
    (tmp_path / "out-preview.mp4").write_text("my film")
    sample.main([*settings, "num_videos=1"])
    assert (tmp_path / "out-preview.mp4").read_text() == "my film"
    assert "left as it is" in caplog.text
    (tmp_path / "out-preview.mp4").unlink()
    sample.main([*settings, "num_videos=1"])
    first = (tmp_path / "out-preview.mp4").read_bytes()
    (tmp_path / "out" / "40000000000.mkv").write_bytes(b"x")
    sample.main([*settings, "num_videos=2"])  # ours is replaced
    assert (tmp_path / "out-preview.mp4").read_bytes() != first
    assert json.loads((tmp_path / "out/manifest.json").read_text())["num_videos"] == 2


def test_weights_have_the_mode_that_the_umask_leaves(trained_vae):
    run = trained_vae.parent
    files = [p for p in run.rglob("*") if p.suffix in (".safetensors", ".json", ".pt")]
    assert any(p.suffix == ".safetensors" for p in files)
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}


def test_leftovers_of_another_container_stay_for_a_week(tmp_path):
    dead = 2**22 + 1
    ours, other, old = (
        tmp_path / f".x.tmp-{name}-{dead}" for name in (machine(), "node-00000000", "node-11111111")
    )
    for path in (ours, other, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    assert sorted(remove_leftovers(tmp_path)) == sorted([ours.name, old.name])
    assert other.exists()


def test_links_in_the_place_of_checkpoints_and_exports_are_taken_away_and_what_they_lead_to_stays(tmp_path):
    class Alone:
        is_main_process = True

        def wait_for_everyone(self):
            pass

    def fill(folder):
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text("x")

    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, fill, {}, Alone())
    elsewhere = tmp_path / "elsewhere"
    shutil.move(checkpoints.path(1), elsewhere)
    checkpoints.path(1).symlink_to(elsewhere)
    assert checkpoints.latest() == 1
    for step in (2, 3, 4):
        checkpoints.save(step, fill, {}, Alone())
    assert checkpoints.steps() == [3, 4]
    assert (elsewhere / "weights").read_text() == "x"
    (tmp_path / "vae").symlink_to(elsewhere)
    for _ in range(2):
        replace_folder(tmp_path / "vae", fill)
    assert (elsewhere / "COMPLETE").is_file()
    assert not (tmp_path / "vae").is_symlink()


def test_files_of_the_system_are_no_damage_and_an_unreadable_checkpoint_is_passed_over(
    tmp_path, monkeypatch, caplog
):
    class Alone:
        is_main_process = True

        def wait_for_everyone(self):
            pass

    def fill(folder):
        (folder / "weights").write_text("x")

    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, fill, {}, Alone())
        for junk in (".DS_Store", "._weights", "Thumbs.db"):
            (checkpoints.path(step) / junk).write_text("x")
    assert checkpoints.latest() == 2
    from pipelines.training import checkpoints as module

    def failing(path, real=module.sha256_of):
        if "step_00000002" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(module, "sha256_of", failing)
    assert checkpoints.latest() == 1
    assert "cannot be read" in caplog.text

    def frozen(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "remove_tree", frozen)
    for step in (3, 4):
        checkpoints.save(step, fill, {}, Alone())
    assert {3, 4} <= set(checkpoints.steps())


@pytest.mark.parametrize("place", [10, 200, -40, -1])
def test_a_cached_feature_that_changed_is_computed_again(tmp_path, place, caplog):
    cache = FeatureCache(tmp_path, {"a": 1})
    features = np.arange(64, dtype=np.float32).reshape(8, 8)
    cache.finish(features, 8)
    assert np.array_equal(cache.load(8, 8)[0], features)
    data = bytearray(cache.whole.read_bytes())
    data[place] ^= 1
    cache.whole.write_bytes(data)
    assert not cache.load(8, 8)
    assert "computed again" in caplog.text
    np.save(cache.whole, features)  # as files of before are
    assert np.array_equal(cache.load(8, 8)[0], features)


def test_what_a_killed_judge_left_in_the_cache_goes_and_its_features_stay(tmp_path):
    code = """
import os, signal, sys
import numpy as np
from eval.feature_cache import FeatureCache
cache = FeatureCache(sys.argv[1], {"a": 1})
cache.store(0, np.ones((4, 8), np.float32))
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cache.store(4, np.ones((4, 8), np.float32))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, check=False, cwd=ROOT).returncode == -signal.SIGKILL
    folder = tmp_path / "features"
    (half,) = folder.glob(".*.tmp-*")
    in_use = half.with_name(half.name.rpartition("-")[0] + f"-{os.getppid()}")  # of a judge that still runs
    in_use.write_bytes(half.read_bytes())
    (folder / ".mine.tmp").write_text("x")
    cache = FeatureCache(tmp_path, {"a": 1})
    assert {p.name for p in folder.glob(".*")} == {in_use.name, ".mine.tmp"}
    assert list(cache.load(8, 4)) == [0]


GARBAGE = ["", "{", "[1, 2]", "3", "null", '"x"', "\u0000", "a: [", "- 1\n- 2", "[" * 5000]


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "vae/export.json"])
def test_garbage_in_a_file_of_a_run_is_one_line_or_mended(vae_settings, trained_vae, tmp_path, name):
    run = shutil.copytree(trained_vae.parent, tmp_path / "run")
    settings = [
        *vae_settings,
        f"run_dir={run}",
        f"source.index_dir={trained_vae.parents[1] / 'index'}",
        "steps=4",
    ]
    for text in GARBAGE:
        (run / name).write_text(text)
        if name == "vae/export.json":
            train_vae.main(settings)
            assert json.loads((run / name).read_text())["step"] == 4
        else:
            with pytest.raises(ValueError, match=name):
                train_vae.main(settings)
            assert (run / name).read_text() == text


def test_weights_missing_in_the_export_of_a_finished_run_are_written_again(
    vae_settings, trained_vae, tmp_path
):
    run = shutil.copytree(trained_vae.parent, tmp_path / "run")
    settings = [
        *vae_settings,
        f"run_dir={run}",
        f"source.index_dir={trained_vae.parents[1] / 'index'}",
        "steps=4",
    ]
    file = run / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(whole[:100])):
        damage()
        train_vae.main(settings)
        assert file.read_bytes() == whole


def test_a_shard_that_changes_while_it_is_in_use_is_named_and_ends_no_process(
    latte_settings, own_vae, tmp_path
):
    from data.latents import LatentCache

    cache_latents.main([*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"])
    cache = LatentCache(tmp_path / "cache")
    assert cache[0]["video"] == 0
    shard = tmp_path / "cache" / "latents-00000.safetensors"
    whole = shard.read_bytes()
    with open(shard, "r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(ValueError, match=r"latents-00000.safetensors: row .* has changed"):
        cache[0]
    changed = bytearray(whole)
    changed[-40:] = bytes(40)
    shard.write_bytes(changed)
    with pytest.raises(ValueError, match="has changed"):
        [cache[n] for n in range(6)]


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (errno.ENOLCK, OSError, "its file system has no locks .*Lustre: -o flock"),
        (errno.ENOSYS, ValueError, "another process is training here; .*remove .*run/.lock"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_a_file_system_without_flock_is_named_and_a_lock_left_by_a_lost_machine_too(
    number, error, said, vae_settings, tmp_path, monkeypatch
):
    import fcntl

    from filelock import FileLock

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = tmp_path / "run"
    run.mkdir()
    with contextlib.ExitStack() as stack:
        if number == errno.ENOSYS:  # filelock writes its owner into a file then
            stack.enter_context(FileLock(run / ".lock", is_singleton=False))
        with pytest.raises(error, match=said):
            train_vae.main([*vae_settings, f"run_dir={run}", "steps=1"])
    assert not list(run.glob("checkpoints"))


def test_a_second_start_in_the_folder_of_a_running_training_changes_nothing_there(
    vae_settings, trained_vae, tmp_path
):
    from filelock import FileLock

    run = shutil.copytree(trained_vae.parent, tmp_path / "run")
    settings = [*vae_settings, f"run_dir={run}", f"source.index_dir={trained_vae.parents[1] / 'index'}"]
    lock = FileLock(run / ".lock")
    lock.acquire()
    before = content(run)
    with pytest.raises(ValueError, match="another process is training here"):
        train_vae.main([*settings, "steps=77"])
    assert content(run) == before
    lock.release()


@pytest.mark.parametrize("place", ["/proc/omnilatte", "/dev/null/cache"])
def test_a_place_of_the_judges_cache_that_cannot_be_written_is_named_with_the_way_out(place):
    with pytest.raises(ValueError, match="cannot be written .*--cache-dir, or --no-cache"):
        cache_folder(place)


def test_a_run_folder_that_is_moved_while_it_trains_gets_no_second_half(vae_settings, tmp_path, monkeypatch):
    from pipelines import train_vae

    original = train_vae.VAETrainer.train_step

    def moved(self, batches):
        original(self, batches)
        if self.step == 2:
            (tmp_path / "run").rename(tmp_path / "moved")

    monkeypatch.setattr(train_vae.VAETrainer, "train_step", moved)
    settings = [
        *vae_settings,
        f"run_dir={tmp_path / 'run'}",
        "save_every=1",
        "steps=3",
        "loss.gan_weight=0",
        "val_every=99",
    ]
    with pytest.raises(OSError, match="moved or replaced since the start"):
        train_vae.main(settings)
    assert Checkpoints(tmp_path / "moved").steps() == [1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_record_after_a_half_written_one_is_a_line_of_its_own_and_a_short_write_is_taken_back(
    tmp_path, monkeypatch
):
    file, record = tmp_path / "scores.jsonl", {"metric": "FVD", "value": 1.5}
    half = '{"metric": "FVD", "val'  # of a judge that was killed, or of another program
    file.write_text(half)
    append_record(file, record)
    lines = file.read_text().splitlines()
    assert lines[0] == half
    assert json.loads(lines[1])["value"] == 1.5
    before, write = file.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))  # a full disk does so
    with pytest.raises(OSError, match="7 of .* bytes written"):
        append_record(file, record)
    assert file.read_bytes() == before
