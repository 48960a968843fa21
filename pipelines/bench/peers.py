"""Other projects' own models, from a checkout of theirs on this machine; nothing of theirs is in this project.

    git clone --branch v1.2.0 https://github.com/PKU-YuanGroup/Open-Sora-Plan
    git clone https://github.com/Vchitect/Latte
    git clone https://github.com/songweige/content-debiased-fvd

A model's file is imported without the packages' __init__ files and without what it imports for other purposes
(training, data): those names are empty stand-ins while it is imported.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from data.core.lazy import lazy

release = lazy("vae.release")
variants = lazy("vae.variants")


@dataclass(frozen=True)
class Peer:
    """module: where its model is, in a checkout. bare: packages imported without their code. unneeded: empty stand-ins."""

    name: str
    module: str
    bare: tuple[str, ...]
    unneeded: tuple[str, ...]


_OSP = "opensora.models.causalvideovae"
_I3D = "cdfvd.third_party.i3d"
PEERS = (
    Peer(
        "Open-Sora-Plan",
        f"{_OSP}.model.causal_vae.modeling_causalvae",
        ("opensora", "opensora.models", _OSP, f"{_OSP}.model", f"{_OSP}.model.causal_vae"),
        ("decord", "pytorch_lightning", "pytorchvideo", "torchvision", f"{_OSP}.eval", f"{_OSP}.utils"),
    ),
    Peer("Latte", "models.latte", ("models",), ("xformers",)),
    Peer("cd-fvd", f"{_I3D}.utils", ("cdfvd", "cdfvd.third_party", _I3D), ("requests",)),
)


class _Nothing(ModuleType):
    """A module in which every name is there and is a class without content."""

    __path__: list[str] = []  # noqa: RUF012 (a package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, folder: Path, peer: Peer):
        self.folder, self.peer = folder, peer

    def stands_in(self, name: str) -> bool:
        return any(f"{name}.".startswith(f"{root}.") for root in self.peer.unneeded)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if self.stands_in(name):
            return ModuleSpec(name, self, is_package=True)
        if name not in self.peer.bare:
            return None
        spec = ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(self.folder.joinpath(*name.split(".")))]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return _Nothing(spec.name) if self.stands_in(spec.name) else None

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _standing_in(finder: _Finder) -> Iterator[None]:
    real = {name: module for name, module in sys.modules.items() if finder.stands_in(name)}
    for name in real:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if finder.stands_in(name)]:
            del sys.modules[name]
        sys.modules.update(real)


def load_peers(folders: str) -> dict[str, ModuleType]:
    """{name: the module with its model} for checkouts, separated by commas. ValueError for a folder that is none of them."""
    found = {}
    for text in filter(None, folders.split(",")):
        folder = Path(text).expanduser()
        here = [p for p in PEERS if folder.joinpath(*p.module.split(".")).with_suffix(".py").is_file()]
        if not here:
            known = ", ".join(f"{p.name} ({p.module.replace('.', '/')}.py)" for p in PEERS)
            raise ValueError(f"peer={text}: not a checkout of {known}")
        import diffusers.models.modeling_utils  # noqa: F401 (with the real torchvision)

        try:
            with _standing_in(_Finder(folder, here[0])):
                found[here[0].name] = import_module(here[0].module)
        except ImportError as error:
            raise ValueError(
                f"peer={text}: {here[0].name} cannot be imported: {error}; pip install it"
            ) from error
    return found


def _load(model: Any, weights: dict[str, Any], peer: str, tables: tuple[str, ...] = ()) -> Any:
    """The peer's model with our weights, ready to answer. tables: its own, which are no weights of ours.

    ValueError with the names of the weights that only one side has, or in another shape.
    """
    theirs = model.state_dict()
    shapes = [{k: tuple(v.shape) for k, v in side.items() if k not in tables} for side in (theirs, weights)]
    differing = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
    if differing:
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(
            f"peer: {peer}'s model in this checkout has other weights than ours: {', '.join(differing[:8])}{more}; "
            "pipelines/bench/peers.py says what to check out"
        )
    model.load_state_dict(weights, strict=not tables)
    return model.eval()


def open_sora_plan(module: ModuleType, vae: Any) -> Any:
    """Open-Sora-Plan's CausalVAEModel with the size and the weights of an ODVAE of variant 4."""

    config, widths = vae.config, vae.config.block_out_channels
    model = module.CausalVAEModel(
        hidden_size=widths[0],
        hidden_size_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=config.layers_per_block,
        z_channels=config.latent_channels,
        embed_dim=config.latent_channels,
        attn_resolutions=[],
        **release.layout_fields(variants.find_layout(config.variant)),
    )
    return _load(model, vae.state_dict(), "Open-Sora-Plan")


def latte(module: ModuleType, ours: Any) -> Any:
    """Latte's model with the size and the weights of ours, as their train.py makes it."""
    c = ours.config
    model = module.Latte(
        input_size=ours.latent_hw[0],
        patch_size=c.patch_size,
        in_channels=c.in_channels,
        hidden_size=c.hidden_size,
        depth=c.depth,
        num_heads=c.num_heads,
        num_frames=c.num_frames,
        num_classes=c.num_classes,
        learn_sigma=c.learn_sigma,
        extras=2,
        class_dropout_prob=c.class_dropout_prob,
    )
    return _load(model, ours.state_dict(), "Latte", ("pos_embed", "temp_embed"))


def cd_fvd(module: ModuleType, ours: Any) -> Any:
    """cd-fvd's I3D with the weights of ours."""
    return _load(module.pytorch_i3d.InceptionI3d(400, in_channels=3), ours.state_dict(), "cd-fvd")
