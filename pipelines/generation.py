"""What LatentVideoPipeline does, from labels and seeds to videos. An export takes this file along (pipelines/results/bundle.py).

It knows its VAE and its denoiser by what they answer only (vae/interface.py, denoiser/latte.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from denoiser.sampling import make_scheduler, sample_latents

OUTPUT_TYPES = ("pil", "np", "pt", "video", "latent")


@dataclass
class VideoPipelineOutput(BaseOutput):
    """frames, as output_type asks, on the CPU.

    "pil": N lists of T images. "np", "pt": (N, T, H, W, 3) or (N, T, 3, H, W) float32 in [0, 1]. "video":
    (N, 3, T, H, W) float32 in [-1, 1], as this project's VAEs take it. "latent": (N, C, t, h, w), for `decode_latents`.
    """

    frames: Any


class LatentVideoPipeline(DiffusionPipeline):
    """Generate videos: what an export carries. In this project use that of pipelines/video_pipeline.py, which loads safely.

    vae: any continuous VideoVAE with a scaling rule. transformer: a Latte. class_names: [] when unconditional.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers reads it)

    def __init__(
        self,
        vae: nn.Module,
        transformer: nn.Module,
        class_names: Sequence[str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer)
        # an export has {"0": name, ...}: diffusers takes every list in a model_index.json for a component
        names = class_names.values() if isinstance(class_names, dict) else class_names or []
        self.register_to_config(class_names=list(names))

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs or ran last; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs or ran last."""
        return self._num_timesteps

    def labels(self, wanted: Tensor | Sequence[int | str] | int | str | None, count: int) -> Tensor | None:
        """Class ids or names as (N,) int64; None: every class in turn, or none for an unconditional model."""
        # What an unconditional model cannot have, and the default of the others.
        classes = self.transformer.config.num_classes
        if classes is None:
            if wanted is not None:
                raise ValueError(
                    f"class_labels={wanted}: this model is unconditional, leave class_labels out"
                )
            return None
        if wanted is None:
            return torch.arange(count) % classes
        # Names become ids.
        names, ids = list(self.config.class_names), []
        for label in _listed(wanted):
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
        class_labels: Tensor | Sequence[int | str] | int | str | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        num_videos: int = 1,
        seeds: Sequence[int] | None = None,
        sampler: str = "ddpm",
    ) -> VideoPipelineOutput | tuple[Any]:
        """Generate videos. Video i depends on seeds[i] and its label only, not on what else is in the batch.

        class_labels: class ids or names, one each; None: every class in turn, num_videos of them.
        num_inference_steps: 250 are the paper's. guidance_scale: classifier-free guidance; 1 = off.
        generator: one per video, in place of seeds, or one for all, whose videos depend on their batch.
        latents: the noise to start from, (N, C, t, h, w). output_type: what VideoPipelineOutput says.
        return_dict: False gives the tuple (frames,). callback_on_step_end: called after each step as (pipeline, number,
        timestep, {"latents": x}); the latents of the dict it returns are taken over.
        seeds: one per video, default 0, 1, ... sampler: "ddpm" (ancestral), "ddim", "ddim_upstream".
        Raises ValueError for labels that the model does not have, and for counts that differ.
        """
        # Wrong arguments show before the network runs.
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: one of {', '.join(OUTPUT_TYPES)}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: no {', '.join(sorted(unknown))}; only latents"
            )
        # How many videos, and the random numbers of each.
        count = num_videos if latents is None else len(latents)
        count = count if class_labels is None else len(_listed(class_labels))
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator: give one of them")
        if generator is None:
            generator = [torch.Generator().manual_seed(s) for s in (range(count) if seeds is None else seeds)]
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(f"{len(generator)} seeds or generators for {count} videos: give one each")
        # The denoising, step by step; a callback may look at the latents, and change them.
        config, scheduler = self.transformer.config, make_scheduler(sampler, num_inference_steps)
        self._guidance_scale, self._num_timesteps = guidance_scale, num_inference_steps

        def on_step(i: int, t: int, x: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return x
            kept = {"latents": x} if "latents" in callback_on_step_end_tensor_inputs else {}
            return (callback_on_step_end(self, i, t, kept) or {}).get("latents", x)

        latents = sample_latents(
            self.transformer,
            (count, config.in_channels, config.num_frames, *self.transformer.latent_hw),
            self.labels(class_labels, count),
            scheduler,
            lambda: self._guidance_scale,
            generators=generator,
            latents=latents,
            progress=self.progress_bar,
            on_step=on_step,
            device=self._execution_device,
        )
        # Latents to videos, in the form that was asked for.
        frames = latents.cpu() if output_type == "latent" else self.decode_latents(latents)
        if output_type in ("pil", "np", "pt"):
            frames = VideoProcessor(do_resize=False).postprocess_video(frames, output_type)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=frames) if return_dict else (frames,)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Denoiser latents (N, C, t, h, w) to videos (N, 3, T, H, W) in [-1, 1], one at a time, on the CPU.

        A VAE that can be streamed makes a few frames at a time; a video is copied once, when it is whole.
        """
        z = self.vae.denormalize(latents.to(self._execution_device)).to(self.vae.dtype)
        device = z.device.type
        # half-precision weights say what is wanted; a caller's autocast would run the norms between in float32
        wanted = torch.is_autocast_enabled(device) and z.dtype == torch.float32
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=wanted):
            return torch.cat([torch.cat(list(self._decoded(one[None])), dim=2).cpu().float() for one in z])

    def _decoded(self, z: Tensor) -> Iterator[Tensor]:
        """Frames of (1, C, t, h, w) in pieces (1, 3, n, H, W), in [-1, 1]."""
        streams = getattr(self.vae, "can_stream", False)
        for frames in self.vae.stream_decode([z]) if streams else [self.vae.decode(z).sample]:
            yield frames.clamp(-1, 1)


def _listed(labels: Tensor | Sequence[int | str] | int | str) -> list[int | str]:
    if isinstance(labels, Tensor):
        return labels.reshape(-1).tolist()
    return [labels] if isinstance(labels, (int, str)) else list(labels)
