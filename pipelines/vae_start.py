"""The OD-VAE that a run of stage one begins with: built, initialized (paper 3.3), and described before it is."""

import logging
from pathlib import Path
from typing import Any

import torch

from data.files import read_json, sha256_of
from eval.fidelity import check_lpips_size, load_lpips
from eval.weight_files import TRUNKS
from eval.weights import weights_line
from pipelines.config import read_yaml
from pipelines.engine import accumulation_steps
from pipelines.run import summary
from pipelines.settings import check_clip
from pipelines.vae_settings import Init, PerceptualNet, TrainVAEConfig
from vae import load_vae
from vae.inflate import inflate
from vae.losses import LPIPSLoss
from vae.odvae import ODVAE

log = logging.getLogger(__name__)


def build_vae_model(config: TrainVAEConfig) -> ODVAE:
    """The OD-VAE of the config. From a random start the latents have no known scale, so scaling_factor is None."""
    model = config.model
    shape = {
        "variant": model.variant,
        "block_out_channels": tuple(model.block_out_channels),
        "layers_per_block": model.layers_per_block,
        "norm_num_groups": model.norm_num_groups,
    }
    return ODVAE.preset(
        model.preset, **shape, **({"scaling_factor": None} if model.init is Init.random else {})
    )


def initialize(vae: ODVAE, config: TrainVAEConfig) -> None:
    """Tail or average initialization from SD2.1-VAE, or an OD-VAE as it is; noise only when that is asked for."""
    init, source = config.model.init, config.model.init_from
    if init is Init.random:
        return
    if not source:
        raise ValueError(
            f"model.init={init.value} needs model.init_from=FOLDER with SD2.1-VAE (docs/vaes.md says where it is), or with "
            "an OD-VAE for model.init=weights; model.init=random starts without it"
        )
    if init is Init.weights:
        take_weights(vae, source)
    else:
        report = inflate(vae, source, init.value, image=trained_on_single_frames(Path(source)))
        log.info("%s initialization from %s: %s", init.value, source, report)
    file = Path(source) / "config.json"
    if file.is_file():  # 0.18215 is right for SD's latents, not for those of an image VAE trained here
        vae.register_to_config(scaling_factor=read_json(file).get("scaling_factor"))


def take_weights(vae: ODVAE, folder: str) -> None:
    """All tensors of a trained OD-VAE of the same design. Raises ValueError with what differs."""
    given = load_vae(folder)
    if not isinstance(given, ODVAE):
        raise ValueError(
            f"model.init=weights model.init_from={folder}: a {type(given).__name__}, not an OD-VAE"
        )
    data_bound = {"scaling_factor", "latents_mean", "latents_std"}
    ours, theirs = (
        {k: list(v) if isinstance(v, tuple) else v for k, v in m.config.items()} for m in (vae, given)
    )
    design = [k for k in ours if not k.startswith("_") and k not in data_bound]
    differing = [f"{k}: {theirs.get(k)} there, {ours[k]} here" for k in design if theirs.get(k) != ours[k]]
    if differing:
        raise ValueError(f"model.init_from={folder} is another OD-VAE ({'; '.join(differing[:4])})")
    vae.load_state_dict(given.state_dict())
    log.info("weights of %s taken as they are", folder)


def trained_on_single_frames(source: Path) -> bool:
    """Whether an OD-VAE is an image VAE: its export, or the settings of its run, say clips of one frame."""
    for file, read in ((source / "export.json", read_json), (source.parent / "config.yaml", read_yaml)):
        if file.is_file():
            content = read(file)
            frames = content.get("num_frames", (content.get("clip") or {}).get("num_frames"))
            if frames is not None:
                return frames == 1
    return False


def start_digest(config: TrainVAEConfig) -> str | None:
    """sha256 of the weights that a run begins with; None from noise, or when they are not there any more."""
    source = Path(config.model.init_from)
    if config.model.init is Init.random or not config.model.init_from:
        return None
    file = source / "diffusion_pytorch_model.safetensors" if source.is_dir() else source
    return sha256_of(file) if file.is_file() else None


def lpips_networks(
    config: TrainVAEConfig, device: torch.device
) -> tuple[LPIPSLoss | None, Any, dict[str, dict]]:
    """(loss, judge of the validations, which weights they have): None for what the settings leave out.

    It draws random numbers, so it comes before the seed. ValueError when clips are too small or weights are missing.
    """
    loss, perceptual, judge, weights = config.loss, None, None, {}
    if config.val_lpips or (loss.perceptual_weight > 0 and loss.perceptual_net is PerceptualNet.alex):
        check_lpips_size(config.clip.size, config.clip.size)
    if loss.perceptual_weight > 0:
        network, found = load_lpips(loss.perceptual_weights or None, device, loss.perceptual_net.value)
        perceptual, weights["loss"] = LPIPSLoss(network), found.as_dict()
    if config.val_lpips:
        judge, found = load_lpips(None, device)
        weights["val_lpips"] = found.as_dict()
    return perceptual, judge, weights


def plan(config: TrainVAEConfig) -> str:
    """The resolved settings, sizes, schedule and missing weights, for --dry-run; nothing is allocated."""
    with torch.device("meta"):
        vae = build_vae_model(config)
    check_clip(vae, config.clip)
    latent = (vae.latent_frames(config.clip.num_frames), config.clip.size // 8, config.clip.size // 8)
    count = sum(p.numel() for p in vae.parameters())
    accumulation = accumulation_steps(config.global_batch, config.micro_batch, 1)
    return (
        f"{summary(config)}\n\nOD-VAE variant {config.model.variant}: {count:,} parameters; "
        f"clip 3 x {config.clip.num_frames} x {config.clip.size} x {config.clip.size} -> latent {vae.config.latent_channels}"
        f" x {' x '.join(map(str, latent))}\n{config.steps:,} steps of {config.global_batch} clips "
        f"(1 process: micro-batch {config.micro_batch}, accumulation {accumulation}){lpips_lines(config)}"
    )


def lpips_lines(config: TrainVAEConfig) -> str:
    """A line for each LPIPS network that the run needs: its file, or that it is missing."""
    loss, lines = config.loss, ""
    if loss.perceptual_weight > 0:
        net = loss.perceptual_net.value
        lines += f"\nLPIPS of the loss ({net}): {weights_line(TRUNKS[net], loss.perceptual_weights or None)}"
    if config.val_lpips:
        lines += f"\nLPIPS of the validations (alex): {weights_line('alexnet')}"
    return lines
