"""The check of a real card, rehearsed at small sizes on a CPU."""

import json

import pytest

from pipelines import gpu_check


@pytest.mark.slow
@pytest.mark.timeout(1800)  # all checks in one process: more than 600 s on a slow machine
def test_every_check_passes_at_small_sizes_and_leaves_a_page(tmp_path, capsys):
    assert gpu_check.main(["--tiny", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in next(tmp_path.glob("cpu-*.jsonl")).read_text().splitlines()]
    assert all(row["ok"] for row in rows if "check" in row)
    page = next(tmp_path.glob("cpu-*.md")).read_text()
    assert "FAILED" not in page
    assert page.count("\n## ") == len([row for row in rows if "check" in row])


def test_some_checks_alone(tmp_path, capsys):
    assert gpu_check.main(["--tiny", "--only", "precisions,stage_one,stage_two", "--out", str(tmp_path)]) == 0
    assert "3 checks, 0 failed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--only stage_three: the checks are ceilings"):
        gpu_check.main(["--tiny", "--only", "stage_three"])
