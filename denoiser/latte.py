"""Latte, a latent diffusion transformer for video (Ma et al. 2024, variant 1), with class labels or without.

Blocks alternate: even ones attend within a frame, odd ones along time; each is a DiT block with adaLN-zero.
This is Vchitect/Latte's models/latte.py (fixed sin-cos positions, uniform frame patches), not the
text-to-video `LatteTransformer3DModel` of diffusers, which cannot load its weights. Different from upstream
in speed only: the tokens stay (B, t, N, D), the modulation is computed once per sample instead of once per
frame and per patch, and attention is the fused kernel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from denoiser.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_1d, sincos_2d

_WIDTHS = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
# The twelve published sizes: "XL/2" is 28 blocks of width 1152 on 2 x 2 patches.
LATTE_SIZES = {f"{size}/{p}": {**row, "patch_size": p} for size, row in _WIDTHS.items() for p in (2, 4, 8)}


@dataclass
class LatteOutput(BaseOutput):
    """sample: (B, 2C, t, h, w), noise then variance fraction v; (B, C, t, h, w) noise without learn_sigma."""

    sample: Tensor


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each row of the batch."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each row: (rows, tokens, D) -> (rows, tokens, D)."""
        # Three (rows, heads, tokens, head_dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)  # (rows, heads, tokens, head_dim)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """D -> mlp_ratio * D -> D with tanh-GELU."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulation(hidden_size: int, num_chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_chunks * hidden_size))


class LatteBlock(nn.Module):
    """One adaLN-zero transformer block; attends within each frame."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = _modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Run the block: x (B, t, N, D) tokens, c (B, D) conditioning -> (B, t, N, D)."""
        # Six (B, 1, 1, D): one modulation per sample, broadcast over its frames and patches.
        m = self.adaLN_modulation(c).unflatten(-1, (6, 1, 1, -1))
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = m.unbind(1)
        # Attention within frames, or along time: x + gate * attention(norm(x) * (1 + scale) + shift).
        h = torch.addcmul(shift_attn, self.norm1(x), 1 + scale_attn)
        x = torch.addcmul(x, gate_attn, self._attend(h))
        # The same of the MLP.
        h = torch.addcmul(shift_mlp, self.norm2(x), 1 + scale_mlp)
        return torch.addcmul(x, gate_mlp, self.mlp(h))

    def _attend(self, h: Tensor) -> Tensor:
        return self.attn(h.flatten(0, 1)).view_as(h)  # rows are the B t frames


class TemporalLatteBlock(LatteBlock):
    """The same, attending along time."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c)  # torch.compile keeps one graph per function: each kind has its own

    def _attend(self, h: Tensor) -> Tensor:
        rows = h.transpose(1, 2)  # (B, N, t, D)
        return self.attn(rows.flatten(0, 1)).view(rows.shape).transpose(1, 2)


class FinalLayer(nn.Module):
    """LayerNorm with shift and scale, then a projection to the p * p * channels values of each patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = _modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Project tokens to patches: x (B, t, N, D), c (B, D) -> (B, t, N, p * p * C), the channel fastest."""
        shift, scale = self.adaLN_modulation(c).unflatten(-1, (2, 1, 1, -1)).unbind(1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class Latte(ModelMixin, ConfigMixin):
    """The denoiser: from noisy latents, a timestep and a class label to the noise and its variance fraction.

    depth, hidden_size, num_heads, patch_size, mlp_ratio: the size; `Latte.from_size("XL/2", ...)` fills
    in the first four. depth is even: spatial and temporal blocks come in pairs.
    in_channels, num_frames, sample_size: the geometry of the LATENTS, e.g. 4, 21, 32 for 81 x 256 x 256
    pixels through OD-VAE; sample_size is h = w or (h, w).
    num_classes: None = unconditional. class_dropout_prob: how often training hides the label.
    learn_sigma: predict the variance fraction too, in the second half of 2 * in_channels output channels.
    Raises ValueError for sizes that do not divide.
    """

    _supports_gradient_checkpointing = True
    # Read by diffusers from the class: what offloading keeps together, what compile_repeated_blocks() compiles, what
    # layerwise casting leaves in full precision
    _no_split_modules = _repeated_blocks = ["LatteBlock", "TemporalLatteBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        depth: int = 28,
        hidden_size: int = 1152,
        num_heads: int = 16,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        in_channels: int = 4,
        num_frames: int = 21,
        sample_size: int | tuple[int, int] = 32,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
    ):
        super().__init__()
        self.latent_hw = _height_width(sample_size)
        _check_sizes(depth, hidden_size, num_heads, patch_size, self.latent_hw)
        if num_classes is not None and num_classes < 1:
            raise ValueError(
                f"num_classes={num_classes}: give at least 1, or None for an unconditional model"
            )
        # Embedders of patches, timestep and class.
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # Blocks within frames and along time, in turn.
        self.blocks = nn.ModuleList()
        for i in range(depth):
            kind = TemporalLatteBlock if i % 2 else LatteBlock
            self.blocks.append(kind(hidden_size, num_heads, mlp_ratio))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.gradient_checkpointing = False
        # Functions of the config, so not in the state dict: weights of 16 frames load into a model of 21.
        for name, table in self._position_tables().items():
            self.register_buffer(name, table, persistent=False)
        self._init_weights()

    @classmethod
    def from_size(cls, size: str, **config) -> "Latte":
        """Build one of the twelve published sizes, "S/8" to "XL/2"; config: the other constructor arguments."""
        name = size.removeprefix("Latte-")
        if name not in LATTE_SIZES:
            raise ValueError(f"size={size!r}: no such Latte, use one of {', '.join(LATTE_SIZES)}")
        return cls(**{**LATTE_SIZES[name], **config})

    @property
    def null_label(self) -> int | None:
        """Return the label id that means "no class", or None where the model has no such id."""
        has_null = self.config.num_classes is not None and self.config.class_dropout_prob > 0
        return self.config.num_classes if has_null else None

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        y: Tensor | None = None,
        force_drop: Tensor | None = None,
        return_dict: bool = True,
    ) -> LatteOutput | tuple[Tensor]:
        """Predict the noise in x_t (and v, with learn_sigma).

        x: (B, C, t, h, w) noisy latents of the configured geometry.
        t: (B,) or scalar integer timestep, the original id 0 .. 999 even when sampling takes fewer steps.
        y: (B,) int64 class ids, null_label = no class; None = no class for every sample (evaluation only).
        force_drop: (B,) bool, True hides the label of that sample, instead of the random draw of training.
        Returns LatteOutput, or (sample,) with return_dict=False. Raises ValueError for other inputs.
        """
        # Conditioning: the timestep, and the class where there are classes. (B, D)
        self._check_input(x)
        B = x.shape[0]
        x = x.to(self.x_embedder.proj.weight.dtype)
        c = self.t_embedder(_timesteps(t, B, x.device))
        y = self._labels(y, B, x.device)
        if y is not None:
            c = c + self.y_embedder(y, force_drop)

        # Tokens, with their places in the frame.
        x = self.x_embedder(x)  # (B, t, N, D)
        # Under autocast the tables lift the residual stream to float32, as upstream's are: a stream in bf16 would round
        # after each block (tests/unit/denoiser/test_latte.py has the numbers).
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        x = x + self.pos_embed.to(x.device, dtype)
        # Blocks; the place in time is added once, before the first temporal block.
        for i, block in enumerate(self.blocks):
            if i == 1:
                x = x + self.temp_embed.to(x.device, dtype).unsqueeze(2)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        # (B, t, N, D) -> (B, C or 2C, t, h, w)
        sample = self._unpatchify(self.final_layer(x, c))
        return LatteOutput(sample=sample) if return_dict else (sample,)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """Put patches together: (B, t, N, p * p * C) -> (B, C, t, h, w)."""
        p, (h, w) = self.config.patch_size, self.latent_hw
        B, t = x.shape[:2]
        # (B, t, rows, columns, p, p, C) -> (B, C, t, rows, p, columns, p)
        x = x.view(B, t, h // p, w // p, p, p, self.out_channels).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(B, self.out_channels, t, h, w)

    def _check_input(self, x: Tensor) -> None:
        expected = (self.config.in_channels, self.config.num_frames, *self.latent_hw)
        if x.ndim != 5 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"x of shape {tuple(x.shape)}: this Latte takes (B, C, t, h, w) latents of (C, t, h, w) = "
                f"{expected}; build it with the num_frames and sample_size of yours"
            )

    def _labels(self, y: Tensor | None, B: int, device: torch.device) -> Tensor | None:
        """Check labels, or fill in the null label: (B,) int64 on the device; None for an unconditional model."""
        K = self.config.num_classes
        if K is None:
            if y is not None:
                raise ValueError("y given, but this Latte is unconditional (num_classes=None): leave y out")
            return None
        # No labels: no class for all, which training must not take for granted.
        if y is None:
            if self.training:
                raise ValueError(f"y=None: training a Latte of {K} classes needs labels (B,); null is id {K}")
            if self.null_label is None:
                raise ValueError(
                    "y=None: trained without label dropout, this Latte has no null label; give labels"
                )
            return torch.full((B,), K, dtype=torch.int64, device=device)
        if y.shape != (B,) or y.dtype != torch.int64:
            raise ValueError(f"y of shape {tuple(y.shape)}, {y.dtype}: labels are ({B},) int64")
        if y.device.type == "cpu" and not torch.compiler.is_compiling():  # a graph has no values to look at
            self.check_labels(y)
        return y.to(device)

    def check_labels(self, y: Tensor) -> None:
        """Raise ValueError for class ids that this Latte lacks.

        Call it before they go to a GPU: forward waits for none.
        """
        last = self.y_embedder.embedding_table.num_embeddings - 1
        if len(y) and not (0 <= int(y.min()) and int(y.max()) <= last):
            raise ValueError(f"y={y.tolist()}: labels of this Latte are 0 .. {last}")

    def _position_tables(self) -> dict[str, Tensor]:
        """Make pos_embed (1, N, D) and temp_embed (1, t, D), float32 on the CPU whatever the default device is."""
        p, D = self.config.patch_size, self.config.hidden_size
        space = sincos_2d(self.latent_hw[0] // p, self.latent_hw[1] // p, D)
        time = sincos_1d(range(self.config.num_frames), D)
        return {
            "pos_embed": torch.from_numpy(space).float()[None],
            "temp_embed": torch.from_numpy(time).float()[None],
        }

    def _apply(self, fn, recurse: bool = True):
        # to_empty() would leave garbage in buffers that no checkpoint restores, so write the tables again.
        super()._apply(fn, recurse)
        for name, table in self._position_tables().items():
            buffer = getattr(self, name)
            if not buffer.is_meta:
                setattr(self, name, table.to(buffer))
        return self

    def _init_weights(self) -> None:
        """Initialise as DiT: every block starts as the identity and the output as exactly 0."""
        # All linear layers, and the patch projection as one.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        # The embedders of timestep and class.
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.config.num_classes is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # Zero modulation: gates of 0, and an output of 0.
        adaln = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for linear in (*adaln, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def _height_width(sample_size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(sample_size, int):
        return sample_size, sample_size
    height, width = sample_size
    return int(height), int(width)


def _check_sizes(
    depth: int, hidden_size: int, num_heads: int, patch_size: int, latent_hw: tuple[int, int]
) -> None:
    if depth < 2 or depth % 2:
        raise ValueError(f"depth={depth}: spatial and temporal blocks alternate, so depth is even, e.g. 28")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size}: must be a multiple of num_heads={num_heads}")
    if any(side % patch_size or side < patch_size for side in latent_hw):
        raise ValueError(f"sample_size={latent_hw}: must be a multiple of patch_size={patch_size}")


def _timesteps(t: Tensor | int, B: int, device: torch.device) -> Tensor:
    t = t.to(device) if isinstance(t, Tensor) else torch.full((), t, device=device)
    if t.is_floating_point() or t.shape not in {(), (1,), (B,)}:
        raise ValueError(
            f"t of shape {tuple(t.shape)}, {t.dtype}: timesteps are integers, a scalar or ({B},)"
        )
    return t.expand(B)
