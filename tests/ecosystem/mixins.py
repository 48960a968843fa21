"""diffusers' own test mixins, loaded from the folder `tests` of its repository that OMNILATTE_DIFFUSERS_TESTS names.

They are not part of the installed package: `git clone --depth 1 https://github.com/huggingface/diffusers` and name its
folder tests. Without them every class here is an empty one whose tests are listed as not run.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin

_FOLDER = Path(os.environ.get("OMNILATTE_DIFFUSERS_TESTS") or "no_such_folder")
here = (_FOLDER / "models" / "testing_utils" / "common.py").is_file()
# Tests of offloading and compiling are for accelerators; on a CPU these are left that need none
NEEDS_GPU = {
    "test_cpu_offload",
    "test_disk_offload_without_safetensors",
    "test_disk_offload_with_safetensors",
    "test_sharded_checkpoints_with_device_map",
    "test_layerwise_casting_memory",
    "test_model_parallelism",
    "test_sequential_cpu_offload_forward_pass",
    "test_model_cpu_offload_forward_pass",
    "test_cpu_offload_forward_pass_twice",
    "test_sequential_offload_forward_pass_twice",
}


def _load():
    spec = importlib.util.spec_from_file_location(
        "diffusers_tests", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["diffusers_tests"])
    utils = importlib.import_module("diffusers_tests.testing_utils")
    if utils.torch_device == "cpu":
        utils.require_accelerator = utils.require_torch_accelerator = lambda test: test
        utils.require_torch_accelerator_with_training = lambda test: test
    return [importlib.import_module(f"diffusers_tests.{name}") for name in (
        "models.testing_utils", "models.autoencoders.testing_utils", "pipelines.testing_utils", "testing_utils"
    )]  # fmt: skip


if here:
    models, autoencoders, pipelines, utils = _load()
    device = utils.torch_device
else:
    device = "cpu"


def mixin(module: str, name: str) -> type:
    """A class of diffusers' tests; when they are not there, a class with one test that says so."""
    if here:
        return getattr(globals()[module], name)

    def test_of_diffusers(self):
        pytest.skip("not run: OMNILATTE_DIFFUSERS_TESTS names no folder `tests` of diffusers' repository")

    return type(name, (), {"test_of_diffusers": test_of_diffusers})


@pytest.fixture(autouse=True)
def needs_gpu(request, monkeypatch):
    """Skips what only a GPU can show, on a machine without one; there group offloading runs without streams."""
    if torch.cuda.is_available():
        return
    if request.function.__name__ in NEEDS_GPU:
        pytest.skip("not run: needs a GPU")
    offload = ModelMixin.enable_group_offload
    without = {"use_stream": False, "record_stream": False, "non_blocking": False}
    monkeypatch.setattr(
        ModelMixin, "enable_group_offload", lambda self, *args, **kw: offload(self, *args, **kw | without)
    )
    if "aot" in request.function.__name__:
        return
    whole, module = torch.compile, torch.nn.Module.compile  # graphs are what is tested, not a compiler's code
    monkeypatch.setattr(torch, "compile", lambda *a, **kw: whole(*a, **{"backend": "aot_eager"} | kw))
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda *a, **kw: module(*a, **{"backend": "aot_eager"} | kw)
    )
