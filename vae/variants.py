"""The layouts of OD-VAE as rows of data: the paper's four variants (Fig. 2, Table 1) and the released ones.

Levels are numbered as in the encoder: level 0 is at full resolution, level 3 the deepest. Kinds of block:

- "3d": both convolutions causal 3x3x3; "2d": both per frame; "23d": the first causal 3x3x3, the second per frame.
- resampling: "2d" per-frame convolution; "1x3x3" the same written as a 3D kernel; "st" space and time at once.
- time: an extra module after the spatial one. "pool" is parameter-free; "res" mixes pooling and a convolution.

Variant 2 follows the first author's measuring code (BinZhu-ece/Video-LlamaGen, ResnetBlock23D, "mix23d").
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One row: what stands at each level. Parameter counts are for the paper's widths, 128 to 512."""

    parameters: int
    conv_in: str  # encoder.conv_in: "2d" or "3d"
    encoder_blocks: tuple[str, str, str, str]
    down: tuple[str | None, str | None, str | None, str | None]
    mid: str
    decoder_blocks: tuple[str, str, str, str]
    up: tuple[str | None, str | None, str | None, str | None]
    conv_out: str = "3d"  # decoder.conv_out
    time_down: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)
    time_up: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)
    scrambled_attention: bool = False  # Open-Sora-Plan v1.0 mixed channels and frames in a reshape


ALL_3D = ("3d", "3d", "3d", "3d")
OUTER_2D = ("2d", "2d", "3d", "3d")
MIXED = ("23d", "23d", "23d", "23d")

LAYOUTS: dict[int | str, Layout] = {
    1: Layout(
        parameters=244_505_319,
        conv_in="3d",
        encoder_blocks=ALL_3D,
        down=("1x3x3", "st", "st", None),
        mid="3d",
        decoder_blocks=ALL_3D,
        up=(None, "1x3x3", "st", "st"),
    ),
    2: Layout(
        parameters=171_072_231,
        conv_in="3d",
        encoder_blocks=MIXED,
        down=("1x3x3", "st", "st", None),
        mid="23d",
        decoder_blocks=MIXED,
        up=(None, "1x3x3", "st", "st"),
    ),
    3: Layout(
        parameters=228_861_159,
        conv_in="2d",
        encoder_blocks=OUTER_2D,
        down=("2d", "st", "st", None),
        mid="3d",
        decoder_blocks=OUTER_2D,
        up=(None, "2d", "st", "st"),
        conv_out="2d",
    ),
    4: Layout(  # the paper's OD-VAE, and Open-Sora-Plan v1.2.0's layout
        parameters=239_189_991,
        conv_in="2d",
        encoder_blocks=OUTER_2D,
        down=("2d", "st", "st", None),
        mid="3d",
        decoder_blocks=ALL_3D,
        up=(None, "1x3x3", "st", "st"),
    ),
    "osp_v1_0": Layout(
        parameters=229_169_895,
        conv_in="3d",
        encoder_blocks=ALL_3D,
        down=("1x3x3", "1x3x3", "1x3x3", None),
        time_down=("pool", "pool", None, None),
        mid="3d",
        decoder_blocks=ALL_3D,
        up=(None, "1x3x3", "1x3x3", "1x3x3"),
        time_up=(None, None, "pool", "pool"),
        scrambled_attention=True,
    ),
    "osp_v1_1": Layout(
        parameters=246_859_499,
        conv_in="2d",
        encoder_blocks=OUTER_2D,
        down=("2d", "2d", "2d", None),
        time_down=(None, "res", "res", None),
        mid="3d",
        decoder_blocks=ALL_3D,
        up=(None, "1x3x3", "1x3x3", "1x3x3"),
        time_up=(None, None, "res", "res"),
    ),
}

# How the released models norm and upsample: statistics over the clip, trilinear upsampling.
RELEASED = {"norm_scope": "clip", "spatial_up": "trilinear", "temporal_up": "linear"}
PRESETS: dict[str, dict] = {
    "odvae": {"variant": 4, "norm_scope": "frame", "spatial_up": "nearest", "temporal_up": "nearest"},
    "osp_v1_2": {"variant": 4, **RELEASED},
    "osp_v1_1": {"variant": "osp_v1_1", **RELEASED},
    "osp_v1_0": {"variant": "osp_v1_0", **RELEASED},
}


def find_layout(variant: int | str) -> Layout:
    """Find the row of a variant. Raises ValueError naming the known ones."""
    if variant not in LAYOUTS:
        raise ValueError(f"variant={variant!r}: known are {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[variant]
