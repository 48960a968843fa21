"""diffusers' own tests of a pipeline."""

import torch

from denoiser import Latte
from pipelines.video_pipeline import LatentVideoPipeline
from tests.ecosystem.mixins import mixin, needs_gpu  # noqa: F401 - a fixture of every test here
from tests.ecosystem.test_models import LATTE, OD
from vae import ODVAE


class Settings(mixin("pipelines", "BasePipelineTesterConfig")):
    pipeline_class = LatentVideoPipeline
    required_input_params_in_call_signature = batch_input_params = frozenset(["class_labels"])
    optional_input_params = frozenset(
        ["num_inference_steps", "generator", "latents", "output_type", "return_dict"]
    )
    output_shape = (9, 3, 32, 32)

    def get_dummy_components(self):
        torch.manual_seed(0)
        transformer = Latte(**LATTE, num_classes=5)
        torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.1)
        return {"vae": ODVAE(**OD).eval(), "transformer": transformer.eval()}

    def get_dummy_inputs(self):
        calm = {"guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "pt"}
        return {"class_labels": 1, "generator": torch.Generator().manual_seed(0), **calm}


class TestPipeline(Settings, mixin("pipelines", "PipelineTesterMixin")):
    pass


class TestMemory(Settings, mixin("pipelines", "MemoryTesterMixin")):
    pass
