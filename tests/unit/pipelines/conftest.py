"""Places and desk of a table in a folder of the test."""

import pytest

from pipelines.results.run_table import Desk
from pipelines.results.tables import Places


@pytest.fixture
def places(tmp_path):
    return Places(str(tmp_path / "data"), str(tmp_path / "weights"), str(tmp_path / "out"))


@pytest.fixture
def desk(places):
    return Desk(places)
