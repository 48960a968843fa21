"""Shared by all tests: one CPU thread, fixed seeds, the frozen outputs, the real clips when they are there."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).parents[1]
# No test finds a weight file that happens to lie on the machine; those of `real_weights` are looked for here
os.environ.setdefault("OMNILATTE_TEST_WEIGHTS", os.environ.get("OMNILATTE_WEIGHTS") or str(_ROOT / "weights"))
os.environ["OMNILATTE_WEIGHTS"] = os.environ["TORCH_HOME"] = str(_ROOT / "tests" / "no_such_folder")

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "parity" / "golden"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="not run: slow (pass --slow)"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """Folder of the frozen outputs of reference implementations."""
    return GOLDEN


@pytest.fixture
def assets():
    """Folder of real clips (ucf101/, sky/, corrupt/), named by OMNILATTE_ASSETS; the test is listed as not run without it."""
    folder = os.environ.get("OMNILATTE_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("not run: OMNILATTE_ASSETS names no folder of real clips")
    return Path(folder)


@pytest.fixture(scope="session")
def real_weights():
    """Folder of the judging networks, fetched and verified; the test is listed as not run without them."""
    from eval.fetch_weights import missing

    folder = Path(os.environ["OMNILATTE_TEST_WEIGHTS"])
    if lacking := missing(folder):
        pytest.skip(f"not run: {', '.join(lacking)} missing in {folder}; bash scripts/fetch_weights.sh")
    return folder
