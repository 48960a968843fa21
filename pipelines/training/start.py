"""What a training begins with: networks built, initialized (paper 3.3) or taken from trained ones, and described.

config: a TrainVAEConfig or a TrainLatteConfig.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from data.core.files import read_json, sha256_of
from data.core.tensors import differences
from denoiser.latte import Latte
from eval.fidelity import check_lpips_size, load_lpips
from eval.weight_files import TRUNKS
from eval.weights import weights_line
from pipelines.training.distributed import accumulation_steps
from pipelines.training.folder import summary
from pipelines.training.latents import cache_fingerprint, cache_folder, cached_clips, draws
from pipelines.training.open import (
    check_clip,
    imagined_vae,
    open_vae,
    run_of,
    videos_line,
    warn_if_unfinished,
    weights_digest,
)
from pipelines.training.settings import Init, PerceptualNet, Train
from vae import load_vae
from vae.adapter import Adapted
from vae.inflate import inflate
from vae.interface import makes_latents
from vae.losses import LPIPSLoss
from vae.odvae import ODVAE
from vae.registry import adapted_class, vae_folder

log = logging.getLogger(__name__)
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS_TABLE = "y_embedder."


# ---- stage one -------------------------------------------------------------------------------------------


def is_adapted(vae: Any) -> bool:
    """Whether it is a video VAE of diffusers, not one of ours."""
    return isinstance(vae, Adapted)


def build_vae_model(config: Any) -> Any:
    """The OD-VAE of the config, or the VAE of diffusers whose folder init_from is; random weights.

    From a random start the latents have no known scale, so scaling_factor is None.
    """
    model = config.model
    if model.init is Init.weights and (cls := adapted_class(needed_source(config))):
        return cls.from_config(cls.load_config(model.init_from, local_files_only=True))
    # Ours, of the sizes in the settings.
    shape = {
        "variant": model.variant,
        "block_out_channels": tuple(model.block_out_channels),
        "layers_per_block": model.layers_per_block,
        "norm_num_groups": model.norm_num_groups,
    }
    scale = {"scaling_factor": None} if model.init is Init.random else {}
    return ODVAE.preset(model.preset, **shape, **scale)


def needed_source(config: Any) -> str:
    """model.init_from; ValueError when it is not given."""
    if not config.model.init_from:
        raise ValueError(
            f"model.init={config.model.init.value} needs model.init_from=FOLDER with SD2.1-VAE (docs/vaes.md says where it "
            "is), or with a video VAE for model.init=weights; model.init=random starts without it"
        )
    return config.model.init_from


def freeze(vae: Any, config: Any) -> None:
    """Leave to train what model.train says; ValueError for a VAE that is for evaluation only."""
    if not vae.trainable:
        raise ValueError(
            f"model.init_from={config.model.init_from}: {type(vae).__name__} cannot be trained here, only evaluated"
        )
    # auto: a VAE of diffusers keeps its encoder, so that latents of it stay valid; ours is trained whole.
    decoder_only = {Train.decoder: True, Train.all: False}.get(config.model.train, is_adapted(vae))
    for name, value in vae.named_parameters():
        value.requires_grad_(not (decoder_only and makes_latents(name)))


def initialize(vae: Any, config: Any) -> None:
    """Tail or average initialization from SD2.1-VAE, or a video VAE as it is; noise only when that is asked for."""
    init = config.model.init
    if init is Init.random:
        return
    source = needed_source(config)
    warn_if_unfinished(source)
    # A VAE of diffusers is taken as it is, a video VAE of ours strictly; an image VAE is inflated over time.
    if is_adapted(vae):
        vae.load_state_dict(load_vae(source).state_dict())
        log.info("weights of %s taken as they are", source)
        return
    if init is Init.weights:
        take_vae_weights(vae, source)
    else:
        report = inflate(vae, source, init.value, image=trained_on_single_frames(Path(source)))
        log.info("%s initialization from %s: %s", init.value, source, report)
    file = Path(source) / "config.json"
    if file.is_file():  # 0.18215 is right for SD's latents, not for those of an image VAE trained here
        vae.register_to_config(scaling_factor=read_json(file).get("scaling_factor"))


def take_vae_weights(vae: ODVAE, folder: str) -> None:
    """All tensors of a trained OD-VAE of the same design. Raises ValueError with what differs."""
    given = load_vae(folder)
    if not isinstance(given, ODVAE):
        raise ValueError(
            f"model.init=weights model.init_from={folder}: a {type(given).__name__}, neither an OD-VAE nor a video VAE of "
            "diffusers"
        )
    # The same design: all settings but those that follow from the data. A saved tuple comes back as a list.
    data_bound, differing = {"scaling_factor", "latents_mean", "latents_std"}, []
    for key, value in vae.config.items():
        ours = list(value) if isinstance(value, tuple) else value
        theirs = given.config.get(key)
        theirs = list(theirs) if isinstance(theirs, tuple) else theirs
        if ours != theirs and not key.startswith("_") and key not in data_bound:
            differing.append(f"{key}: {theirs} there, {ours} here")
    if differing:
        raise ValueError(f"model.init_from={folder} is another OD-VAE ({'; '.join(differing[:4])})")
    vae.load_state_dict(given.state_dict())
    log.info("weights of %s taken as they are", folder)


def trained_on_single_frames(source: Path) -> bool:
    """Whether an OD-VAE is an image VAE: its export, or the settings of its run, say clips of one frame."""
    run = run_of(source)
    return run.get("num_frames", (run.get("clip") or {}).get("num_frames")) == 1


def vae_start_digest(config: Any) -> str | None:
    """sha256 of the weights that a run begins with; None from noise, or when they are not there any more."""
    source = Path(config.model.init_from)
    if config.model.init is Init.random or not config.model.init_from:
        return None
    file = source / WEIGHTS if source.is_dir() else source
    return sha256_of(file) if file.is_file() else None


def lpips_networks(config: Any, device: torch.device) -> tuple[LPIPSLoss | None, Any, dict[str, dict]]:
    """(loss, judge of the validations, which weights they have): None for what the settings leave out.

    It draws random numbers, so it comes before the seed. ValueError when clips are too small or weights are missing.
    """
    loss, perceptual, judge, weights = config.loss, None, None, {}
    if config.val_lpips or (loss.perceptual_weight > 0 and loss.perceptual_net is PerceptualNet.alex):
        check_lpips_size(config.clip.size, config.clip.size)
    # The network of the loss, then that of the validations, which is always AlexNet.
    if loss.perceptual_weight > 0:
        network, found = load_lpips(loss.perceptual_weights or None, device, loss.perceptual_net.value)
        perceptual, weights["loss"] = LPIPSLoss(network, config.gradient_checkpointing), found.as_dict()
    if config.val_lpips:
        judge, found = load_lpips(None, device)
        weights["val_lpips"] = found.as_dict()
    return perceptual, judge, weights


def describe_vae_run(config: Any) -> str:
    """The resolved settings, sizes, schedule, videos and missing weights, for --dry-run; nothing is allocated."""
    # The model without memory for its weights, and what of it is trained
    with torch.device("meta"):
        vae = build_vae_model(config)
    check_clip(vae, config.clip)
    freeze(vae, config)
    # Sizes, for the text
    side = config.clip.size // vae.spatial_compression_ratio
    latent = (vae.latent_frames(config.clip.num_frames), side, side)
    count, trained = vae.num_parameters(), vae.num_parameters(only_trainable=True)
    name = type(vae).__name__ if is_adapted(vae) else f"OD-VAE variant {config.model.variant}"
    accumulation = accumulation_steps(config.global_batch, config.micro_batch, 1)
    return (
        f"{summary(config)}\n\n{name}: {count:,} parameters{f', {trained:,} of them trained' if trained < count else ''}; "
        f"clip 3 x {config.clip.num_frames} x {config.clip.size} x {config.clip.size} -> latent {vae.latent_channels}"
        f" x {' x '.join(map(str, latent))}\n{config.steps:,} steps of {config.global_batch} clips "
        f"(1 process: micro-batch {config.micro_batch}, accumulation {accumulation})\n"
        f"{videos_line(config, config.source.val_fraction > 0)}{lpips_lines(config)}"
    )


def lpips_lines(config: Any) -> str:
    """A line for each LPIPS network that the run needs: its file, or that it is missing."""
    loss, lines = config.loss, ""
    if loss.perceptual_weight > 0:
        net = loss.perceptual_net.value
        lines += f"\nLPIPS of the loss ({net}): {weights_line(TRUNKS[net], loss.perceptual_weights or None)}"
    if config.val_lpips:
        lines += f"\nLPIPS of the validations (alex): {weights_line('alexnet')}"
    return lines


# ---- stage two -------------------------------------------------------------------------------------------


def build_latte(config: Any, vae: Any, num_classes: int | None) -> Latte:
    """The denoiser for the latents of `vae`: geometry from the VAE and the clip, size from the config."""
    side = config.clip.size // vae.spatial_compression_ratio
    geometry = {
        "in_channels": vae.latent_channels,
        "num_frames": vae.latent_frames(config.clip.num_frames),
        "sample_size": side,
        "num_classes": num_classes,
        "class_dropout_prob": config.denoiser.label_dropout,
    }
    d = config.denoiser
    if d.size != "custom":
        return Latte.from_size(d.size, **geometry)
    numbers = {k: getattr(d, k) for k in ("depth", "hidden_size", "num_heads", "patch_size")}
    if min(numbers.values()) < 1:
        raise ValueError(
            f"denoiser.size=custom needs denoiser.depth, hidden_size, num_heads and patch_size; got {numbers}"
        )
    return Latte(**numbers, **geometry)


def take_latte_weights(latte: Latte, folder: str, class_names: list[str], vae: Any) -> None:
    """The weights of a trained Latte of the same design; the class table too if it is of the same classes.

    folder: of a pipeline, whose class names and VAE are known, or of the denoiser alone: then as many classes are the same
    ones. vae: of this run; its latents must be those of the pipeline's. Raises ValueError with what differs.
    """
    given, same = Path(folder), None
    warn_if_unfinished(folder)
    # A pipeline says of which classes and on whose latents its denoiser learned.
    if (given / "model_index.json").is_file():
        names = read_json(given / "model_index.json").get("class_names") or []
        names = names.values() if isinstance(names, dict) else names  # a dict in an export
        same = list(names) == class_names
        theirs = load_vae(given / "vae")
        if weights_digest(theirs, makes_latents) != weights_digest(vae, makes_latents):
            raise ValueError(
                f"denoiser.init_from={folder}: learned on the latents of another VAE ({type(theirs).__name__} there, "
                f"{type(vae).__name__} here); its transformer/ alone is taken as it is"
            )
        given = given / "transformer"
    file = given / "config.json"
    if not file.is_file() or read_json(file).get("_class_name") != "Latte":
        raise ValueError(f"denoiser.init_from={folder}: neither a pipeline nor a Latte")
    # The same network, but for the table of the classes where these are others
    given = Latte.from_pretrained(given)
    same = given.config.num_classes == latte.config.num_classes if same is None else same
    theirs, ours = given.state_dict(), latte.state_dict()
    kept: dict[str, torch.Tensor] = {}
    if not same:
        kept, ours = _split(ours)
        _, theirs = _split(theirs)
    wrong = differences(ours, theirs)
    if not wrong and given.config.patch_size != latte.config.patch_size:
        wrong = "patch_size"
    if wrong:
        raise ValueError(f"denoiser.init_from={folder} is another Latte ({wrong})")
    latte.load_state_dict(theirs | kept)
    more = "" if same else "; other classes: their table is made again"
    log.info("weights of %s taken as they are%s", folder, more)


def _split(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the table of the classes, everything else) of a Latte's weights."""
    table = {key: value for key, value in state.items() if key.startswith(CLASS_TABLE)}
    return table, {key: value for key, value in state.items() if key not in table}


def latte_start_digest(config: Any) -> str | None:
    """sha256 of the weights that a run begins with; None from noise, or when they are not there any more."""
    given = Path(config.denoiser.init_from)
    for file in (given / "transformer" / WEIGHTS, given / WEIGHTS) if config.denoiser.init_from else ():
        if file.is_file():
            return sha256_of(file)
    return None


def describe_latte_run(config: Any) -> str:
    """Settings, sizes, cache size and schedule, for --dry-run; nothing is trained or written, and the VAE's weights may be missing."""
    # Without the VAE's weights its sizes are enough.
    lacking = missing_weights(config.vae)
    if lacking:
        with torch.device("meta"):
            vae = imagined_vae(config.vae)
    else:
        vae = open_vae(config.vae)
    check_clip(vae, config.clip)
    # The videos, and the denoiser for their latents, without memory for its weights
    clips = cached_clips(config)
    classes = len(clips.source.class_names) or None
    with torch.device("meta"):
        latte = build_latte(config, vae, classes)
    count = latte.num_parameters()
    # The cache: its folder and its size on the disk
    cache = config.cache.dir or "(its folder is named after the weights)"
    if not lacking:
        cache = str(cache_folder(config, cache_fingerprint(config, vae, clips)))
    latent = (latte.config.in_channels, latte.config.num_frames, *latte.latent_hw)
    entries = len(clips) * draws(config)
    size = entries * 2 * math.prod(latent) * (4 if config.cache.dtype == "float32" else 2)
    epoch = len(clips) / config.global_batch
    accumulation_steps(config.global_batch, config.micro_batch, 1)
    return (
        f"{summary(config)}\n\nLatte {config.denoiser.size}: {count:,} parameters, latent {' x '.join(map(str, latent))}, "
        f"{classes or 'no'} classes\n{len(clips)} videos ({len(clips.short)} too short, {len(clips.source.damaged)} damaged); "
        f"cache {cache}: {entries:,} clips, {size:,} bytes\n"
        f"{config.steps:,} steps of {config.global_batch} clips, {epoch:,.1f} steps per pass over the videos, mode {config.mode.value}{lacking}"
    )


def missing_weights(config: Any) -> str:
    """A line that says which VAE's weights are missing and where they are to be had; "" when they are there."""
    try:
        vae_folder(config.name, config.path or None)
    except ValueError as error:
        return f"\n{error}"
    return ""
