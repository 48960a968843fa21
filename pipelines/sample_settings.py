"""Settings of the program that generates videos, pipelines/sample.py."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.config import option
from pipelines.settings import Precision, check_groups


@dataclass
class SampleConfig:
    pipeline: str = option("runs/latte/pipeline", "folder of a LatentVideoPipeline")
    transformer: str = option("", "other denoiser weights, e.g. a checkpoint's latte or latte_ema folder")
    out: str = option("", "folder of the videos; empty: <pipeline>/../samples")
    num_videos: int = option(2048, "how many; more later adds to the same folder")
    batch: int = option(4, "videos denoised at once")
    seed: int = option(0, "video i draws from (seed, i)")
    sampler: str = option("ddpm", "ddpm|ddim|ddim_upstream")
    num_steps: int = option(250, "sampling steps")
    guidance_scale: float = option(
        1.0, "classifier-free guidance; 1 turns it off (Latte evaluates UCF101 with 7)"
    )
    labels: list[str] = option([], "class names or ids to generate; empty: all, in turn")
    precision: Precision = option(Precision.fp32, "of the denoiser and decoder: fp32|tf32|bf16")
    tiling_frames: int = option(
        0, "decode in temporal groups of so many frames (odvae; paper 3.3: 33); 0: off"
    )
    fps: float = option(8.0, "frames per second written into the files")

    def __post_init__(self):
        for name in ("num_videos", "batch", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        check_groups(self.tiling_frames, "tiling_frames")

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else Path(self.pipeline).parent / "samples"
