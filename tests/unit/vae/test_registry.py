"""Names and folders -> models; every refusal says what to do."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from vae import build_vae, describe_vaes, list_vaes, load_vae

NAMES = ["odvae", "sd2_1", "svd", "cvvae", "ops", "vqgan", "tats"]
SMALL = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def test_importing_the_room_imports_no_torch():
    code = "import sys; from vae import list_vaes; list_vaes(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MODEL_COST = """
import sys
import diffusers.configuration_utils, diffusers.models.modeling_outputs
import diffusers.models.modeling_utils, diffusers.utils.accelerate_utils
before = set(sys.modules)
import vae.odvae, denoiser.latte
print({name.partition(".")[0] for name in set(sys.modules) - before} - {"data", "vae", "denoiser"})
assert "diffusers.models.autoencoders" not in sys.modules and "torchvision" not in sys.modules
"""


def test_importing_the_models_imports_no_more_than_the_base_class_of_diffusers_does():
    found = subprocess.run([sys.executable, "-c", MODEL_COST], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"


def test_the_seven_names_are_listed_and_an_unknown_one_is_refused():
    assert list_vaes() == NAMES
    with pytest.raises(ValueError, match="known names are odvae, sd2_1"):
        build_vae("sd3")
    with pytest.raises(ValueError, match="neither a folder nor one of odvae"):
        load_vae("sd3")
    with pytest.raises(ValueError, match="the name must be one of"):
        load_vae("sd3", path=".")


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_name_the_official_source_and_the_ways_out(name, monkeypatch, tmp_path):
    monkeypatch.setenv("OMNILATTE_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match=r"is not a folder\): get .+; then name the folder"):
        load_vae(name)


def test_a_folder_of_another_family_is_refused(tmp_path):
    build_vae("sd2_1", **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a SDVAE \(sd2_1\), not svd"):
        load_vae("svd", path=tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "CausalVAEModel"}, "convert.py open-sora-plan"),
        ({"_class_name": "CVVAEModel"}, "convert.py cvvae"),
        ({"_class_name": "os.system"}, "none of ODVAE"),
        ({}, "_class_name None"),
        ([], "not a JSON object"),
    ],
)
def test_a_config_of_no_class_of_ours_is_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_vae(tmp_path)


def test_a_folder_without_config_is_refused_and_a_pipeline_folder_is_recognised(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json, so it is not a saved VAE$"):
        load_vae(tmp_path)
    AutoencoderKL().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="did you mean"):
        load_vae(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "truncated"])
def test_weights_that_do_not_fit_the_config_are_refused(damage, tmp_path):
    build_vae("sd2_1", **SMALL).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state, key = load_file(file), "autoencoder.decoder.conv_in.bias"
    if damage == "missing":
        del state[key]
    elif damage == "extra":
        state["autoencoder.decoder.more"] = torch.zeros(1)
    elif damage == "misshapen":
        state[key] = torch.zeros(3)
    save_file(state, file, metadata={"format": "pt"})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    named = {"missing": key, "extra": "more", "misshapen": key, "truncated": "diffusion_pytorch_model"}
    with pytest.raises((ValueError, OSError), match=named[damage]):
        load_vae(tmp_path)


def test_a_half_precision_variant_alone_is_found(tmp_path):
    AutoencoderKL().half().save_pretrained(tmp_path, variant="fp16")
    assert load_vae(tmp_path).dtype == torch.float32
    assert load_vae(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_the_description_repeats_table_1():
    rows = {row["name"]: row for row in describe_vaes()}
    assert list(rows) == NAMES
    millions = [239.19, 83.65, 97.74, 182.45, 393.34, 69.00, 52.19]
    assert [round(rows[name]["params_paper_counts"] / 1e6, 2) for name in NAMES] == millions
    assert rows["tats"]["params"] == 23_652_227
    assert [rows[name]["vcpr_nominal"] for name in NAMES] == [256, 64, 64, 256, 256, 64, 256]
    assert [rows[name]["latent_frames"][81] for name in NAMES] == [21, 81, 81, 21, 21, 81, 21]
    assert rows["odvae"]["latent_frames"] == {25: 7, 33: 9, 81: 21}
    assert round(rows["odvae"]["vcpr_effective_81"], 1) == 246.9
