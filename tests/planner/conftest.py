"""What the planner says (pipelines/plan); as the pretended GPU that it runs on, from torch 2.11 on."""

import pytest

from pipelines.plan.pretend import LOWEST_TORCH, too_old


@pytest.fixture(autouse=True)
def _new_enough():
    if too_old():
        pytest.skip(f"not run: the pretended GPU needs torch >= {LOWEST_TORCH}")
