"""The template of docs/extending.md does what the page says: cache, train, sample, and the four names by their ways."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.core import registry
from data.demo import DemoVideos
from data.encode import write_mp4
from data.sources import open_source
from denoiser.sampling import make_scheduler
from pipelines import cache_latents, sample, train_latte, train_vae
from pipelines.export import main as export
from pipelines.table import main as table
from tests.ecosystem import bare
from vae import build_vae, load_vae

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The page's my_parts.py where its commands look for it; afterwards the registries are as they were."""
    (tmp_path / "my_parts.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMNILATTE_PLUGINS", "my_parts")
    kinds = (registry.vaes, registry.losses, registry.samplers, registry.sources)
    before = [dict(kind) for kind in kinds]
    registry.load_plugins.cache_clear()
    yield tmp_path
    sys.modules.pop("my_parts", None)
    registry.load_plugins.cache_clear()
    for kind, kept in zip(kinds, before, strict=True):
        kind.clear()
        kind.update(kept)


@pytest.fixture
def videos(tmp_path):
    """videos/train/<class>/n.mp4, which the page's data set reads."""
    drawn = DemoVideos(num_videos=6, num_classes=2, size=32, num_frames=8, seed=0)
    for n in range(6):
        write_mp4(
            tmp_path / "videos" / "train" / f"kind{n % 2}" / f"{n}.mp4", drawn.frames(n, range(8), 32), 8
        )
    return tmp_path / "videos"


def test_the_template_of_the_page_is_thirty_lines_of_code():
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
    assert len([line for line in code if line.strip() and not line.startswith('"""')]) <= 33


def test_a_vae_a_loss_a_sampler_and_a_data_set_of_ones_own_work_in_every_program(
    parts, videos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    build_vae("blocks").save_pretrained("runs/blocks")
    own = ["source.name=my_videos", f"source.root={videos}", "source.val_fraction=0", "workers=0"]
    clip = ["clip.num_frames=5", "clip.size=32", "clip.short=loop"]
    small = ["steps=2", "save_every=2", "log_every=1", "global_batch=2", "micro_batch=2"]

    tiny = ["model.block_out_channels=[8,8,16,16]", "model.norm_num_groups=4", "model.init=random"]
    quiet = ["loss.perceptual_weight=0", "loss.gan_weight=0", "val_every=9", "loss.extra.motion.weight=0.5"]
    train_vae.main([*own, *clip, *small, *tiny, *quiet, "run_dir=runs/odvae"])
    lines = [json.loads(line) for line in Path("runs/odvae/metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "loss/rec" in line):
        wanted = line["loss/nll"] + 1e-6 * line["loss/kl"] + 0.5 * line["loss/motion"]
        assert line["loss/motion"] > 0.01
        assert line["loss"] == pytest.approx(wanted, abs=2e-3 * line["loss/motion"] + 1e-6 * line["loss"])

    stage_two = ["--vae", "blocks", "--vae-path", "runs/blocks", *own, *clip, "cache.dir=runs/cache"]
    cache_latents.main(stage_two)
    train_latte.main([*stage_two, *small, "denoiser.size=S/2", "run_dir=runs/latte", "samples.every=0"])
    sample.main(
        ["pipeline=runs/latte/pipeline", "sampler=ddim_twice", "num_steps=1", "num_videos=2", "batch=2"]
    )
    assert len(list(Path("runs/latte/samples").glob("*.mkv"))) == 2
    manifest = json.loads(Path("runs/latte/samples/manifest.json").read_text())
    assert manifest["settings"]["sampler"] == "ddim_twice"
    assert export(["runs/blocks", "--out", "share"]) == 0
    x = torch.linspace(-1, 1, 3 * 9 * 64 * 64).view(1, 3, 9, 64, 64)
    wanted = load_vae("share").encode(x).latent_dist.mode().sum().item()
    site = bare.site_of(tmp_path / "site", "torch", "diffusers", "setuptools")
    code = f"""
import torch
from diffusers import AutoModel
x = torch.linspace(-1, 1, 3 * 9 * 64 * 64).view(1, 3, 9, 64, 64)
print(AutoModel.from_pretrained({str(tmp_path / "share")!r}, trust_remote_code=True).encode(x).latent_dist.mode().sum().item())
"""
    assert float(bare.run(code, site, tmp_path)) == pytest.approx(wanted, rel=1e-4)


def test_a_vae_of_ones_own_has_a_row_in_the_table_of_vaes(parts, videos, tmp_path):
    folder = tmp_path / "blocks"
    build_vae("blocks").save_pretrained(folder)
    build_vae("sd2_1", block_out_channels=(8, 8, 8, 8), norm_num_groups=4).save_pretrained(tmp_path / "sd")
    words = [
        "--data",
        str(videos),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "32",
        "--frames",
        "5",
        "--clips",
        "2",
    ]
    words += ["--index-dir", str(tmp_path / "index"), f"blocks={folder}", f"sd={tmp_path / 'sd'}"]
    assert table(["vaes", *words]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "vaes.csv").open()))
    assert list(rows[0].values())[:2] == ["blocks", "BlockVAE"]
    assert rows[0]["time x side"] == "1 x 8"
    assert float(rows[0]["PSNR, dB"]) > 0
    assert "modelled" in rows[0]["peak MiB"]  # by its class, on the pretended device


def test_names_are_found_by_each_registry_and_a_name_is_added_once(parts, videos):
    assert len(make_scheduler("ddim_twice", 5).timesteps) == 10
    source = open_source("my_videos", videos)
    assert (len(source.videos), source.class_names) == (6, ["kind0", "kind1"])
    assert registry.losses["motion"](torch.zeros(1, 3, 2, 4, 4), torch.ones(1, 3, 2, 4, 4)) == 0
    with pytest.raises(ValueError, match="VAE 'blocks': added twice"):
        registry.vaes.add("blocks")(type("Other", (), {}))
    for call, message in (
        (lambda: build_vae("bloks"), "VAE 'bloks': known names are odvae, .*, blocks"),
        (lambda: make_scheduler("dim", 5), "sampler 'dim': use ddpm, ddim, ddim_upstream, ddim_twice"),
        (lambda: open_source("videos", videos), "source 'videos': choose one of ucf101, .*, my_videos"),
        (lambda: train_vae.main(["loss.extra.mot.weight=1", "--dry-run"]), "loss.extra.mot: no such loss; added are: motion"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_a_plugin_that_is_not_there_is_named(monkeypatch):
    registry.load_plugins.cache_clear()
    monkeypatch.setenv("OMNILATTE_PLUGINS", "no_such_module_here")
    with pytest.raises(ValueError, match="OMNILATTE_PLUGINS=no_such_module_here: no module"):
        make_scheduler("mine", 5)
    registry.load_plugins.cache_clear()


def test_an_entry_point_of_an_installed_package_adds_names(parts, monkeypatch):
    monkeypatch.delenv("OMNILATTE_PLUGINS")
    (parts / "my_parts-1.0.dist-info").mkdir()
    (parts / "my_parts-1.0.dist-info" / "METADATA").write_text("Name: my_parts\nVersion: 1.0\n")
    (parts / "my_parts-1.0.dist-info" / "entry_points.txt").write_text("[omnilatte]\nmine = my_parts\n")
    assert np.array_equal(
        make_scheduler("ddim_twice", 2).timesteps, make_scheduler("ddim_upstream", 4).timesteps
    )
