"""OD-VAE: a causal 3D video VAE that compresses 4x in time and 8 x 8 in space (paper section 3).

Parameter names are those of Open-Sora-Plan, so released weights load directly (vae/release.py).
Encoder and Decoder define the networks; wherever gradients are recorded they run as written, on whole clips. Without
gradients (inference, validation, the discriminator's own steps in training) vae/fast.py computes the same in steps:
frame 0, then four frames (one latent frame) at a time, on a GPU a few times as many. Whole clips and streams therefore
agree bit for bit, and memory does not grow with the clip's length.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from data.core.convolution import channels_last, forget, making_a_graph
from vae import fast
from vae.interface import VideoGaussian, VideoVAE
from vae.layers import CausalConv3d, FrameAttention, FrameConv2d, ResBlock, VideoGroupNorm, conv3x3
from vae.ops import fused, latents_per_step
from vae.resample import TIME_DOWN, TIME_UP, Downsample, SpaceTimeUpsample, SpatialUpsample
from vae.stream import StreamState, regroup
from vae.tiling import over_groups, over_tiles
from vae.variants import PRESETS, Layout, find_layout


@dataclass
class DecoderOutput(BaseOutput):
    """A decoded clip: sample (B, 3, T, H, W). To import diffusers' class of this name imports all its VAEs and U-Nets."""

    sample: Tensor


class MidBlock(nn.Module):
    """Residual block, per-frame attention, residual block, at the deepest level."""

    def __init__(self, layout: Layout, channels: int, groups: int, scope: str):
        super().__init__()
        self.block_1 = ResBlock(layout.mid, channels, channels, groups, scope)
        self.attn_1 = FrameAttention(channels, groups, scope, layout.scrambled_attention)
        self.block_2 = ResBlock(layout.mid, channels, channels, groups, scope)


class Level(nn.Module):
    """The residual blocks of one level; the model adds its resampling modules."""

    def __init__(self, kind: str, count: int, in_channels: int, channels: int, groups: int, scope: str):
        super().__init__()
        widths = [in_channels] + [channels] * count
        self.block = nn.ModuleList(ResBlock(kind, a, channels, groups, scope) for a in widths[:-1])


class Checkpointed(nn.Module):
    """A network whose blocks recompute their activations in backward if training asks for it.

    diffusers' enable_gradient_checkpointing sets both attributes that `run` reads.
    """

    gradient_checkpointing = False

    def run(self, block: nn.Module | None, x: Tensor) -> Tensor:
        """block(x), or x without a block."""
        if block is None:
            return x
        if self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, x)
        return block(x)


class Encoder(Checkpointed):
    """(B, 3, T, H, W) -> (B, 2C, t, h, w), mean and log-variance before quant_conv."""

    def __init__(
        self,
        layout: Layout,
        in_channels: int,
        out_channels: int,
        widths,
        blocks: int,
        groups: int,
        scope: str,
    ):
        super().__init__()
        # Levels from full resolution down: blocks, then what halves space, time or both.
        self.conv_in = conv3x3(layout.conv_in, in_channels, widths[0])
        self.down = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            level = Level(layout.encoder_blocks[i], blocks, before, width, groups, scope)
            level.downsample = Downsample(layout.down[i], width) if layout.down[i] else None
            level.time_downsample = TIME_DOWN[layout.time_down[i]](width) if layout.time_down[i] else None
            self.down.append(level)
            before = width
        # The middle, at the deepest level, and the head.
        self.mid = MidBlock(layout, before, groups, scope)
        self.norm_out = VideoGroupNorm(groups, before, scope)
        self.conv_out = CausalConv3d(before, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode with gradients; without, vae/fast.py computes the same."""
        x = self.conv_in(x)  # (B, 128, T, H, W), widths of the default model
        for level in self.down:
            # (B, 128, T, H, W), then 256, 512, 512 channels
            for block in level.block:
                x = self.run(block, x)
            # H, W halved after levels 0, 1, 2; T with them after 1, 2, but in v1.0 and v1.1 by a module of its own
            x = self.run(level.downsample, x)
            x = self.run(level.time_downsample, x)
        # (B, 512, t, h, w), t = (T - 1) / 4 + 1, h = H / 8, w = W / 8
        x = self.run(self.mid.block_1, x)
        x = self.run(self.mid.attn_1, x)
        x = self.run(self.mid.block_2, x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2C, t, h, w)


class Decoder(Checkpointed):
    """(B, C, t, h, w), after post_quant_conv -> (B, 3, T, H, W); no output activation."""

    def __init__(
        self,
        layout: Layout,
        in_channels: int,
        out_channels: int,
        widths,
        blocks: int,
        groups: int,
        up: tuple,
        scope: str,
    ):
        super().__init__()
        # The middle, at the deepest level.
        before = widths[-1]
        self.conv_in = CausalConv3d(in_channels, before, 3, padding=1)
        self.mid = MidBlock(layout, before, groups, scope)
        # Levels from the deepest up, stored as the encoder's: blocks, then what doubles space, time or both.
        levels = []
        for i in reversed(range(len(widths))):
            level = Level(layout.decoder_blocks[i], blocks + 1, before, widths[i], groups, scope)
            before = widths[i]
            level.upsample = None
            if layout.up[i] == "st":
                level.upsample = SpaceTimeUpsample(before, *up)
            elif layout.up[i]:
                level.upsample = SpatialUpsample(layout.up[i], before)
            level.time_upsample = TIME_UP[layout.time_up[i]](before) if layout.time_up[i] else None
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = VideoGroupNorm(groups, before, scope)  # also before a 2D conv_out, as upstream
        self.conv_out = conv3x3(layout.conv_out, before, out_channels)

    def forward(self, z: Tensor) -> Tensor:
        """Decode with gradients; without, vae/fast.py computes the same."""
        x = self.conv_in(z)  # (B, 512, t, h, w)
        x = self.run(self.mid.block_1, x)
        x = self.run(self.mid.attn_1, x)
        x = self.run(self.mid.block_2, x)
        for level in reversed(self.up):
            # (B, 512, t, h, w), then 512, 256, 128 channels
            for block in level.block:
                x = self.run(block, x)
            # h, w doubled after levels 3, 2, 1; t with them after 3, 2, but in v1.0 and v1.1 by a module of its own
            x = self.run(level.upsample, x)
            x = self.run(level.time_upsample, x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, T, H, W)


class ODVAE(VideoVAE, ModelMixin, ConfigMixin):
    """The omni-dimensional VAE and its variants.

    variant: 1 to 4 (paper Fig. 2; 4 is OD-VAE), or "osp_v1_0" / "osp_v1_1", released older layouts.
    norm_scope: "frame" (causal; a clip's latents at frames 0, 4, 8... start as SD-VAE's) or "clip" (as released).
    spatial_up, temporal_up: how the space-time upsamplers enlarge: "nearest", or "trilinear" / "linear" as released.
    scaling_factor: what `normalize` multiplies latents by until latents_mean / latents_std are measured.

    Deviation: the released v1.2 is "clip", "trilinear", "linear" (preset "osp_v1_2"); it looks at later frames and
    does not satisfy the paper's Eq. 4 when decoding. The default satisfies it and can be streamed.
    """

    _supports_gradient_checkpointing = True
    # Read by diffusers from the class: what a device map keeps together, what compile_repeated_blocks() compiles
    _no_split_modules = _repeated_blocks = ["ResBlock", "FrameAttention"]  # noqa: RUF012

    temporal_compression_ratio = 4
    frame_rule = "4n+1"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        variant: int | str = 4,
        norm_scope: str = "frame",
        spatial_up: str = "nearest",
        temporal_up: str = "nearest",
        scaling_factor: float | None = 0.18215,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        # Settings, refused if unknown.
        layout = find_layout(variant)
        for name, value, known in (
            ("norm_scope", norm_scope, ("frame", "clip")),
            ("spatial_up", spatial_up, ("nearest", "trilinear")),
            ("temporal_up", temporal_up, ("nearest", "linear")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: needs one of {known}")
        widths = tuple(block_out_channels)
        if len(widths) != 4 or any(w % norm_num_groups for w in widths):
            raise ValueError(
                f"block_out_channels={widths}: needs 4 widths, multiples of norm_num_groups={norm_num_groups}"
            )
        # Networks; mean and log-variance make 2C channels.
        shared = {
            "widths": widths,
            "blocks": layers_per_block,
            "groups": norm_num_groups,
            "scope": norm_scope,
        }
        self.encoder = Encoder(layout, in_channels, 2 * latent_channels, **shared)
        self.decoder = Decoder(layout, latent_channels, out_channels, up=(spatial_up, temporal_up), **shared)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, 1)
        # How a clip is computed; not in the config, so not saved.
        self.use_slicing = False
        self._path = "auto"
        self.tiling_groups: tuple[int, int] | None = None  # frames, latents of a temporal group
        self._tiles: tuple[int, int] | None = None  # side, step of a spatial tile, in latents

    @classmethod
    def preset(cls, name: str, **overrides) -> "ODVAE":
        """Make a model with random weights in a named configuration: "odvae", "osp_v1_2", "osp_v1_1" or "osp_v1_0"."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r}: known are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def causal(self) -> bool:
        """Tell whether no latent or frame depends on later ones; only then can the model be streamed."""
        return self._why_not_causal() is None

    def _why_not_causal(self) -> str | None:
        config = self.config
        if config.norm_scope != "frame":
            return f"norm_scope={config.norm_scope!r} takes statistics over the whole clip"
        if config.temporal_up != "nearest" or any(find_layout(config.variant).time_up):
            return "linear upsampling in time looks at the next latent frame"
        return None

    @property
    def last_decoder_layer(self) -> nn.Parameter:
        """Return the weight of decoder.conv_out, where the adaptive GAN weight is measured (vae/losses.py)."""
        conv = self.decoder.conv_out
        return conv.weight if isinstance(conv, FrameConv2d) else conv.conv.weight

    # ---- encode and decode -------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[VideoGaussian]:
        """Encode x (B, 3, T, H, W) in [-1, 1], T = 4k + 1, H and W multiples of 8, to a posterior of (B, C, k + 1, h, w).

        Latents are not normalised. Raises ValueError for any other length or side.
        """
        self.check_video(x)
        samples = x.split(1) if self.use_slicing else (x,)
        posterior = VideoGaussian(torch.cat([self._encode_tiled(s) for s in samples]))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, num_frames: int | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode z (B, C, t, h, w), not normalised, to (B, 3, 4 (t - 1) + 1, 8 h, 8 w), about [-1, 1], not clamped.

        num_frames, if given, must agree with t. Raises ValueError for latents of another shape or dtype.
        """
        self.check_latents(z, num_frames)
        samples = z.split(1) if self.use_slicing else (z,)
        sample = torch.cat([self._decode_tiled(s) for s in samples])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _encode_tiled(self, x: Tensor) -> Tensor:
        fn = self._moments
        if self._tiles:
            side, step = self._tiles
            fn = lambda v: over_tiles(self._moments, v, 8 * side, 8 * step, side, step)  # noqa: E731
        return over_groups(fn, x, self.tiling_groups[0]) if self.tiling_groups else fn(x)

    def _decode_tiled(self, z: Tensor) -> Tensor:
        fn = self._pixels
        if self._tiles:
            side, step = self._tiles
            fn = lambda v: over_tiles(self._pixels, v, side, step, 8 * side, 8 * step)  # noqa: E731
        return over_groups(fn, z, self.tiling_groups[1]) if self.tiling_groups else fn(z)

    # ---- plain or fast -----------------------------------------------------------------------------------

    def use_path(self, name: str) -> None:
        """Choose how clips are computed: "plain", "fast", or "auto", the default.

        plain: the networks above, on the whole clip, with gradients where torch records them. fast: vae/fast.py,
        never with gradients. auto: fast wherever torch records no gradients, as under torch.no_grad().
        """
        if name not in ("auto", "plain", "fast"):
            raise ValueError(f'path {name!r}: "auto", "plain" or "fast"')
        self._path = name

    def _is_managed(self) -> bool:
        """Tell whether accelerate or diffusers move or cast the weights of single layers, which only calling a layer does."""
        layers = itertools.islice(self.modules(), 1, None)  # the first is the model itself
        return any(hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook") for layer in layers)

    def _is_fast(self) -> bool:
        fast_now = self._path == "fast" or (self._path == "auto" and not torch.is_grad_enabled())
        if making_a_graph() or (fast_now and self._is_managed()):
            return False  # a graph of a whole clip holds the network once, not each of its steps
        if not fast_now and torch.is_grad_enabled():
            forget(self)  # weights are about to change, and with them the kernels that are prepared of them
        return fast_now

    def _moments(self, x: Tensor) -> Tensor:
        """Compute the moments of clips: (B, 3, T, H, W) -> (B, 2C, t, h, w)."""
        if not self._is_fast():
            return self.quant_conv(self.encoder(x))
        # In steps where that is exact, else the whole clip at once.
        if self.causal:
            return torch.cat(list(self._encode_steps([x])), dim=2)
        return self._encode_step(channels_last(x) if fused(x) else x, None)

    def _pixels(self, z: Tensor) -> Tensor:
        """Compute the clips of latents: (B, C, t, h, w) -> (B, 3, T, H, W)."""
        if not self._is_fast():
            return self.decoder(self.post_quant_conv(z))
        if not self.causal:
            return self._decode_step(channels_last(z) if fused(z) else z, None)
        # Each step is written into the whole clip, so that no second copy of all frames is needed to join them.
        B, _, t, h, w = z.shape
        out, at = None, 0
        for frames in self._decode_steps([z]):
            if out is None:
                out = frames.new_empty((B, frames.shape[1], self.pixel_frames(t), 8 * h, 8 * w))
            out[:, :, at : at + frames.shape[2]] = frames
            at += frames.shape[2]
        return out

    @torch.no_grad()
    def _encode_step(self, x: Tensor, state: StreamState | None) -> Tensor:
        return fast.conv(self.quant_conv, fast.encoder(self.encoder, x, state), state)

    @torch.no_grad()
    def _decode_step(self, z: Tensor, state: StreamState | None) -> Tensor:
        return fast.decoder(self.decoder, fast.conv(self.post_quant_conv, z, state), state)

    def compile_steps(self, **options) -> None:
        """Compile a step of fast inference with torch.compile: not the whole clip, whose twenty steps would be one graph."""
        self._encode_step = torch.compile(self._encode_step, **options)
        self._decode_step = torch.compile(self._decode_step, **options)

    # ---- streams -----------------------------------------------------------------------------------------

    def _encode_steps(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        state = StreamState()
        unit = self.temporal_compression_ratio
        for step in regroup(chunks, unit, lambda x: latents_per_step(x, x.shape[3] * x.shape[4])):
            yield self._encode_step(step, state)
            state.first = False

    def _decode_steps(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        state = StreamState()
        pixels = self.spatial_compression_ratio**2
        for step in regroup(chunks, 1, lambda z: latents_per_step(z, pixels * z.shape[3] * z.shape[4])):
            yield self._decode_step(step, state)
            state.first = False

    @apply_forward_hook
    @torch.no_grad()
    def stream_encode(self, frames: Iterable[Tensor]) -> Iterator[VideoGaussian]:
        """Encode a clip that arrives in pieces, in constant memory; the bits are those of `encode` under torch.no_grad(), untiled.

        frames: iterable of (B, 3, n, H, W) in [-1, 1], any n >= 1 each. Yields the posterior of one latent frame at
        a time: after frame 0, then after every four frames, on a GPU after every step of several latent frames.
        Raises ValueError if the model is not causal, or if the stream ends between latent frames.
        """
        self._check_streamable()
        seen = 0

        # Pieces are checked as they come; only the end tells whether the length is one that the model takes.
        def checked():
            nonlocal seen
            for chunk in frames:
                self.check_video(chunk[:, :, :1])
                seen += chunk.shape[2]
                yield chunk

        for moments in self._encode_steps(checked()):
            for latent in moments.split(1, dim=2):
                yield VideoGaussian(latent.contiguous())
        self.check_frames(seen)

    @apply_forward_hook
    @torch.no_grad()
    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents that arrive in pieces, in constant memory; the bits are those of `decode` under torch.no_grad(), untiled.

        latents: iterable of (B, C, n, h, w), not normalised, any n >= 1. Yields (B, 3, 1, H, W), then
        (B, 3, 4, H, W) per latent frame, on a GPU after every step of several. Raises ValueError if the model is not
        causal.
        """
        self._check_streamable()

        def checked():
            for chunk in latents:
                self.check_latents(chunk)
                yield chunk

        for frames in self._decode_steps(checked()):
            for piece in frames.split(self.temporal_compression_ratio, dim=2):
                yield piece.contiguous()

    def _why_not_streamable(self) -> str | None:
        if reason := self._why_not_causal():
            return f"{reason}; use enable_tiling(), which is approximate"
        if self.use_tiling:
            return "a stream is not tiled; call disable_tiling() first"
        if self._is_managed():
            return "its layers are offloaded or cast one by one; offload it as a whole (enable_model_cpu_offload)"
        return None

    @property
    def can_stream(self) -> bool:
        """Tell whether `stream_encode` and `stream_decode` can be used now."""
        return self._why_not_streamable() is None

    def _check_streamable(self) -> None:
        if reason := self._why_not_streamable():
            raise ValueError(f"this model cannot be streamed: {reason}")

    # ---- tiling ------------------------------------------------------------------------------------------

    def enable_tiling(
        self, num_frames: int | bool = 33, num_latents: int | None = None, use_tiling: bool = True
    ) -> None:
        """Encode and decode in groups that share one frame (paper 3.3; groups of 33 frames in Table 4).

        num_frames: 4k + 1; True or False switch it, as does use_tiling, like other VAEs of diffusers. num_latents: latents
        of a group when decoding; default k + 1, the encoder's own boundaries. Deviation: Open-Sora-Plan v1.2 decodes
        groups of 16 latents (61 frames) of 33-frame groups.
        """
        if num_frames is False or not use_tiling:
            self.tiling_groups = None
            return
        num_frames = 33 if num_frames is True else num_frames
        self.check_frames(num_frames)
        num_latents = self.latent_frames(num_frames) if num_latents is None else num_latents
        if num_latents < 2:
            raise ValueError(
                f"num_frames={num_frames}, num_latents={num_latents}: a group needs 2 latents, 5 frames"
            )
        self.tiling_groups = (num_frames, num_latents)

    def enable_spatial_tiling(self, size: int = 256, overlap: float = 0.25) -> None:
        """Work on squares of `size` pixels that overlap by the fraction `overlap` and are blended linearly.

        A clip no larger than a tile is never split. Independent of `enable_tiling`.
        """
        # Side and distance of tiles in latents; they may overlap by half at most.
        side = size // self.spatial_compression_ratio
        step = int(side * (1 - overlap))
        if size % self.spatial_compression_ratio or side < 2 or not 0 <= overlap < 1 or side > 2 * step:
            raise ValueError(
                f"size={size}, overlap={overlap}: needs a multiple of 8 from 16 on, and overlap in [0, 0.5]"
            )
        self._tiles = (side, step)

    def enable_slicing(self) -> None:
        """Encode and decode the clips of a batch one after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False

    def disable_tiling(self) -> None:
        """Go back to whole frames and whole clips."""
        self.tiling_groups = self._tiles = None

    @property
    def use_tiling(self) -> bool:
        """Tell whether anything is tiled; setting it is `enable_tiling` or `disable_tiling`, as in other VAEs of diffusers."""
        return bool(self.tiling_groups or self._tiles)

    @use_tiling.setter
    def use_tiling(self, on: bool) -> None:
        if on != self.use_tiling:
            self.enable_tiling() if on else self.disable_tiling()
