"""diffusers' own tests of a model: saving, devices, offloading, casting, compiling, training; every VAE and Latte."""

import torch

from denoiser import Latte
from tests.ecosystem.mixins import device, mixin, needs_gpu  # noqa: F401 - a fixture of every test here
from tests.unit.vae.test_baselines import TINY
from vae import ODVAE, build_vae

Config = mixin("models", "BaseModelTesterConfig")
MIXINS = {name: mixin("models", f"{name}TesterMixin") for name in ("Model", "Memory", "Training")}
MIXINS["Compile"] = mixin("models", "TorchCompileTesterMixin")
MIXINS["Tiling"] = mixin("autoencoders", "AutoencoderTesterMixin")
OD = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
RELEASED = {"norm_scope": "clip", "spatial_up": "trilinear", "temporal_up": "linear"}
LATTE = {"depth": 4, "hidden_size": 16, "num_heads": 2, "num_frames": 3, "sample_size": 4}
MODELS = {
    "ODVAE": (ODVAE, OD),
    "ReleasedODVAE": (ODVAE, OD | RELEASED),
    "OlderODVAE": (ODVAE, OD | {"variant": "osp_v1_1"}),
    "Latte": (Latte, LATTE | {"num_classes": 5}),
    "UnconditionalLatte": (Latte, LATTE),
    **{type(build_vae(name, **config)).__name__: (None, (name, config)) for name, config in TINY.items()},
}


def draw(*shape) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(device)


def settings(cls: type, init: dict) -> dict:
    """What diffusers asks of a model: its class, its config, an input, the shape of its output."""
    if cls is Latte:
        inputs = {"x": draw(2, 4, 3, 4, 4), "t": torch.tensor([3, 500], device=device)}
        if init.get("num_classes"):
            inputs["y"] = torch.tensor([0, 4], device=device)
        shape, main = (8, 3, 4, 4), "x"
    else:
        T = 8 if cls.frame_rule == "4n" else 9
        inputs, shape, main = {"sample": draw(2, 3, T, 32, 32)}, (3, T, 32, 32), "sample"
    return {
        "model_class": cls,
        "main_input_name": main,
        "output_shape": shape,
        "get_init_dict": lambda self: dict(init),
        "get_dummy_inputs": lambda self: {k: v.clone() for k, v in inputs.items()},
    }


def norm_groups(self):
    """diffusers asks for two levels; these networks have four."""
    init = self.get_init_dict()
    widths = next(name for name in init if name.endswith("block_out_channels"))
    init |= {"norm_num_groups": 16, widths: (16, 16, 32, 32)} | ({"filters": 16} if "filters" in init else {})
    sample = self.get_dummy_inputs()["sample"]
    with torch.no_grad():
        assert self.model_class(**init).to(device).eval()(sample).sample.shape == sample.shape


for name, (cls, init) in MODELS.items():
    if cls is None:
        cls, init = type(build_vae(init[0], **init[1])), init[1]
    for part, tests in MIXINS.items():
        if part == "Tiling" and cls is Latte:
            continue
        body = settings(cls, init)
        if part == "Tiling" and "norm_num_groups" in init:
            body["test_forward_with_norm_groups"] = norm_groups
        globals()[f"Test{name}{part}"] = type(f"Test{name}{part}", (Config, tests), body)
del name, cls, init, part, tests, body
