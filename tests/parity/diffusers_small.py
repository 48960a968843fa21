"""A small config of each video autoencoder of diffusers, and other designs of the same classes."""

_LTX = {
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "latent_channels": 8,
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}
# Of LTX 0.9.1; the scales of the noise are 0 before training.
_NOISY = {"timestep_conditioning": True, "decoder_inject_noise": (False, True, True, True, False)}
_BLOCKS = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
}
_WAN = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
_STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 0.5]}
_VIDTOK = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}

# name: (class, config, clip length, side of the pixels)
SMALL = {
    "wan": ("AutoencoderKLWan", _WAN | _STATISTICS, 9, 32),
    "qwenimage": ("AutoencoderKLQwenImage", _WAN | _STATISTICS, 9, 32),
    "cogvideox": ("AutoencoderKLCogVideoX", _BLOCKS, 9, 32),
    "hunyuanvideo": ("AutoencoderKLHunyuanVideo", _BLOCKS, 9, 32),
    "hunyuanvideo15": (
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": (16, 16, 16, 16, 16), "layers_per_block": 1, "latent_channels": 4},
        9,
        32,
    ),
    "ltx": ("AutoencoderKLLTXVideo", _LTX, 9, 64),
    "ltx2": (
        "AutoencoderKLLTX2Video",
        _LTX
        | {
            "block_out_channels": (8, 16, 32, 64),
            "decoder_block_out_channels": (8, 16, 32),
            "decoder_layers_per_block": (1, 1, 1, 1),
        },
        9,
        64,
    ),
    "mochi": (
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "latent_channels": 4,
            "layers_per_block": (1, 1, 1, 1, 1),
        }
        | _STATISTICS,
        7,
        32,
    ),
    "cosmos": (
        "AutoencoderKLCosmos",
        {
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "num_layers": 1,
            "resolution": 64,
            "latents_mean": [0.01 * i for i in range(12)],
            "latents_std": [1.0 + 0.1 * i for i in range(12)],  # one a channel and latent frame
        },
        17,
        32,
    ),
    "magvit": ("AutoencoderKLMagvit", _BLOCKS, 9, 32),
    "kvae": (
        "AutoencoderKLKVAEVideo",
        {"ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "z_channels": 4},
        25,
        16,
    ),
    "vidtok": ("AutoencoderVidTok", _VIDTOK, 9, 32),
    "allegro": ("AutoencoderKLAllegro", _BLOCKS | {"sample_size": 128}, 24, 128),
}
OTHER = {
    "wan 2.2": (
        "AutoencoderKLWan",
        {
            "base_dim": 8,
            "decoder_base_dim": 12,
            "z_dim": 6,
            "num_res_blocks": 1,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
            "latents_mean": [0.1] * 6,
            "latents_std": [1.5] * 6,
        },
        9,
        64,
    ),
    "wan, time halved once": (
        "AutoencoderKLWan",
        _WAN | _STATISTICS | {"temperal_downsample": [False, False, True]},
        9,
        32,
    ),
    "cogvideox 1.5": ("AutoencoderKLCogVideoX", _BLOCKS | {"invert_scale_latents": True}, 17, 16),
    "hunyuanvideo, framewise": ("AutoencoderKLHunyuanVideo", _BLOCKS, 21, 16),
    "ltx 0.9.1": ("AutoencoderKLLTXVideo", _LTX | _NOISY, 9, 64),
    "magvit, norms over time": ("AutoencoderKLMagvit", _BLOCKS | {"spatial_group_norm": False}, 9, 16),
    "vidtok, not causal": ("AutoencoderVidTok", _VIDTOK | {"is_causal": False}, 16, 32),
}
