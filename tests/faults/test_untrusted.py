"""Files from elsewhere: a pickle that would write a file is refused without being run, a name that points away is not a path.

No program of this project extracts archives (the last test), so there is nothing in them to traverse.
"""

import ast
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data.core.files import sha256_of
from data.latents import LatentCache
from pipelines import cache_latents, sample, train_latte, train_vae
from pipelines.training.checkpoints import Checkpoints
from pipelines.video_pipeline import LatentVideoPipeline
from scripts.convert import FAMILIES
from scripts.convert import main as convert
from tests.faults.disk import program

ROOT = Path(__file__).resolve().parents[2]


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def bomb(tmp_path):
    """bomb(path, raw): write a hostile pickle, as torch.save does or a bare one. `went_off` must stay False."""

    def write(path, raw=False, around=lambda payload: payload):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = around(Payload(tmp_path / "boom"))
        if raw:
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        return path

    write.went_off = lambda: (tmp_path / "boom").exists()
    return write


def test_the_payload_works_where_nobody_takes_care(bomb, tmp_path):
    torch.load(bomb(tmp_path / "x.pt"), weights_only=False)
    assert bomb.went_off()


@pytest.fixture
def refused(capfd):
    """A program ends with exit code 2 and one line; the line."""

    def go(main, *settings):
        assert program(main, *settings) == 2
        [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    return go


@pytest.mark.parametrize(
    "raw", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torch.save", "pickle"]
)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "beside tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_every_family_that_would_run_code(bomb, refused, tmp_path, family, inside, raw):
    def around(payload):
        return {"state_dict": {"a": torch.zeros(1), "b": payload}, "args": payload} if inside else payload

    file = bomb(tmp_path / "weights.pt", raw, around)
    assert str(tmp_path) in refused(convert, family, "--src", str(file), "--dst", str(tmp_path / "out"))
    assert not bomb.went_off()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("raw", [False, True], ids=["torch.save", "pickle"])
def test_an_image_vae_to_begin_with(bomb, refused, vae_settings, tmp_path, raw):
    settings = [s for s in vae_settings if not s.startswith("model.init")]
    file = bomb(tmp_path / "v2-1.ckpt", raw, lambda payload: {"state_dict": {"x": payload}})
    line = refused(train_vae.main, *settings, f"model.init_from={file}", f"run_dir={tmp_path / 'run'}")
    assert "v2-1.ckpt" in line
    assert not bomb.went_off()


def test_the_network_of_the_perceptual_loss(bomb, refused, vae_settings, tmp_path):
    file = bomb(tmp_path / "vgg.pth")
    settings = [s for s in vae_settings if not s.startswith("loss.perceptual")]
    more = ["loss.perceptual_weight=1", f"loss.perceptual_weights={file}", f"run_dir={tmp_path / 'run'}"]
    assert "vgg.pth" in refused(train_vae.main, *settings, *more)
    assert not bomb.went_off()


def reseal(folder):
    """What somebody who can write a checkpoint can write too: digests that fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: sha256_of(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMPLETE").write_text(sha256_of(folder / "manifest.json"))


def test_the_state_of_a_trainer_in_a_checkpoint_with_digests_that_fit(bomb, refused, vae_settings, tmp_path):
    run = tmp_path / "run"
    train_vae.main([*vae_settings, f"run_dir={run}", "steps=1"])
    bomb(Checkpoints(run).path(1) / "trainer.pt", around=lambda payload: {"step": 1, "optimizer": payload})
    reseal(Checkpoints(run).path(1))
    assert Checkpoints(run).latest() == 1
    line = refused(train_vae.main, *vae_settings, f"run_dir={run}", "steps=2")
    assert "holds more than tensors and numbers and was not loaded" in line
    assert not bomb.went_off()


def test_weights_in_a_checkpoint_and_in_an_export_are_safetensors_or_refused(
    bomb, refused, own_vae, tmp_path
):
    bomb(own_vae / "diffusion_pytorch_model.safetensors")
    line = refused(
        cache_latents.main, "source.name=demo", f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"
    )
    assert str(own_vae) in line
    (own_vae / "diffusion_pytorch_model.safetensors").unlink()
    bomb(own_vae / "diffusion_pytorch_model.bin")
    refused(cache_latents.main, "source.name=demo", f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}")
    assert not bomb.went_off()


@pytest.fixture
def cache(latte_settings, own_vae, tmp_path):
    """A cache's folder and the settings that made it."""
    settings = [*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"]
    cache_latents.main(settings)
    return tmp_path / "cache", settings


def test_a_latent_shard_with_a_digest_that_fits(bomb, cache):
    shard = bomb(cache[0] / "latents-00000.safetensors")
    sidecar = shard.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"sha256": sha256_of(shard)}))
    with pytest.raises(ValueError, match=r"latent shard .*latents-00000.safetensors: .*delete"):
        LatentCache(cache[0])[0]
    assert not bomb.went_off()


@pytest.mark.parametrize("content", ["[]", '{"complete": true}', "\x00"])
def test_an_index_or_record_of_a_cache_that_is_none(cache, refused, tmp_path, content):
    folder, settings = cache
    for name, main, more in (
        ("latents-00001.json", cache_latents.main, ["--verify"]),
        ("index.json", train_latte.main, [f"run_dir={tmp_path / 'run'}"]),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(content)
        if more == ["--verify"]:
            assert program(main, *settings, *more) == 1
        else:
            assert "damaged" in refused(main, *settings, *more)
        (folder / name).write_text(before)


def test_names_in_a_cache_are_no_paths(cache, tmp_path):
    folder, settings = cache
    index = json.loads((folder / "index.json").read_text())
    index["failed"] = [{"entry": 0, "video": "../../../etc/passwd", "reason": "x"}]
    index["class_names"] = ["../x"]
    (folder / "index.json").write_text(json.dumps(index))
    before = sorted(p for p in tmp_path.rglob("*"))
    assert program(cache_latents.main, *settings, "--verify") == 0
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_cached_features_are_arrays_or_computed_again(bomb, tmp_path):
    from eval.feature_cache import FeatureCache

    features = FeatureCache(tmp_path / "cache", {"a": 1})
    features.store(0, np.zeros((2, 3)))
    [file] = (tmp_path / "cache").rglob("*.npy")
    np.save(file, np.array([Payload(tmp_path / "boom")], dtype=object), allow_pickle=True)
    assert features.load(2, 2) == {}
    bomb(file, raw=True)
    assert features.load(2, 2) == {}
    assert not bomb.went_off()


def test_a_pipeline_that_names_other_classes_imports_none_of_them(cache, own_vae, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "hostile.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'boom')!r})\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    train_latte.main([*cache[1], f"run_dir={tmp_path / 'run'}", "steps=1"])
    index = tmp_path / "run" / "pipeline" / "model_index.json"
    good = json.loads(index.read_text())
    for part in ("vae", "transformer"):
        for named in (["hostile", "Anything"], ["os", "system"], "hostile", None):
            index.write_text(json.dumps(good | {part: named}))
            with pytest.raises(ValueError, match=f"{part} is .* not a class of this project"):
                LatentVideoPipeline.from_pretrained(index.parent)
    code = (tmp_path / "modules" / "hostile.py").read_text()
    for named in (
        ["hostile", "Anything"],
        ["hostile", "LatentVideoPipeline"],
    ):  # diffusers before 0.38 ran it
        index.write_text(json.dumps(good | {"_class_name": named}))
        with pytest.raises(ValueError, match="is not that of a LatentVideoPipeline"):
            LatentVideoPipeline.from_pretrained(index.parent)
    index.write_text(json.dumps(good))
    for place in (index.parent / "hostile.py", index.parent / "transformer" / "denoiser.latte.py"):
        place.write_text(code)
        with pytest.raises(ValueError, match="never run; remove it"):
            LatentVideoPipeline.from_pretrained(index.parent)
        place.unlink()
    index.write_text(json.dumps(good | {"_class_name": "hostile.Anything"}))
    with pytest.raises(ValueError, match="is not that of a LatentVideoPipeline"):
        sample.main([f"pipeline={index.parent}", f"out={tmp_path / 'out'}"])
    config = own_vae / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "hostile.Anything"}))
    program(cache_latents.main, *cache[1], "--verify")
    assert not (tmp_path / "boom").exists()


def test_names_in_a_manifest_of_samples_are_no_paths(cache, refused, tmp_path):
    train_latte.main([*cache[1], f"run_dir={tmp_path / 'run'}", "steps=1"])
    settings = [f"pipeline={tmp_path / 'run/pipeline'}", f"out={tmp_path / 'out'}", "num_steps=2"]
    sample.main([*settings, "num_videos=1"])
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"files": ["../../secret.mkv"], "num_videos": 10**9}))
    before = {p for p in tmp_path.rglob("*") if tmp_path / "out" not in p.parents}
    sample.main([*settings, "num_videos=2"])
    assert json.loads(file.read_text())["files"] == ["000000.mkv", "000001.mkv"]
    assert {p for p in tmp_path.rglob("*") if tmp_path / "out" not in p.parents} == before
    file.write_text("[]")
    assert "no manifest of samples" in refused(sample.main, *settings, "num_videos=2")


def test_a_checkpoint_s_manifest_reads_no_file_outside_its_folder(tmp_path, monkeypatch):
    folder = Checkpoints(tmp_path).path(1)
    folder.mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("x")
    for name in ("../../secret", str(secret)):
        text = json.dumps({"files": {name: sha256_of(secret)}})
        (folder / "manifest.json").write_text(text)
        (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())
        assert Checkpoints(tmp_path).damage(1) == f"{name}: missing"


def test_no_code_extracts_archives():
    forbidden = {"extractall", "extract", "unpack_archive", "_extract_member"}
    for room in ("data", "vae", "denoiser", "eval", "pipelines", "scripts"):
        for path in (ROOT / room).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            names = {n.func.attr for n in calls if isinstance(n.func, ast.Attribute)}
            assert not names & forbidden, path
