"""Initialize OD-VAE from an image VAE (paper 3.3): every 2D kernel becomes the 3D kernel of the same name.

- tail (Eq. 3): the last temporal tap is the 2D kernel, the others are 0. One frame in gives SD-VAE's output (Eq. 4).
- average (Eq. 5): every tap is the 2D kernel divided by their number.
- random: 3D kernels keep their random start; the rest is copied as in tail.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from vae.reading import read_checkpoint

METHODS = ("tail", "average", "random")


def inflate(
    model: nn.Module, source: str | Path | dict[str, Tensor], method: str = "tail", image: bool = True
) -> dict[str, int]:
    """Fill an ODVAE (variants 1 to 4) from an image VAE of the same widths, in place.

    source: a folder of a diffusers AutoencoderKL, a CompVis checkpoint (.ckpt, .pt, .safetensors; keys may carry
    `first_stage_model.`), a folder of an OD-VAE of any variant (taken as the image VAE that it is on single frames),
    or a state dict of one of these namings. image: False refuses a source whose kernels extend in time.
    Returns how many tensors were copied, inflated ("tail", "average" or "random") and unsqueezed (given a time axis
    of size 1). Raises ValueError, naming tensors, unless every tensor of the model is covered and every shape fits.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: needs one of {', '.join(METHODS)}")
    # Every tensor of the model has one of the source, and none of the source is left over.
    tensors = image_vae_tensors(source, image)
    own = model.state_dict()
    names = {key: source_name(key, tensors) for key in own}
    missing = [key for key, name in names.items() if name is None]
    extra = sorted(set(tensors) - set(names.values()))
    if missing or extra:
        raise ValueError(
            f"the image VAE does not cover the model: {len(missing)} tensors of the model have no source "
            f"{missing[:4]}, {len(extra)} of the source have no place {extra[:4]}"
        )
    # Fit each tensor of the model from its source: copied, unsqueezed, or inflated by the method.
    report, filled, wrong_shapes = Counter(), {}, []
    for key, target in own.items():
        given = tensors[names[key]]
        op, value = _fit(given, target, method)
        if value is None:
            wrong_shapes.append(f"{key}: {tuple(given.shape)} for {tuple(target.shape)}")
            continue
        report[op] += 1
        filled[key] = value.to(target)
    if wrong_shapes:
        raise ValueError(
            f"{len(wrong_shapes)} tensors have the wrong shape, e.g. {'; '.join(wrong_shapes[:4])}"
        )
    model.load_state_dict(filled)
    return dict(report)


def source_name(key: str, tensors: dict[str, Tensor]) -> str | None:
    """Find the image VAE's (CompVis) name for a tensor of OD-VAE: the same, or without the `.conv` of a causal conv."""
    stripped = re.sub(r"\.conv\.(weight|bias)$", r".\1", key)
    return next((name for name in (key, stripped) if name in tensors), None)


def _fit(source: Tensor, target: Tensor, method: str) -> tuple[str, Tensor | None]:
    """Fit a tensor: (operation, tensor of the target's shape); the tensor is None if no rule fits."""
    if source.shape == target.shape:
        return "copied", source
    # A matrix for a 1 x 1 kernel.
    if target.ndim != 5:
        linear = source.ndim == 2 and target.shape == (*source.shape, 1, 1)
        return ("unsqueezed", source[..., None, None]) if linear else ("", None)
    if source.ndim == 2:  # attention projections, linear layers in diffusers
        source = source[..., None, None]
    if source.ndim != 4 or source.shape != target.shape[:2] + target.shape[3:]:
        return "", None
    # (out, in, h, w) -> (out, in, taps, h, w)
    taps = target.shape[2]
    if taps == 1:
        return "unsqueezed", source.unsqueeze(2)
    if method == "random":
        return method, target
    if method == "average":
        return method, (source / taps).unsqueeze(2).expand(target.shape)
    value = torch.zeros(target.shape, dtype=source.dtype, device=source.device)
    value[:, :, -1] = source
    return method, value


_DIFFUSERS_RULES = (
    (r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.up.{level}.block.\2."),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.{level}.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.(?:to_out\.0|proj_attn)\.", ".attn_1.proj_out."),
    (r"\.attn_1\.(?:to_)?(q|k|v)(?:uery|ey|alue)?\.", r".attn_1.\1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def compvis_name(key: str) -> str:
    """Translate a diffusers AutoencoderKL name into the CompVis one; CompVis names come back unchanged.

    diffusers counts up blocks from the deepest of the four levels, CompVis (and OD-VAE) from full resolution.
    """
    for pattern, replacement in _DIFFUSERS_RULES:
        found = re.search(pattern, key)
        if found and "{level}" in replacement:
            replacement = replacement.replace("{level}", str(3 - int(found.group(1))))
        key = re.sub(pattern, replacement, key)
    return key


def image_vae_tensors(source: str | Path | dict[str, Tensor], image: bool = True) -> dict[str, Tensor]:
    """Read an image VAE's tensors under CompVis names; the rest of a whole Stable Diffusion checkpoint is left out.

    image: False refuses a source whose kernels extend in time.
    """
    # The part of a whole Stable Diffusion checkpoint, or of a saved SDVAE.
    tensors = source if isinstance(source, dict) else _read(Path(source))
    for prefix in ("first_stage_model.", "autoencoder."):
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    tensors = {compvis_name(key): v for key, v in tensors.items() if isinstance(v, Tensor)}
    if not image and any(v.ndim == 5 and v.shape[2] > 1 for v in tensors.values()):
        name = "the weights" if isinstance(source, dict) else source
        raise ValueError(
            f"{name}: a video VAE; inflating it would add up its kernels over time. model.init=weights takes it as it is"
        )
    tensors = dict(_on_single_frames(key, tensors) for key in tensors)
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return {key: v for key, v in tensors.items() if key.startswith(parts)}


def _on_single_frames(key: str, tensors: dict[str, Tensor]) -> tuple[str, Tensor]:
    """Return CompVis name and value. An OD-VAE's causal kernel acts on a single frame, which fills every tap, by its sum."""
    value, weight = tensors[key], tensors.get(key.rpartition(".")[0] + ".weight")
    if weight is None or weight.ndim != 5:
        return key, value
    return re.sub(r"\.conv\.(weight|bias)$", r".\1", key), value.sum(2) if value.ndim == 5 else value


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a diffusers folder, or of a .safetensors / .ckpt / .pt / .bin file (weights only, no pickle code)."""
    if path.is_dir():
        names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: holds none of {', '.join(names)}; give the folder of an AutoencoderKL")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give an SD-VAE's diffusers folder or CompVis checkpoint")
    loaded = read_checkpoint(path)
    return loaded.get("state_dict", loaded)
