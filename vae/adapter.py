"""diffusers' video autoencoders as VAEs of this project: one row of ROWS per class, one mixin for all.

`adapted(name)` is a subclass of diffusers' class with the same name, config and tensors, so what it saves opens in plain
diffusers, and what diffusers saves opens here. It refuses clips that diffusers would cut without a word, and its outputs
are those of diffusers bit for bit, in eval mode and without gradients.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - a pipeline looks here for what can load it
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vae.chunks import Chunks, KVAEChunks, MagvitChunks, WanChunks
from vae.interface import PointPosterior, VideoGaussian, VideoVAE

Config = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What is particular to a class of diffusers.

    name: for --vae. ratios: (time, side) of a config. group: frames that a clip may grow by, where it is not the ratio in
    time. causal: neither latents nor decoded frames depend on later frames. posterior: False where the encoder gives a
    point, no Gaussian. chunks: how its encoder and decoder take a clip piece by piece with features carried on, for those
    that cannot be checkpointed block by block. trainable: False for evaluation only.
    """

    name: str
    source: str
    ratios: Callable[[Config], tuple[int, int]]
    group: Callable[[Config], int] | None = None
    causal: bool = False
    posterior: bool = True
    chunks: type[Chunks] | None = None
    trainable: bool = True


# ---- the mixin -------------------------------------------------------------------------------------------


class Adapted(VideoVAE):
    """What `adapted` puts before diffusers' class: the interface of VideoVAE. `row` is its row of ROWS.

    So `super()` here, and `super(Adapted, self)` in the classes below, is diffusers' class.
    """

    row: Row

    # diffusers' __init__ sets these two; some say what the network does not do, so the row's answer stands.
    @property
    def spatial_compression_ratio(self) -> int:
        return self.row.ratios(self.config)[1]

    @property
    def temporal_compression_ratio(self) -> int:
        return self.row.ratios(self.config)[0]

    @spatial_compression_ratio.setter
    def spatial_compression_ratio(self, value: Any) -> None:
        pass

    @temporal_compression_ratio.setter
    def temporal_compression_ratio(self, value: Any) -> None:
        pass

    @property
    def causal(self) -> bool:
        return self.row.causal

    @property
    def trainable(self) -> bool:
        return self.row.trainable

    @property
    def has_posterior(self) -> bool:
        return self.row.posterior

    @property
    def clip_lengths(self) -> tuple[int, int]:
        return self.row.group(self.config) if self.row.group else self.temporal_compression_ratio, 1

    @property
    def frame_rule(self) -> str:
        group, first = self.clip_lengths
        return f"{group}n+{first}" if first else f"{group}n"

    @property
    def last_decoder_layer(self) -> nn.Parameter:
        """Return the weight of the decoder's last layer, which balances the adversarial term."""
        layer = self.decoder.conv_out if hasattr(self.decoder, "conv_out") else self.decoder.proj_out
        return next(p for name, p in layer.named_parameters() if name.endswith("weight"))

    # ---- encode, decode ----------------------------------------------------------------------------------

    def _clean(self) -> None:
        """Drop features that diffusers' code has left in the modules: a failed clip would spoil the next."""
        for name in ("clear_cache", "_clear_conv_cache"):
            getattr(self, name, lambda: None)()
        for stage in (self.encoder, self.decoder) if hasattr(self, "_empty_causal_cached") else ():
            self._empty_causal_cached(stage)

    def _moments(self, x: Tensor) -> Tensor:
        """Compute (B, 2C or C, t, h, w) as diffusers does."""
        return super().encode(x).latent_dist.parameters

    def _pixels(self, z: Tensor) -> Tensor:
        return super().decode(z).sample

    def _in_pieces(self, stage: str, x: Tensor) -> Tensor | None:
        """Compute a stage by the row's chunks in training; None: diffusers' own way is right.

        Also where a step in training mode records no gradient: a discriminator must see what the generator is judged on.
        """
        recorded = torch.is_grad_enabled()
        if self.row.chunks is None or not (recorded or self.training):
            return None
        return self.row.chunks(self, stage)(x, recorded and getattr(self, "gradient_checkpointing", False))

    def _one_by_one(self, stage: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a stage that takes one clip only."""
        return torch.cat([stage(one) for one in x.split(1)])

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True):
        """Encode x (B, 3, T, H, W) in [-1, 1] to a posterior over (B, C, t, h, w).

        ValueError for a clip that would be cut.
        """
        self.check_video(x)
        # By pieces for a training step, else as diffusers does.
        try:
            moments = self._in_pieces("encoder", x)
            moments = self._moments(x) if moments is None else moments
        finally:
            self._clean()
        # Moments (B, 2C, t, h, w); of an encoder that gives a point, the first C channels.
        if self.has_posterior:
            posterior = VideoGaussian(moments)
        else:
            posterior = PointPosterior(moments[:, : self.latent_channels])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True):
        """Decode z (B, C, t, h, w) to DecoderOutput of (B, 3, T, H, W); in training before a final clamp, if there is one."""
        self.check_frames(self.check_latents(z, num_frames))
        try:
            pixels = self._in_pieces("decoder", z)
            pixels = self._pixels(z) if pixels is None else pixels
        finally:
            self._clean()
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def enable_gradient_checkpointing(self, *args: Any) -> None:
        """Recompute activations in backward: piece by piece where the row has chunks, else diffusers' own blocks."""
        if self.row.chunks is None:
            return super().enable_gradient_checkpointing(*args)
        self.gradient_checkpointing = True

    def enable_tiling(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{type(self).__name__}: temporal groups are OD-VAE's; its own tiling is not exact")

    # ---- scaling -----------------------------------------------------------------------------------------

    def _latent_statistics(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and std of buffers or the config, std over the scaling factor: one per channel, or per channel and frame."""
        rule = self.latent_rule()
        if rule["latents_mean"] is None or rule["latents_std"] is None:
            return None

        def for_clip(values: list) -> Tensor:
            # (1, C, 1, 1, 1), or (1, C, t, 1, 1) of as many latent frames as z has
            values = torch.tensor(values, dtype=z.dtype).view(1, self.latent_channels, -1, 1, 1)
            if 1 < values.shape[2] < z.shape[2]:
                raise ValueError(
                    f"{z.shape[2]} latent frames: {type(self).__name__} has statistics of {values.shape[2]} frames"
                )
            return values[:, :, : z.shape[2]].to(z.device)

        mean, std = for_clip(rule["latents_mean"]), for_clip(rule["latents_std"])
        return mean, std / (rule["scaling_factor"] or 1.0)

    def latent_rule(self) -> Config:
        rule = super().latent_rule()
        # Statistics in buffers (LTX) count before those of the config.
        for key in ("latents_mean", "latents_std"):
            if key in self._buffers:
                rule[key] = self._buffers[key].float().tolist()
        # A shift is a mean that all channels share.
        shift = self.config.get("shift_factor")
        if shift is not None and rule["latents_mean"] is None:
            count = self.latent_channels
            rule |= {"latents_mean": [shift] * count, "latents_std": [1.0] * count}
        return rule


class AdaptedLTX(Adapted):
    @property
    def causal(self) -> bool:
        return self.config.encoder_causal and self.config.decoder_causal

    def check_sides(self, H: int, W: int) -> None:
        super().check_sides(H, W)
        s, mode = self.spatial_compression_ratio, self.config.get("decoder_spatial_padding_mode")
        if mode == "reflect" and min(H, W) < 2 * s:
            raise ValueError(
                f"H={H}, W={W}: {type(self).__name__} reflects borders: {2 * s} pixels a side at least"
            )

    def _pixels(self, z: Tensor) -> Tensor:
        """Clean latents are those of time step 0, for decoders that take one.

        Some decoders add noise (LTX 0.9.1). Outside of training it is always the same, so that a latent has one picture.
        """
        temb = z.new_zeros(z.shape[0]) if self.config.get("timestep_conditioning") else None
        noisy = any(self.config.get("decoder_inject_noise", ()))
        with contextlib.ExitStack() as same_noise:
            if noisy and not (torch.is_grad_enabled() or self.training):
                same_noise.enter_context(torch.random.fork_rng([z.device] if z.is_cuda else []))
                generators = torch.cuda.default_generators if z.is_cuda else [torch.default_generator]
                generators[z.device.index or 0].manual_seed(0)
            return super(Adapted, self).decode(z, temb=temb).sample

    def plain_code(self) -> list[str]:
        encode, decode = super().plain_code()
        if self.config.get("timestep_conditioning"):
            decode = "video = vae.decode(z, temb=torch.zeros(len(z))).sample  # time step 0: clean latents"
        return [encode, decode]


class AdaptedHunyuan15(Adapted):
    """The mask of HunyuanVideo-1.5's attention fits one clip, so clips go through one by one."""

    def _moments(self, x: Tensor) -> Tensor:
        return self._one_by_one(super()._moments, x)

    def _pixels(self, z: Tensor) -> Tensor:
        return self._one_by_one(super()._pixels, z)


class AdaptedKVAE(Adapted):
    """KVAE works in segments of 16 frames after the first; of a last segment of one latent only one frame comes back."""

    def check_frames(self, T: int) -> None:
        group = self.temporal_compression_ratio

        def whole(n: int) -> bool:
            return n > 0 and (n - 1) % group == 0 and (n <= group + 1 or (n - 1) % 16 != group)

        if not whole(T):
            nearest = min(filter(whole, range(1, max(1, T) + 2 * group)), key=lambda n: abs(n - T))
            raise ValueError(
                f"T={T}: {type(self).__name__} needs T = {group}k + 1 frames, but not {16 + group + 1}, "
                f"{32 + group + 1}, ...: there it drops {group - 1}; e.g. {nearest}"
            )


class AdaptedVidTok(Adapted):
    """VidTok encodes groups of four frames: a causal one sees the first frame four times, as its own `forward` does."""

    @property
    def clip_lengths(self) -> tuple[int, int]:
        return super().clip_lengths if self.config.is_causal else (self.num_sample_frames_batch_size, 0)

    def _moments(self, x: Tensor) -> Tensor:
        before = self.temporal_compression_ratio - 1 if self.config.is_causal else 0
        return super()._moments(torch.cat([x[:, :, :1].expand(-1, -1, before, -1, -1), x], dim=2))

    def _pixels(self, z: Tensor) -> Tensor:
        return super(Adapted, self).decode(z)

    def plain_code(self) -> list[str]:
        before = self.temporal_compression_ratio - 1 if self.config.is_causal else 0
        padded = f"torch.cat([x[:, :, :1]] * {before} + [x], dim=2)" if before else "x"
        return [f"z = vae.encode({padded}).latent_dist.mode()", "video = vae.decode(z)"]


class AdaptedAllegro(Adapted):
    """Allegro works in tiles only, of 24 frames and 320 pixels by default; what no tile covers would be grey."""

    @property
    def clip_lengths(self) -> tuple[int, int]:
        return self.stride[0], self.kernel[0]

    def check_sides(self, H: int, W: int) -> None:
        # A first tile of k pixels, and more of them a stride apart.
        (_, k_h, k_w), (_, s_h, s_w) = self.kernel, self.stride
        if H < k_h or W < k_w or (H - k_h) % s_h or (W - k_w) % s_w:
            raise ValueError(
                f"H={H}, W={W}: {type(self).__name__} takes {k_h} + {s_h}i x {k_h} + {s_w}j pixels, e.g. {k_h} x {k_h}"
            )

    def _moments(self, x: Tensor) -> Tensor:
        self.use_tiling = True
        return self._one_by_one(super()._moments, x)

    def _pixels(self, z: Tensor) -> Tensor:
        self.use_tiling = True
        return self._one_by_one(super()._pixels, z).transpose(1, 2)

    def plain_code(self) -> list[str]:
        encode, decode = super().plain_code()
        return ["vae.enable_tiling()", encode, f"{decode}.transpose(1, 2)  # diffusers has the frames first"]


# ---- the table -------------------------------------------------------------------------------------------


def _levels(key: str, time: str = "temporal_compression_ratio") -> Callable[[Config], tuple[int, int]]:
    """Make the rule of a config whose list `key` has one width per level, and `time` the ratio in time."""
    return lambda c: (int(c[time]), 2 ** (len(c[key]) - 1))


def _stated(c: Config) -> tuple[int, int]:
    return c["temporal_compression_ratio"], c["spatial_compression_ratio"]


def _wan(c: Config) -> tuple[int, int]:
    return 2 ** sum(c["temperal_downsample"]), 2 ** (len(c["dim_mult"]) - 1) * (c.get("patch_size") or 1)


def _ltx(c: Config) -> tuple[int, int]:
    """Count from the blocks: the attributes of diffusers' LTX-2 say 16 and 64 where 8 and 32 are computed."""
    scaling, kinds = c["spatio_temporal_scaling"], c["downsample_type"]
    scaling = [scaling] * len(kinds) if isinstance(scaling, bool) else scaling
    time, side = c["patch_size_t"], c["patch_size"]
    for kind, scales in zip(kinds, scaling, strict=False):
        time *= 2 if scales and kind != "spatial" else 1
        side *= 2 if scales and kind != "temporal" else 1
    return time, side


def _magvit(c: Config) -> tuple[int, int]:
    kinds = c["down_block_types"][:-1]
    return 2 ** sum(kind == "SpatialTemporalDownBlock3D" for kind in kinds), 2 ** len(kinds)


def _mochi(c: Config) -> tuple[int, int]:
    return math.prod(c["temporal_expansions"]), math.prod(c["spatial_expansions"])


def _vidtok(c: Config) -> tuple[int, int]:
    time = 2 if c["tempo_ds"] is None else len(c["tempo_ds"])
    return 2**time, 2 ** (len(c["ch_mult"]) - 1 if c["spatial_ds"] is None else len(c["spatial_ds"]))


def _by_four(c: Config) -> int:
    return 4


ROWS = {
    "AutoencoderKLWan": Row(
        "wan",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers or Wan2.2-TI2V-5B-Diffusers",
        _wan,
        _by_four,
        causal=True,
        chunks=WanChunks,
    ),
    "AutoencoderKLQwenImage": Row(
        "qwenimage", "Qwen/Qwen-Image", _wan, _by_four, causal=True, chunks=WanChunks
    ),
    # 8k frames are another alignment (2k latents) and an even number of latents decodes to that: 8k + 1 only.
    # invert_scale_latents (1.5) is about the picture that conditions its pipeline, not about the video's latents.
    "AutoencoderKLCogVideoX": Row(
        "cogvideox",
        "zai-org/CogVideoX-2b",
        _levels("block_out_channels"),
        lambda c: 2 * int(c["temporal_compression_ratio"]),
        causal=True,
    ),
    "AutoencoderKLHunyuanVideo": Row("hunyuanvideo", "hunyuanvideo-community/HunyuanVideo", _stated),
    "AutoencoderKLHunyuanVideo15": Row(
        "hunyuanvideo15", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", _stated, causal=True
    ),
    "AutoencoderKLLTXVideo": Row("ltx", "Lightricks/LTX-Video", _ltx),
    "AutoencoderKLLTX2Video": Row("ltx2", "Lightricks/LTX-2", _ltx),
    "AutoencoderKLMochi": Row("mochi", "genmo/mochi-1-preview", _mochi, causal=True),
    "AutoencoderKLCosmos": Row(
        "cosmos", "nvidia/Cosmos-1.0-Diffusion-7B-Text2World", _stated, causal=True, posterior=False
    ),
    "AutoencoderKLMagvit": Row(
        "magvit",
        "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
        _magvit,
        _by_four,
        causal=True,
        chunks=MagvitChunks,
    ),
    "AutoencoderKLKVAEVideo": Row(
        "kvae",
        "kandinskylab/KVAE-3D-1.0",
        _levels("ch_mult", "temporal_compress_times"),
        posterior=False,
        chunks=KVAEChunks,
    ),
    "AutoencoderVidTok": Row("vidtok", "microsoft/VidTok", _vidtok),
    "AutoencoderKLAllegro": Row(
        "allegro", "rhymes-ai/Allegro", _levels("block_out_channels"), trainable=False
    ),
}
NAMES = {row.name: cls for cls, row in ROWS.items()}
_SPECIAL = {
    "AutoencoderKLHunyuanVideo15": AdaptedHunyuan15,
    "AutoencoderKLLTXVideo": AdaptedLTX,
    "AutoencoderKLLTX2Video": AdaptedLTX,
    "AutoencoderKLKVAEVideo": AdaptedKVAE,
    "AutoencoderVidTok": AdaptedVidTok,
    "AutoencoderKLAllegro": AdaptedAllegro,
}


@functools.cache
def adapted(cls: str) -> type:
    """Make the subclass of diffusers' `cls`, a key of ROWS; ValueError if the installed diffusers has no such class."""
    base = getattr(diffusers, cls, None)
    if base is None:
        raise ValueError(f"{cls}: diffusers {diffusers.__version__} has no such class; install a later one")
    names = {"row": ROWS[cls], "__module__": __name__, "__doc__": base.__doc__}
    return type(cls, (_SPECIAL.get(cls, Adapted), base), names)


def check_loaded(vae: Any, folder: Any) -> Any:
    """Return the VAE itself; ValueError for a config that makes it something else than a video VAE of RGB frames."""
    config = vae.config
    if config.get("regularizer", "kl") != "kl":
        raise ValueError(
            f"{folder}: regularizer={config['regularizer']}: discrete codes; VidTok's kl models open"
        )
    channels = config.get("input_channels", 3)
    if channels != 3:
        raise ValueError(
            f"{folder}: input_channels={channels}: pictures of {channels} channels, not RGB video"
        )
    return vae


def __getattr__(name: str) -> type:
    """Find the classes by their names: a saved pipeline names them so."""
    if name in ROWS:
        return adapted(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
