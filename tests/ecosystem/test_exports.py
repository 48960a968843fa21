"""Exports open in plain diffusers: in a Python that has torch and diffusers and nothing of this project."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from denoiser import Latte
from pipelines.export import main
from pipelines.results.bundle import source
from pipelines.video_pipeline import LatentVideoPipeline
from tests.ecosystem import bare
from tests.ecosystem.test_in_diffusers import OD, RELEASED, latte
from tests.parity.diffusers_small import SMALL
from tests.unit.vae.test_baselines import TINY
from vae import build_vae, load_vae

VAES = {
    "odvae": ("odvae", OD),
    "osp_v1_2": ("odvae", RELEASED),
    **{name: (name, TINY[name]) for name in TINY},
}
PIPELINES = ("odvae", "sd2_1", "wan")


def small(name: str):
    torch.manual_seed(0)
    kind, config = VAES[name] if name in VAES else (name, SMALL["wan"][1])
    return build_vae(kind, **config).eval()


def code_of(folder) -> str:
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert "path/to/this/folder" in code
    return code.replace("path/to/this/folder", str(folder)).replace("steps=50", "steps=2")


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return bare.site_of(tmp_path_factory.mktemp("site") / "packages", "torch", "diffusers", "setuptools")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{name: export} of every VAE and of three pipelines."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    for name in (*VAES, "wan"):
        small(name).save_pretrained(root / "models" / name)
        made[name] = root / f"share-{name}"
    for name in PIPELINES:
        vae = small(name)
        vae.set_latent_statistics([0.0] * vae.latent_channels, [1.0] * vae.latent_channels)
        transformer = latte(in_channels=vae.latent_channels)
        folder = root / "models" / f"pipeline-{name}"
        LatentVideoPipeline(vae, transformer, [f"class {n}" for n in range(5)]).save_pretrained(folder)
        made[folder.name] = root / f"share-{folder.name}"
    for name, out in made.items():
        assert main([str(root / "models" / name), "--out", str(out)]) == 0
    return made


PRINT = """
import hashlib, json, numpy as np, torch
def digest(a): return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()
torch.set_num_threads(1)
found = {}
"""


def test_the_card_s_code_opens_every_export_in_a_bare_environment(exports, site, tmp_path):
    """All in one process, one after the other, twice: the code of one export does not spoil that of another."""
    lines = [PRINT]
    for name, folder in [*exports.items(), *exports.items()]:
        values = (
            "np.stack(frames)"
            if name.startswith("pipeline")
            else "torch.cat([z.flatten(), video.flatten()]).numpy()"
        )
        lines.append(f"{code_of(folder)}\nfound[{name!r}] = digest({values})\n")
    found = json.loads(bare.run("".join(lines) + "print(json.dumps(found))", site, tmp_path).splitlines()[-1])
    wanted = {}
    for name, folder in exports.items():
        if name.startswith("pipeline"):
            pipe = LatentVideoPipeline.from_pretrained(folder)
            wanted[name] = digest(np.stack(pipe([0], 2, seeds=[0]).frames[0]))
            continue
        vae = load_vae(folder)
        x = torch.zeros(*map(int, re.search(r"zeros\((.*?)\)", code_of(folder))[1].split(",")))
        with torch.inference_mode():
            encoded = vae.encode(x)
            z = encoded.latents if vae.discrete else encoded.latent_dist.mode()
            wanted[name] = digest(torch.cat([z.flatten(), vae.decode(z).sample.flatten()]).numpy())
    assert found == wanted


def test_code_lies_beside_the_weights_under_its_own_name(exports):
    files = sorted(
        p.relative_to(exports["pipeline-odvae"]).as_posix() for p in exports["pipeline-odvae"].rglob("*.py")
    )
    names = [re.sub(r"_[0-9a-f]{8}\.py$", "", name) for name in files]
    assert names == ["omnilatte_generation", "transformer/omnilatte_latte", "vae/omnilatte_odvae"]
    assert not list(exports["wan"].rglob("*.py"))  # it is a class of diffusers
    config = json.loads((exports["odvae"] / "config.json").read_text())
    (file,) = exports["odvae"].glob("*.py")
    assert config["auto_map"] == {"AutoModel": f"{file.stem}.ODVAE"}
    index = json.loads((exports["pipeline-odvae"] / "model_index.json").read_text())
    assert index["class_names"]["4"] == "class 4"
    assert [k for k, v in index.items() if isinstance(v, list)] == ["_class_name", "transformer", "vae"]


def test_this_project_opens_an_export_without_running_its_code(exports, tmp_path):
    import shutil

    folder = shutil.copytree(exports["pipeline-odvae"], tmp_path / "share")
    wanted = LatentVideoPipeline.from_pretrained(exports["pipeline-odvae"])(
        [1], 2, output_type="video"
    ).frames
    for file in folder.rglob("*.py"):
        file.write_text(f"open({str(tmp_path / 'boom')!r}, 'w')")
    assert torch.equal(
        LatentVideoPipeline.from_pretrained(folder)([1], 2, output_type="video").frames, wanted
    )
    load_vae(folder / "vae")
    Latte.from_pretrained(folder / "transformer")
    (folder / "vae" / "omnilatte_other_00000000.py").write_text("")  # named by nothing
    with pytest.raises(
        ValueError, match="omnilatte_other_00000000.py: code in the folder of a pipeline is never run"
    ):
        LatentVideoPipeline.from_pretrained(folder)
    assert not (tmp_path / "boom").exists()


def test_an_export_of_an_export_is_the_same_export(exports, tmp_path):
    for name in ("odvae", "pipeline-sd2_1"):
        assert main([str(exports[name]), "--out", str(tmp_path / exports[name].name)]) == 0
        for kept in exports[name].rglob("*"):
            if kept.suffix in (".safetensors", ".py"):
                again = tmp_path / exports[name].name / kept.relative_to(exports[name])
                assert again.read_bytes() == kept.read_bytes()


def test_two_modules_with_one_name_are_not_put_in_one_file(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "first.py").write_text("def f():\n    return 1\n")
    (tmp_path / "vae" / "second.py").write_text(
        '"""Doc."""\n\nfrom vae import first\n\n\ndef g():\n    return first.f()\n'
    )
    monkeypatch.setattr("pipelines.results.bundle.ROOT", tmp_path)
    space = {}
    exec(source("vae.second"), space)
    assert space["g"]() == 1
    (tmp_path / "vae" / "second.py").write_text("from vae import first\n\n\ndef f():\n    return first.f()\n")
    with pytest.raises(ValueError, match="vae.second: f is defined in vae.first too"):
        source("vae.second")
