"""Checkpoints and exports: complete or absent, any flipped byte refused, two kept, leftovers cleaned, the past known."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.core.files import machine
from pipelines.train_vae import main
from pipelines.training.checkpoints import Checkpoints, export_folder, recover, writing

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def save(checkpoints, step, text="x"):
    def write(folder):
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(text)
        (folder / "trainer.pt").write_text(text)

    checkpoints.save(step, write, {}, ALONE)


def fill(text):
    def write(folder):
        folder.mkdir()
        (folder / text).write_text(text)

    return write


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of stage one with two checkpoints."""
    from tests.programs.conftest import VAE

    folder = tmp_path_factory.mktemp("run")
    main([*VAE, f"run_dir={folder}", "steps=4", "save_every=2", "val_every=9"])
    return folder


def test_one_flipped_byte_in_any_file_of_a_real_checkpoint_is_refused_and_the_one_before_used(run, caplog):
    checkpoints = Checkpoints(run)
    files = [p for p in checkpoints.path(4).rglob("*") if p.is_file()]
    assert {"manifest.json", "COMPLETE", "trainer.pt", "config.json"} <= {p.name for p in files}
    for file in files:
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert checkpoints.latest() == 2, f"{file.name}, byte {place}"
            assert f"step_00000004 is damaged ({file.relative_to(checkpoints.path(4))}" in caplog.text or (
                file.name in ("manifest.json", "COMPLETE") and "manifest.json" in caplog.text
            )
            caplog.clear()
        file.write_bytes(content)
        assert checkpoints.latest() == 4


def test_every_byte_of_the_manifest_and_its_seal_counts(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    for name in ("manifest.json", "COMPLETE"):
        file = checkpoints.path(2) / name
        content = file.read_bytes()
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 32]) + content[place + 1 :])
            assert checkpoints.damage(2), f"{name}, byte {place}"
        file.write_bytes(content)
        assert not checkpoints.damage(2)


def test_files_that_are_missing_or_not_listed_are_damage(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    extra = checkpoints.path(1) / "engine"
    extra.write_text("x")
    assert checkpoints.damage(1) == "engine: not in the manifest"
    extra.unlink()
    for name in ("trainer.pt", "vae/config.json", "manifest.json", "COMPLETE"):
        file = checkpoints.path(1) / name
        content = file.read_bytes()
        file.unlink()
        assert name.split("/")[-1] in checkpoints.damage(1)
        file.write_bytes(content)
    assert checkpoints.damage(1) == ""


@pytest.mark.parametrize(
    "files", [{"../../secret": "0"}, {"/etc/hostname": "0"}, ["trainer.pt"], "x", None, {"trainer.pt": 3}]
)
def test_a_sealed_manifest_that_points_elsewhere_or_is_none_is_damage(tmp_path, files):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (tmp_path / "secret").write_text("x")
    text = json.dumps({"step": 1, "files": files})
    (checkpoints.path(1) / "manifest.json").write_text(text)
    (checkpoints.path(1) / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())
    assert checkpoints.damage(1)


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    (checkpoints.path(2) / "trainer.pt").write_text("damaged")
    assert checkpoints.latest() == 1
    save(checkpoints, 3)
    assert checkpoints.steps() == [1, 3]  # two good ones


def test_what_killed_saves_and_deletions_leave_is_cleaned_at_the_next_start(tmp_path):
    from tests.programs.conftest import VAE

    settings = [*VAE, f"run_dir={tmp_path}", "val_every=9", "save_every=1"]
    main([*settings, "steps=1"])
    dead = 2**22 + 1  # above the largest process id
    node = machine()
    for name in (".step_00000002.tmp", ".step_00000000.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "half").write_text("x")
    for name in (f".config.yaml.tmp-{node}-{dead}", f".env.json.tmp-{node}-{dead}"):
        (tmp_path / name).write_text("half")
    elsewhere, living = f".env.json.tmp-another-{dead}", f".env.json.tmp-{node}-1"
    for name in (elsewhere, living):
        (tmp_path / name).write_text("in use")
    main([*settings, "steps=2"])
    hidden = sorted(p.name for p in tmp_path.rglob(".*"))
    assert hidden == sorted([".lock", elsewhere, living])


def test_a_start_killed_before_its_settings_were_written_does_not_block_the_next(tmp_path):
    from tests.programs.conftest import VAE

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".config.yaml.tmp-{machine()}-{2**22 + 1}").write_text("half")
    main([*VAE, f"run_dir={tmp_path / 'run'}", "val_every=9", "steps=1"])
    assert (tmp_path / "run" / "vae").is_dir()


def test_an_export_killed_between_its_renames_gets_its_old_content_back(tmp_path):
    target = tmp_path / "vae"
    export_folder(target, fill("one"), {"step": 1})
    os.replace(target, tmp_path / ".vae.old")
    fill("two")(tmp_path / ".vae.tmp")
    recover(tmp_path)
    assert (target / "one").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_an_export_killed_after_its_renames_keeps_its_new_content(tmp_path):
    target = tmp_path / "vae"
    export_folder(target, fill("two"), {"step": 2})
    fill("one")(tmp_path / ".vae.old")
    recover(tmp_path)
    assert (target / "two").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_an_export_that_a_kill_prevented_is_made_by_the_next_start_though_no_step_is_left(
    tmp_path, monkeypatch
):
    from pipelines.training import run as loop
    from tests.programs.conftest import VAE

    settings = [*VAE, f"run_dir={tmp_path}", "val_every=9", "save_every=2"]
    main([*settings, "steps=2"])
    with monkeypatch.context() as patch:  # killed after the last checkpoint, before the export
        patch.setattr(loop, "export_folder", lambda *_, **__: False)
        main([*settings, "steps=4"])
    read = json.loads((tmp_path / "vae" / "export.json").read_text())
    assert (read["step"], read["samples_seen"], read["num_frames"]) == (2, 8, 9)
    main([*settings, "steps=4"])
    read = json.loads((tmp_path / "vae" / "export.json").read_text())
    assert (read["step"], read["samples_seen"]) == (4, 16)
    weights = "diffusion_pytorch_model.safetensors"
    last = tmp_path / "checkpoints" / "step_00000004" / "vae_ema" / weights
    assert (tmp_path / "vae" / weights).read_bytes() == last.read_bytes()


def test_a_checkpoint_knows_its_past(run):
    manifest = Checkpoints(run).manifest(4)
    assert (manifest["step"], manifest["samples_seen"], manifest["program"]) == (4, 16, "train_vae")
    assert manifest["config"]["learning_rate"] == 1e-3
    assert manifest["config"]["loss.gan_start"] == 2
    assert manifest["data"]["videos"] == 8
    assert "git" in manifest
    root = Path(__file__).parents[2]
    assert manifest["git"] or not (root / ".git").exists()


def test_a_latte_checkpoint_names_its_vae_by_digest_and_refuses_another(own_vae, latte_settings, tmp_path):
    from pipelines import cache_latents, train_latte
    from pipelines.training.open import weights_digest
    from vae import ODVAE

    run, common = (
        tmp_path / "run",
        [*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"],
    )
    cache_latents.main(common)
    common.append("mode=online")
    train_latte.main([*common, f"run_dir={run}", "steps=1"])
    vae = ODVAE.from_pretrained(own_vae)
    assert Checkpoints(run).manifest(1)["vae"] == {"name": "odvae", "weights_sha256": weights_digest(vae)}
    vae.decoder.conv_out.conv.bias.data.add_(1)
    vae.save_pretrained(own_vae)
    with pytest.raises(ValueError, match=r"was trained with vae=.*weights_sha256"):
        train_latte.main([*common, f"run_dir={run}", "steps=2"])


def test_a_start_leaves_hidden_folders_of_the_user_alone(tmp_path):
    from pipelines.training.checkpoints import recover

    for name in ("notes", ".notes.old", ".scratch.tmp", ".vae.tmp", ".pipeline.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".config.yaml.old").write_text("mine")
    recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["notes", ".notes.old", ".scratch.tmp", ".config.yaml.old", "pipeline"]
    )


def test_a_setting_that_an_older_run_did_not_know_counts_as_its_default(tmp_path):
    from pipelines.train_vae import TrainVAEConfig
    from pipelines.training.config import load
    from pipelines.training.folder import open_run

    open_run(tmp_path, load(TrainVAEConfig, None, []), "train_vae")
    file = tmp_path / "config.yaml"
    file.write_text("".join(line for line in file.open() if "gan_warmup" not in line))
    open_run(tmp_path, load(TrainVAEConfig, None, []), "train_vae")
    file.write_text("".join(line for line in file.open() if "gan_warmup" not in line))
    with pytest.raises(ValueError, match=r"loss\.gan_warmup: 0 -> 5"):
        open_run(tmp_path, load(TrainVAEConfig, None, ["loss.gan_warmup=5"]), "train_vae")


def test_an_export_is_made_while_the_run_is_still_locked(tmp_path, monkeypatch):
    from filelock import FileLock, Timeout

    from pipelines.training import run as loop
    from tests.programs.conftest import VAE

    def probe(*_, **__):
        with pytest.raises(Timeout), FileLock(tmp_path / ".lock").acquire(timeout=0):
            pass
        return False

    monkeypatch.setattr(loop, "export_folder", probe)
    main([*VAE, f"run_dir={tmp_path}", "val_every=9", "save_every=2", "steps=2"])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), torch.OutOfMemoryError),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), OSError),
    ],
)
def test_an_error_of_the_device_is_not_told_as_a_full_disk(error, kind, tmp_path):
    temporary = tmp_path / ".new"
    temporary.mkdir()

    def write():
        with writing(temporary, tmp_path / "new"):
            raise error

    with pytest.raises(kind) as caught:
        write()
    assert (caught.value is error) == (kind is not OSError)
    assert not temporary.exists()


def test_a_changed_run_begins_before_its_skipped_updates_or_else_right_before_them(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step, skipped in ((4, 0), (6, 2)):
        checkpoints.save(
            step, lambda folder: (folder / "weights").write_text(""), {"skipped_in_row": skipped}, ALONE
        )
    assert checkpoints.latest() == 6
    assert checkpoints.latest(healthy=True) == 4  # right before the row, but better than a new start
    checkpoints.save(2, lambda folder: (folder / "weights").write_text(""), {"skipped_in_row": 0}, ALONE)
    assert checkpoints.latest(healthy=True) == 2


def test_what_a_run_went_back_from_is_set_aside_and_never_overwritten(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)

    def save(*steps):
        for step in steps:
            checkpoints.save(
                step, lambda folder, text=str(step): (folder / "weights").write_text(text), {}, ALONE
            )

    save(2, 4, 6)
    (checkpoints.path(6) / "weights").write_text("damaged")
    assert checkpoints.latest() == 4
    checkpoints.set_aside_after(2)
    assert checkpoints.steps() == [2, 6]  # the damaged one is named in the log as it was
    save(4)
    checkpoints.set_aside_after(2)
    assert checkpoints.latest() == 2
    names = {path.name for path in checkpoints.folder.iterdir()}
    aside = {"set_aside_step_00000004", "set_aside_1_step_00000004"}
    assert names == {"step_00000002", "step_00000006", *aside}
    assert all((checkpoints.folder / name / "weights").read_text() == "4" for name in aside)


def test_a_step_that_was_trained_again_is_exported_again(tmp_path):
    target = tmp_path / "vae"
    assert export_folder(target, fill("one"), {"step": 4})
    assert not export_folder(target, fill("two"), {"step": 4})
    assert export_folder(target, fill("two"), {"step": 4}, trained=True)
    assert [p.name for p in target.iterdir() if p.suffix != ".json"] == ["two"]
    assert export_folder(target, fill("new"), {"step": 5})
