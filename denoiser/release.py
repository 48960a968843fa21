"""Weights of the Latte release (Vchitect/Latte .pt files) <-> ours.

Parameter names agree, so conversion means choosing the right dictionary, checking every key and shape, and
dropping the two position tables: those are functions of the geometry, and regenerating them is what lets
16-frame weights start a 21-frame model. Files are read as tensors only; any other pickle is refused.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.core.tensors import differences
from data.core.weights import read_weights
from denoiser.embeddings import sincos_1d, sincos_2d
from denoiser.latte import LATTE_SIZES, Latte

logger = logging.getLogger(__name__)

_TABLES = ("pos_embed", "temp_embed")
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and by torch.compile
# Upstream's EMA averages the tables too and drifts by 1.6e-4 in 20k updates; another layout by about 1.
_TABLE_TOLERANCE = 0.05


def read_release(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a release file: its "ema" entry, else "model", else all of it; prefixes removed.

    path: .pt (torch.save) or .safetensors. Raises ValueError if damaged or if it holds more than tensors.
    """
    content = read_weights(path)
    try:
        return pick_state_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; fetch it again, or save its state dict alone") from error


def pick_state_dict(content: Mapping) -> dict[str, Tensor]:
    """Choose ema, else model, else the mapping itself, and strip module. and _orig_mod. from its keys.

    Raises ValueError if what is left is not a mapping from names to tensors.
    """
    for entry in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            logger.info("reading the %r weights", entry)
            content = content[entry]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{type(content).__name__}: expected a state dict, alone or under 'ema' or 'model'")
    # Every entry must be a tensor under a name.
    state = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{key!r}: no name of a tensor, so this is no state dict")
        while key.startswith(_PREFIXES):
            key = key.split(".", 1)[1]
        if not isinstance(value, Tensor):
            raise ValueError(f"{key}: {type(value).__name__} in a state dict, expected a tensor")
        state[key] = value
    return state


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
    """Infer the constructor arguments of the Latte whose release state dict this is, from shapes alone.

    num_heads leaves no trace in the shapes: it comes from the table of published sizes, or from the caller.
    Frames that are not square cannot be told from the table: the latent is taken as square.
    Raises ValueError if a needed key is missing or the size is unknown and num_heads is not given.
    """
    # Sizes from the shapes of some tensors, depth from the blocks' numbers.
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        mlp_hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
        num_tokens, num_frames = state["pos_embed"].shape[1], state["temp_embed"].shape[1]
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: missing, so this is not a Latte release state dict") from error
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    # Heads from the table of published sizes.
    if num_heads is None:
        known = {(row["depth"], row["hidden_size"]): row["num_heads"] for row in LATTE_SIZES.values()}
        if (depth, hidden_size) not in known:
            raise ValueError(
                f"depth {depth}, width {hidden_size}: not a published Latte size, give num_heads"
            )
        num_heads = known[depth, hidden_size]
    labels = state.get("y_embedder.embedding_table.weight")
    return {
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "mlp_ratio": mlp_hidden / hidden_size,
        "in_channels": in_channels,
        "num_frames": num_frames,
        "sample_size": math.isqrt(num_tokens) * patch_size,
        "num_classes": None if labels is None else labels.shape[0] - 1,  # the last row is the null class
        "learn_sigma": out_channels == 2 * in_channels,
    }


def from_release(
    source: str | Path | Mapping,
    num_heads: int | None = None,
    num_frames: int | None = None,
    sample_size: int | tuple[int, int] | None = None,
) -> Latte:
    """Load a Latte with the weights of a release file or of its loaded content: CPU, float32, evaluation mode.

    num_frames, sample_size: geometry of the new model where it is not that of the release (fine-tuning a
    16-frame model on 21 latent frames); the position tables are made for it. num_heads: see `infer_config`.
    Raises ValueError unless the keys and shapes are exactly those of that Latte, both tables included.
    """
    # The release's own geometry, whose position tables must be Latte's.
    state = pick_state_dict(source) if isinstance(source, Mapping) else read_release(source)
    config = infer_config(state, num_heads)
    _check_tables(state, config)
    # The geometry that is wanted; all tensors but the tables are the same for any.
    weights = {key: value for key, value in state.items() if key not in _TABLES}
    if num_frames is not None:
        config["num_frames"] = num_frames
    if sample_size is not None:
        config["sample_size"] = sample_size
    model = Latte(**config)
    if wrong := differences(model.state_dict(), weights):
        raise ValueError(f"not the weights of this Latte: {wrong}")
    model.load_state_dict(weights)
    return model.eval()


def to_release(model: Latte) -> dict[str, Tensor]:
    """Make the upstream state dict of a Latte: its parameters plus pos_embed (1, N, D) and temp_embed (1, t, D).

    The parameters are clones on the CPU; the XL/2 of 101 classes gives the 293 keys of ucf101.pt['ema'].
    """
    tables = {name: getattr(model, name) for name in _TABLES}
    return {key: value.detach().cpu().clone() for key, value in {**tables, **model.state_dict()}.items()}


def save_release(model: Latte, path: str | Path) -> None:
    """Write {"ema": state dict}, which upstream's samplers load, as a .pt file."""
    torch.save({"ema": to_release(model)}, path)


def _check_tables(state: Mapping[str, Tensor], config: dict) -> None:
    """Raise ValueError unless the file's position tables are Latte's, but for what an EMA of them drifts."""
    D, side = config["hidden_size"], config["sample_size"] // config["patch_size"]
    expected = {
        "pos_embed": sincos_2d(side, side, D),
        "temp_embed": sincos_1d(range(config["num_frames"]), D),
    }
    for name, table in expected.items():
        found = state[name]
        if tuple(found.shape) != (1, *table.shape):
            raise ValueError(
                f"{name} of shape {tuple(found.shape)}: expected {(1, *table.shape)}, a square grid"
            )
        drift = float((found[0].double() - torch.from_numpy(table)).abs().max())
        if not drift <= _TABLE_TOLERANCE:
            raise ValueError(
                f"{name}: differs by {drift:.3g} from Latte's fixed sin-cos table, another model's weights"
            )
        logger.info("%s: regenerated, the file's copy had drifted by %.1e", name, drift)
