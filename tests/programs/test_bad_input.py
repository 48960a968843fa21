"""A wrong input is one line on stderr and exit code 2, and nothing is left half-written."""

import shutil

import pytest

from data.core.cli import run
from pipelines import cache_latents, sample, train_latte, train_vae


@pytest.fixture
def fails(capfd, tmp_path, vae_settings):
    """Run a program that must end with exit code 2; returns its one line of error."""

    def go(main, *settings):
        common = [s for s in vae_settings if main is train_vae.main and not s.startswith("source.")]
        with pytest.raises(SystemExit) as stop:
            run(lambda: main([*common, *settings]))
        assert stop.value.code == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        return errors[0]

    return go


def train(fails, tmp_path, *settings):
    line = fails(
        train_vae.main, f"run_dir={tmp_path / 'run'}", f"source.index_dir={tmp_path / 'index'}", *settings
    )
    assert not (tmp_path / "run").exists()
    return line


def test_an_empty_folder(fails, tmp_path):
    (tmp_path / "videos").mkdir()
    assert "no videos in" in train(fails, tmp_path, f"source.root={tmp_path / 'videos'}")


def test_a_folder_that_is_not_there(fails, tmp_path):
    assert "is not a folder" in train(fails, tmp_path, f"source.root={tmp_path / 'nowhere'}")
    assert "give that of the videos: --data DIR" in train(fails, tmp_path)
    line = train(fails, tmp_path, f"source.root={tmp_path / 'mine.csv'}")
    assert f"say source.name=csv source.list_file={tmp_path / 'mine.csv'}" in line


def test_a_run_folder_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("notes")
    line = fails(train_vae.main, "source.name=demo", f"run_dir={tmp_path / 'file'}")
    assert line.endswith("file: a file; give the name of a folder")
    assert (tmp_path / "file").read_text() == "notes"


def test_a_changed_setting_is_told_before_the_videos_are_opened(fails, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("learning_rate: 7.0\n")
    line = fails(train_vae.main, f"run_dir={run}", f"source.root={tmp_path / 'nowhere'}")
    assert "holds a run with other settings" in line


def test_a_folder_of_damaged_videos_only(fails, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    (tmp_path / "videos" / "b.avi").write_text("no video")
    line = train(
        fails,
        tmp_path,
        f"source.root={tmp_path / 'videos'}",
        "source.val_fraction=0",
        "source.scan_workers=1",
    )
    assert "2 found, 2 damaged" in line
    listed = (tmp_path / "index" / "folder-quarantine.tsv").read_text()
    assert "a.mp4" in listed
    assert "b.avi" in listed
    assert (tmp_path / "videos" / "b.avi").read_text() == "no video"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clip.num_frames=10", "4k + 1 frames, e.g. 9"),
        ("clip.size=30", "clip.size=30: must be a multiple of 8, e.g. 32"),
        ("clip.short=pad", "short='pad': choose one of skip, stretch, reflect, loop"),
        ("source.name=ucf", "choose one of ucf101"),
        ("clip.num_frames=129", "no usable video"),
        ("lr=3", "unknown key 'lr'; did you mean 'learning_rate'"),
        ("bs=3", "unknown key 'bs'; did you mean 'global_batch'"),
        ("epochs=3", "unknown key 'epochs'; did you mean 'steps'"),
        ("resolution=3", "unknown key 'resolution'; did you mean 'clip.size'"),
    ],
)
def test_settings_that_cannot_work(fails, tmp_path, setting, message):
    assert message in train(fails, tmp_path, "source.name=demo", "source.demo_videos=4", setting)


def test_stage_two_without_a_vae(fails, tmp_path):
    for main in (cache_latents.main, train_latte.main):
        line = fails(
            main, "source.name=demo", f"run_dir={tmp_path / 'run'}", f"cache.dir={tmp_path / 'cache'}"
        )
        assert "no weights for VAE 'odvae'" in line
    line = fails(train_latte.main, "source.name=demo", "vae.name=tats", f"vae.path={tmp_path / 'x'}")
    assert "neither a folder" in line
    assert not list(tmp_path.iterdir())


def test_sampling_from_a_checkpoint_with_missing_weights(fails, tmp_path, own_vae):
    (tmp_path / "pipeline").mkdir()
    assert "no model_index.json" in fails(
        sample.main, f"pipeline={tmp_path / 'pipeline'}", f"out={tmp_path / 'out'}"
    )
    line = fails(sample.main, f"pipeline={tmp_path / 'run'}", f"out={tmp_path / 'out'}")
    assert "train one with scripts/stage2_latte.sh" in line
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "run" / "pipeline" / "model_index.json").write_text("{}")
    line = fails(sample.main, f"pipeline={tmp_path / 'run'}", f"out={tmp_path / 'out'}")
    assert line.endswith(f"did you mean pipeline={tmp_path / 'run' / 'pipeline'}?")
    shutil.rmtree(own_vae)
    assert not (tmp_path / "out").exists()


def test_real_damaged_files_are_all_found_and_training_goes_on_with_the_rest(assets, tmp_path, vae_settings):
    folder = tmp_path / "videos"
    shutil.copytree(assets / "corrupt" / "derived", folder / "bad")
    for clip in sorted((assets / "ucf101").rglob("*.avi"))[:2]:
        shutil.copy(clip, folder / clip.name)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    settings = [s for s in vae_settings if not s.startswith("source.")]
    more = [f"source.root={folder}", "source.val_fraction=0", f"source.index_dir={tmp_path / 'index'}"]
    train_vae.main([*settings, *more, "clip.interval=3", f"run_dir={tmp_path / 'run'}", "steps=1"])
    listed = (tmp_path / "index" / "folder-quarantine.tsv").read_text().splitlines()[1:]
    assert len(listed) >= 14
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
