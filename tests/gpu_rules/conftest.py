"""The product's own classes on a pretended GPU (pipelines/plan/pretend.py): CUDA's rules hold, on any machine."""

import pytest

from pipelines.plan.pretend import pretended_gpu


@pytest.fixture
def gpu():
    """A pretended GPU; `gpu.syncs.found` lists where the host waits for it."""
    with pretended_gpu() as device:
        yield device
