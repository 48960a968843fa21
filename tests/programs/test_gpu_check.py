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


def test_a_check_that_fails_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    from pipelines.plan import card_checks

    def broken(s):
        raise RuntimeError("wrong numbers")

    monkeypatch.setitem(card_checks.CHECKS, "broken", (1.0, broken))
    monkeypatch.setitem(card_checks.CHECKS, "fine", (1.0, lambda s: {"x": 1}))
    assert gpu_check.main(["--tiny", "--only", "broken,fine", "--out", str(tmp_path)]) == 1
    assert "2 checks, 1 failed: broken" in capsys.readouterr().out
    page = next(tmp_path.glob("cpu-*.md")).read_text()
    for text in ("## broken: FAILED", "RuntimeError: wrong numbers", "## fine: passed"):
        assert text in page
