"""Names -> VAE classes: list, build with random weights, load a folder, describe. Imports torch only when used.

Classes are chosen from three tables, never imported by a string found in a file: FAMILIES below, what plugins add to
data.core.registry.vaes, and diffusers' video autoencoders in vae/adapter.py.
"""

import json
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from data.core.environment import weights_folder
from data.core.lazy import lazy
from data.core.registry import vaes as added
from data.core.tensors import some

adapter = lazy("vae.adapter")


@dataclass(frozen=True)
class Family:
    """One row: `paper_name` is the paper's, `source` where the official weights are, `convert` how to read them."""

    paper_name: str
    module: str
    cls: str
    licence: str
    source: str
    convert: str = ""


_SD_SOURCE = "huggingface.co/stabilityai/sd-vae-ft-mse"
FAMILIES = {
    "odvae": Family(
        paper_name="OD-VAE",
        module="odvae",
        cls="ODVAE",
        licence="MIT",
        source="huggingface.co/LanguageBind/Open-Sora-Plan-v1.2.0, subfolder vae",
        convert="open-sora-plan",
    ),
    "sd2_1": Family(
        paper_name="SD-VAE",
        module="baselines.sd",
        cls="SDVAE",
        licence="MIT (sd-vae-ft-mse)",
        source=_SD_SOURCE,
    ),
    "svd": Family(
        paper_name="SVD-VAE",
        module="baselines.svd",
        cls="SVDVAE",
        licence="stable-video-diffusion-nc-community (gated)",
        source="huggingface.co/stabilityai/stable-video-diffusion-img2vid, subfolder vae",
    ),
    "cvvae": Family(
        paper_name="CV-VAE",
        module="baselines.cvvae",
        cls="CVVAE",
        licence="unknown (no licence file)",
        source="huggingface.co/AILab-CVC/CV-VAE, subfolder vae3d",
        convert="cvvae",
    ),
    "ops": Family(
        paper_name="OPS-VAE",
        module="baselines.ops",
        cls="OPSVAE",
        licence="Apache-2.0 (code), openrail++ (2D part)",
        source="huggingface.co/hpcai-tech/OpenSora-VAE-v1.2, model.safetensors",
        convert="ops",
    ),
    "vqgan": Family(
        paper_name="VQGAN",
        module="baselines.vqgan",
        cls="GumbelVQGAN",
        licence="MIT (code)",
        source="heibox.uni-heidelberg.de/d/2e5662443a6b4307b470, vqgan_gumbel_f8/checkpoints/last.ckpt",
        convert="vqgan",
    ),
    "tats": Family(
        paper_name="TATS",
        module="baselines.tats",
        cls="TATSVQGAN",
        licence="MIT",
        source="Google Drive file 1ExV0XdJKlGP4lzn0X2W9307X-DE240iW (vqgan_sky_128_488_epoch_12-step_29999-train.ckpt)",
        convert="tats",
    ),
}
# Plain diffusers folders open without conversion.
_DIFFUSERS = {"AutoencoderKL": "sd2_1", "AutoencoderKLTemporalDecoder": "svd"}
_BY_CLASS_NAME = {row.cls: name for name, row in FAMILIES.items()} | _DIFFUSERS
_UPSTREAM = {"CausalVAEModel": "open-sora-plan", "CVVAEModel": "cvvae", "VideoAutoencoderPipeline": "ops"}


def list_vaes() -> list[str]:
    """List the paper's VAEs; build_vae and load_vae know diffusers' video autoencoders too (vae/adapter.py)."""
    return list(FAMILIES)


def _class(name: str):
    """Find the class of a name of load_vae. Raises ValueError with the known ones."""
    if not _is_name(name):
        raise ValueError(f"VAE {name!r}: known names are {known_names()}")
    if name not in FAMILIES:
        return added.get(name) or adapter.adapted(adapter.NAMES[name])
    return getattr(import_module(f"vae.{FAMILIES[name].module}"), FAMILIES[name].cls)


def vae_class(class_name: str):
    """Find the VAE class of that name, None if neither this project nor a plugin has one."""
    own = class_name in _BY_CLASS_NAME and class_name not in _DIFFUSERS
    name = _BY_CLASS_NAME[class_name] if own else _added_name(class_name)
    if name is None and class_name in adapter.ROWS:
        return adapter.adapted(class_name)
    return None if name is None else _class(name)


def _added_name(class_name: str) -> str | None:
    """Find the name under which a plugin has added a class."""
    if class_name not in _BY_CLASS_NAME:
        added.find("")  # imports the plugins
    return next((name for name, cls in added.items() if cls.__name__ == class_name), None)


def build_vae(name: str, **config):
    """Build a model with random weights, at the paper's (diffusers': the default) size unless `config` overrides it.

    Raises ValueError for an unknown name; TypeError for a config key that the class does not have.
    """
    return _class(name)(**config)


def build_like(name: str, config: dict):
    """Build a model with random weights from what a config.json says; keys that its class does not have are left out, as diffusers does."""
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    return _class(name).from_config(known)


def _weights_folder(name: str) -> Path:
    """Find the folder of a name below $OMNILATTE_WEIGHTS or weights/.

    Raises ValueError that says how to get the weights.
    """
    row = FAMILIES.get(name) or adapter.ROWS.get(adapter.NAMES.get(name))
    folder = weights_folder() / name
    if folder.is_dir():
        return folder
    get = f"get {row.source}" if row else f"make some: build_vae({name!r}).save_pretrained(DIR)"
    if getattr(row, "convert", ""):
        get += f", run `python scripts/convert.py {row.convert} --src FILE --dst DIR`"
    raise ValueError(
        f"no weights for VAE {name!r} ({folder} is not a folder): {get}; then name the folder itself in place of {name!r}, "
        f"or put it at {folder}"
    )


def vae_folder(name_or_folder: str | Path, path: str | Path | None = None) -> Path:
    """Find the folder that `load_vae` reads for these arguments."""
    if path is not None:
        return Path(path)
    return _weights_folder(str(name_or_folder)) if _is_name(name_or_folder) else Path(name_or_folder)


def _is_name(name_or_folder: str | Path) -> bool:
    name = str(name_or_folder)
    return name in FAMILIES or (os.sep not in name and (name in adapter.NAMES or bool(added.find(name))))


def known_names() -> str:
    """List all names of load_vae, for messages: the paper's VAEs, and diffusers' classes."""
    return ", ".join([*FAMILIES, *adapter.NAMES, *added])


def _read_class_name(folder: Path) -> str:
    """Read the class of a saved VAE from its config.json. Raises ValueError with the way out for any other folder."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is neither a folder nor one of {known_names()}")
    file = folder / "config.json"
    if not file.is_file():
        inner = folder / "vae" / "config.json"
        hint = f"; did you mean {inner.parent}?" if inner.is_file() else ""
        raise ValueError(f"{folder} has no config.json, so it is not a saved VAE{hint}")
    try:
        class_name = json.loads(file.read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
    if class_name in _BY_CLASS_NAME or class_name in adapter.ROWS or _added_name(class_name):
        return class_name
    # Not one that opens: perhaps one that can be converted.
    if class_name in _UPSTREAM:
        family = _UPSTREAM[class_name]
        raise ValueError(
            f"{folder} is an upstream {class_name}: convert it first with "
            f"`python scripts/convert.py {family} --src {folder} --dst DIR`"
        )
    known = ", ".join([*_BY_CLASS_NAME, *adapter.ROWS])
    raise ValueError(f"{file}: _class_name {class_name!r} is none of {known}")


def name_of(class_name: str) -> str:
    """Return the name of a class that load_vae opens, "wan" of AutoencoderKLWan."""
    return _added_name(class_name) or _BY_CLASS_NAME.get(class_name) or adapter.ROWS[class_name].name


def adapted_class(folder: str | Path):
    """Find the class of a plain diffusers folder of vae/adapter.py, None of any other VAE; ValueError if it is not a VAE's."""
    class_name = _read_class_name(Path(folder))
    return adapter.adapted(class_name) if class_name in adapter.ROWS else None


def load_vae(name_or_folder: str | Path, path: str | Path | None = None, dtype=None):
    """Load a VAE in eval mode.

    name_or_folder: a folder with config.json and safetensors (ours, or a plain diffusers AutoencoderKL,
    AutoencoderKLTemporalDecoder or video autoencoder of vae/adapter.py), or a name: of list_vaes(), or of a row there, as
    "wan". With a name, `path` is its folder; without `path` the folder is <name> in $OMNILATTE_WEIGHTS, else in weights/ of
    the repository. dtype: torch dtype of the weights, float32 if not given.
    Raises ValueError if nothing is there (with the official source and what to do), if the folder is of another
    family than the name, or if a weight is missing, extra or of another shape.
    """
    name = str(name_or_folder) if _is_name(name_or_folder) else None
    if path is not None and name is None:
        raise ValueError(f"VAE {str(name_or_folder)!r} with a path: the name must be one of {known_names()}")
    # What the folder holds, which must be what the name says.
    folder = vae_folder(name_or_folder, path)
    class_name = _read_class_name(folder)
    own, family = _added_name(class_name), name_of(class_name)
    if name is not None and family != name:
        raise ValueError(f"{folder} holds a {class_name} ({family}), not {name}")
    # A plugin's class, a video autoencoder of diffusers, one of this project, or one of diffusers that a baseline wraps.
    if own:
        return _load_folder(added[own], folder, dtype)
    if class_name not in _BY_CLASS_NAME:
        return adapter.check_loaded(_load_folder(adapter.adapted(class_name), folder, dtype), folder)
    cls = _class(family)
    if class_name == FAMILIES[family].cls:
        return _load_folder(cls, folder, dtype)
    import diffusers

    return cls.from_diffusers(_load_folder(getattr(diffusers, class_name), folder, dtype))


def _load_folder(cls, folder: Path, dtype):
    """Load as from_pretrained, but stop, with the names, where diffusers would only warn."""
    options = {"local_files_only": True, "output_loading_info": True}
    if dtype is not None:
        options["torch_dtype"] = dtype
    # The fp16 variant, where there is no other.
    weights = [file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    if weights and all(".fp16." in name for name in weights):
        options["variant"] = "fp16"
    try:
        model, info = cls.from_pretrained(str(folder), **options)
    except (RuntimeError, ValueError) as error:
        text = str(error).partition(". If you want")[0]  # diffusers' advice there would keep random weights
        raise ValueError(f"{folder}: weights do not fit config.json: {text}") from error
    # Every tensor of the model must be in the file, in its shape, and none besides.
    wrong = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := list(info[kind]):
            wrong.append(f"{len(keys)} {kind}: {some(map(str, keys), 8)}")
    if wrong:
        raise ValueError(f"{folder}: weights do not fit config.json: {'; '.join(wrong)}")
    return model.eval()


def describe_vaes() -> list[dict]:
    """Describe each VAE at the paper's size in a dict, weights not needed (counted on the meta device).

    name, paper_name, licence, source; params = nn.Parameters of the shipped module, params_paper_counts = what
    the paper's Table 1 counts (differs for TATS: with its training losses); vcpr_nominal = product of strides,
    vcpr_effective_81 = pixels per latent position of an 81-frame clip; latent_frames = {25: .., 33: .., 81: ..}.
    """
    import torch

    rows = []
    for name, family in FAMILIES.items():
        with torch.device("meta"):
            model = build_vae(name)
        # Latent frames of some clips; TATS takes them padded to groups of four.
        frames = {}
        for T in (25, 33, 81):
            if model.frame_rule == "4n":
                model.enable_frame_padding()
            frames[T] = model.latent_frames(T)
        params = sum(p.numel() for p in model.parameters())
        area = model.spatial_compression_ratio**2
        rows.append(
            {
                "name": name,
                "paper_name": family.paper_name,
                "licence": family.licence,
                "source": family.source,
                "params": params,
                "params_paper_counts": params + getattr(model, "num_training_parameters", 0),
                "vcpr_nominal": area * model.temporal_compression_ratio,
                "vcpr_effective_81": 81 * area / frames[81],
                "latent_frames": frames,
            }
        )
    return rows
