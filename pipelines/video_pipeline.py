"""LatentVideoPipeline: labels and seeds in, videos out; a diffusers pipeline of a video VAE and a Latte.

pipe = LatentVideoPipeline.from_pretrained("runs/latte/pipeline")
videos = pipe(labels=[0, 1], seeds=[0, 1], guidance_scale=4.0).videos   # (2, 3, T, H, W) in [-1, 1]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from data.core.files import read_json
from denoiser.latte import Latte
from denoiser.sampling import make_scheduler, sample_latents
from vae import CVVAE, ODVAE, OPSVAE, SDVAE, SVDVAE, adapter
from vae.interface import VideoVAE

VAES = (
    ODVAE,
    SDVAE,
    SVDVAE,
    CVVAE,
    OPSVAE,
)  # from_pretrained finds a component's class only if it is imported


@dataclass
class VideoPipelineOutput(BaseOutput):
    """videos: (N, 3, T, H, W) float32 in [-1, 1], on the CPU. latents: (N, C, t, h, w), as the denoiser made them."""

    videos: Tensor
    latents: Tensor


class LatentVideoPipeline(DiffusionPipeline):
    """vae: any continuous VideoVAE with a scaling rule. transformer: a Latte. class_names: [] when unconditional."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, vae: VideoVAE, transformer: Latte, class_names: list[str] | None = None):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer)
        self.register_to_config(class_names=list(class_names or []))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "LatentVideoPipeline":
        """A saved pipeline. ValueError when model_index.json names other classes or code lies in the folder.

        diffusers imports any module that is named there, and before 0.38 runs code it finds beside the weights.
        """
        index = Path(folder) / "model_index.json"
        if index.is_file():
            named = read_json(index)
            if named.get("_class_name") != cls.__name__:
                raise ValueError(f"{index}: {named.get('_class_name')} is not that of a {cls.__name__}")
            if code := sorted(Path(folder).rglob("*.py")):
                raise ValueError(f"{code[0]}: code in the folder of a pipeline is never run; remove it")
            allowed = {"transformer": [Latte], "vae": VAES}
            known = {part: [[c.__module__, c.__name__] for c in classes] for part, classes in allowed.items()}
            known["vae"] += [[adapter.__name__, name] for name in adapter.ROWS]
            for part, classes in known.items():
                if named.get(part) not in classes:
                    raise ValueError(f"{index}: {part} is {named.get(part)}, not a class of this project")
        return super().from_pretrained(folder, **kwargs)

    def labels(self, wanted: Sequence[int | str] | None, count: int) -> Tensor | None:
        """Class ids or names as (N,) int64; None: every class in turn, or none for an unconditional model."""
        classes = self.transformer.config.num_classes
        if classes is None:
            if wanted is not None:
                raise ValueError(f"labels={list(wanted)}: this model is unconditional, leave labels out")
            return None
        if wanted is None:
            return torch.arange(count) % classes
        names, ids = list(self.config.class_names), []
        for label in wanted:
            if isinstance(label, str):
                if label not in names:
                    raise ValueError(
                        f"label {label!r}: the classes are {', '.join(names) or 'unnamed, use ids'}"
                    )
                label = names.index(label)
            if not 0 <= int(label) < classes:
                raise ValueError(f"label {label}: this model has classes 0 .. {classes - 1}")
            ids.append(int(label))
        return torch.tensor(ids, dtype=torch.int64)

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int | str] | None = None,
        num_videos: int = 1,
        seeds: Sequence[int] | None = None,
        sampler: str = "ddpm",
        num_steps: int = 250,
        guidance_scale: float = 1.0,
        progress: bool = False,
    ) -> VideoPipelineOutput:
        """Generate videos. Video i depends on seeds[i] and its label only, not on what else is in the batch.

        labels: class ids or names, one each; None: every class in turn. num_videos: used when labels is None.
        seeds: one each, default 0, 1, ... sampler: "ddpm" (ancestral, the paper's 250 steps), "ddim", "ddim_upstream".
        guidance_scale: classifier-free guidance; 1 = off. Raises ValueError for labels the model does not have.
        """
        count = num_videos if labels is None else len(labels)
        seeds = list(range(count)) if seeds is None else list(seeds)
        if len(seeds) != count:
            raise ValueError(f"{len(seeds)} seeds for {count} videos: give one each")
        config = self.transformer.config
        latents = sample_latents(
            self.transformer,
            (count, config.in_channels, config.num_frames, *self.transformer.latent_hw),
            self.labels(labels, count),
            make_scheduler(sampler, num_steps),
            guidance_scale,
            generators=[torch.Generator().manual_seed(s) for s in seeds],
            progress=self.progress_bar if progress else None,
        )
        return VideoPipelineOutput(videos=self.decode_latents(latents), latents=latents.cpu())

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Denoiser latents (N, C, t, h, w) to videos (N, 3, T, H, W) in [-1, 1], one at a time, on the CPU.

        An OD-VAE that can be streamed and does not tile hands over four frames at a time: the device never holds a
        whole video.
        """
        z = self.vae.denormalize(latents).to(self.vae.dtype)
        device = z.device.type
        # half-precision weights say what is wanted; a caller's autocast would run the norms between in float32
        wanted = torch.is_autocast_enabled(device) and z.dtype == torch.float32
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=wanted):
            return torch.cat([torch.cat(list(self._decoded(one[None])), dim=2) for one in z])

    def _decoded(self, z: Tensor) -> Iterator[Tensor]:
        """Frames of (1, C, t, h, w) in pieces (1, 3, n, H, W), in [-1, 1], on the CPU."""
        streams = isinstance(self.vae, ODVAE) and self.vae.causal and not self.vae.tiling_groups
        for frames in self.vae.stream_decode([z]) if streams else [self.vae.decode(z).sample]:
            yield frames.float().clamp(-1, 1).cpu()
