"""The product's own classes on a pretended GPU (pipelines/plan/pretend.py): CUDA's rules hold, on any machine."""

import pytest

from pipelines.plan.pretend import LOWEST_TORCH, pretended_gpu, too_old


@pytest.fixture(autouse=True)
def _new_enough():
    if too_old():
        pytest.skip(f"not run: the pretended GPU needs torch >= {LOWEST_TORCH}")


@pytest.fixture
def gpu():
    """A pretended GPU; `gpu.syncs.found` lists where the host waits for it."""
    with pretended_gpu() as device:
        yield device
