"""The OD-VAE that a run of stage one begins with: built, initialized (paper 3.3), and described before it is."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from eval.fidelity import check_lpips_size, load_lpips
from eval.weight_files import TRUNKS
from eval.weights import weights_line
from pipelines.engine import accumulation_steps
from pipelines.run import summary
from pipelines.settings import check_clip
from pipelines.vae_settings import Init, PerceptualNet, TrainVAEConfig
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
    """Tail or average initialization from SD2.1-VAE; refuses to start from noise unless that is asked for."""
    if config.model.init is Init.random:
        return
    if not config.model.init_from:
        raise ValueError(
            f"model.init={config.model.init.value} needs model.init_from=FOLDER with SD2.1-VAE "
            "(docs/vaes.md says where it is); model.init=random starts without it"
        )
    report = inflate(vae, config.model.init_from, method=config.model.init.value)
    file = Path(config.model.init_from) / "config.json"
    if file.is_file():  # 0.18215 is right for SD's latents, not for those of an image VAE trained here
        vae.register_to_config(scaling_factor=json.loads(file.read_text()).get("scaling_factor"))
    log.info("%s initialization from %s: %s", config.model.init.value, config.model.init_from, report)


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
