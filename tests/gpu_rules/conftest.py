"""The product's own classes on a pretended GPU (pipelines/plan/pretend.py): CUDA's rules hold, on any machine."""

import pytest
import torch

from pipelines.plan.cost import Costs
from pipelines.plan.pretend import pretended_gpu

HALF = torch.bfloat16


@pytest.fixture
def gpu():
    """A pretended GPU; `gpu.costs` counts what runs on it, `gpu.syncs.found` where the host waits for it."""
    with pretended_gpu() as device, Costs() as costs:
        device.costs = costs
        yield device
