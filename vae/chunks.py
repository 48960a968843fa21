"""Gradients through diffusers' networks that take a clip piece by piece with features carried on: Wan, Magvit, KVAE.

Each piece is recomputed in the backward pass, so that memory does not grow with all activations of the clip.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


class Chunks:
    """How a network with features carried from piece to piece takes a clip; for gradients only.

    `step` runs one piece: the carried features go in and come out as values, so that a checkpoint can compute it again.
    `split` cuts a clip (encoder) or latents (decoder); `prepare` and `finish` are what stands around the loop. The
    decoder's last convolution, `last`, runs outside of the checkpoint: the balance of the adversarial term asks for its
    gradient alone, and must not bring back the activations of the whole clip.
    """

    def __init__(self, vae: Any, stage: str):
        self.vae, self.stage = vae, stage
        self.network = getattr(vae, stage)
        self.last = self.network.conv_out if stage == "decoder" else None

    def start(self) -> list[Any]:
        raise NotImplementedError

    def step(self, first: bool, piece: Tensor, carried: list[Any]) -> tuple[Tensor, list[Any]]:
        raise NotImplementedError

    def split(self, x: Tensor) -> list[int]:
        T, size = x.shape[2], 4 if self.stage == "encoder" else 1
        return [1] + [size] * ((T - 1) // size)

    def prepare(self, x: Tensor) -> Tensor:
        return x if self.stage == "encoder" else self.vae.post_quant_conv(x)

    def finish(self, x: Tensor) -> Tensor:
        return self.vae.quant_conv(x) if self.stage == "encoder" else x

    def head(self, features: Tensor, carried: list[Any]) -> Tensor:
        """Run `last` on a piece; carried: what went into the piece's `step`."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _headless(self) -> Iterator[None]:
        """Run the block with a decoder that returns what its last convolution would get."""
        if self.last is None:
            yield
            return
        self.network._modules["conv_out"] = _First()
        try:
            yield
        finally:
            self.network._modules["conv_out"] = self.last

    def __call__(self, x: Tensor, recompute: bool) -> Tensor:
        """Run the whole stage. recompute: keep only the inputs of each piece for the backward pass."""
        x, carried, outputs = self.prepare(x), self.start(), []
        for i, piece in enumerate(x.split(self.split(x), dim=2)):
            # The piece and the carried features go in as values; its output and the next features come out.
            call, before = functools.partial(self._flat, i == 0), carried
            if recompute:
                output, *carried = checkpoint(call, piece, *carried, use_reentrant=False)
            else:
                output, *carried = call(piece, *carried)
            # The last convolution with the features from before this piece, outside of the checkpoint.
            outputs.append(output if self.last is None else self.head(output, before))
        return self.finish(torch.cat(outputs, dim=2))

    def _flat(self, first: bool, piece: Tensor, *carried: Any) -> tuple[Any, ...]:
        with self._headless():
            output, after = self.step(first, piece, list(carried))
        return output, *after


class _First(nn.Module):
    """Stands for a convolution that is left out: its input comes out."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


class WanChunks(Chunks):
    """Wan and QwenImage: a list of features, one a convolution, which the network changes in place."""

    def start(self) -> list[Any]:
        return [None] * self.vae._cached_conv_counts[self.stage]

    def step(self, first: bool, piece: Tensor, carried: list[Any]) -> tuple[Tensor, list[Any]]:
        # Wan's decoder has to be told which piece is the first; QwenImage's takes no such argument.
        marked = {"first_chunk": True} if first and self.stage == "decoder" and self._wan else {}
        count = [0]  # the network's own counter of its convolutions
        output = self.network(piece, feat_cache=carried, feat_idx=count, **marked)
        self.place = count[0] - 1  # of the last convolution; the list is longer
        return output, carried

    def head(self, features: Tensor, carried: list[Any]) -> Tensor:
        return self.last(features, carried[self.place])

    @property
    def _wan(self) -> bool:
        return "patch_size" in self.vae.config

    def prepare(self, x: Tensor) -> Tensor:
        patch = self.vae.config.get("patch_size")
        if self.stage == "encoder" and patch is not None:
            x = diffusers.models.autoencoders.autoencoder_kl_wan.patchify(x, patch)
        return super().prepare(x)

    def finish(self, x: Tensor) -> Tensor:
        """Leave out the clamp to [-1, 1] of decode, which takes the gradient from every saturated pixel."""
        patch = self.vae.config.get("patch_size")
        if self.stage == "decoder" and patch is not None:
            x = diffusers.models.autoencoders.autoencoder_kl_wan.unpatchify(x, patch)
        return super().finish(x)


class MagvitChunks(Chunks):
    """Magvit: each convolution keeps its last features in an attribute."""

    def _keepers(self) -> list[nn.Module]:
        modules = self.network.modules()
        return [one for one in modules if hasattr(one, "prev_features") and one is not self.last]

    def start(self) -> list[Any]:
        return [None] * len(self._keepers())

    def step(self, first: bool, piece: Tensor, carried: list[Any]) -> tuple[Tensor, list[Any]]:
        # Lend each convolution its features for this piece, and leave none behind.
        keepers = self._keepers()
        try:
            for module, features in zip(keepers, carried, strict=True):
                module.prev_features = features
            return self.network(piece), [module.prev_features for module in keepers]
        finally:
            for module in keepers:
                module.prev_features = None

    def head(self, features: Tensor, carried: list[Any]) -> Tensor:
        return self.last(features)


class KVAEChunks(Chunks):
    """KVAE: a tree of dicts, filled in place, for segments of 16 frames after the first."""

    def start(self) -> list[Any]:
        # A checkpoint takes values, not a tree: the leaves are carried, the tree is made again in each step.
        tree = getattr(self.vae, f"_make_{self.stage}_cache")()
        carried, self.layout = tree_flatten(tree, is_leaf=lambda node: node is None)
        self.kept = {"padding": None}
        return carried

    def step(self, first: bool, piece: Tensor, carried: list[Any]) -> tuple[Tensor, list[Any]]:
        tree = tree_unflatten(carried, self.layout)
        output = self.network(piece, tree)
        return output, tree_flatten(tree, is_leaf=lambda node: node is None)[0]

    def head(self, features: Tensor, carried: list[Any]) -> Tensor:
        return self.last(features, cache=self.kept)

    def split(self, x: Tensor) -> list[int]:
        # Segments of 16 frames, or as many latents, and what is left; the first has one frame more.
        size = 16 if self.stage == "encoder" else 16 // self.vae.config.temporal_compress_times
        whole, rest = divmod(max(0, x.shape[2] - 1), size)
        sizes = [size] * whole + [rest] * (rest > 0) or [0]
        return [sizes[0] + 1, *sizes[1:]]

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def finish(self, x: Tensor) -> Tensor:
        return x
