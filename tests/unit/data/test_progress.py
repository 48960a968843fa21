"""A long loop without a terminal says how long it will take, and then now and then how far it is."""

import logging
import re

import pytest

from data import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock, units, total, **more):
    with progress.Progress(total, "train", "step", **more) as bar:
        for seconds in units:
            clock[0] += seconds
            bar.update()


def test_the_first_unit_which_is_slow_does_not_count(clock, caplog):
    caplog.set_level(logging.INFO)
    run(clock, [15, *[0.5] * 50], 209)
    assert [r.getMessage() for r in caplog.records] == ["train: 10 of 209 steps, about 100 s left"]


def test_few_and_long_units_are_known_after_the_first(clock, caplog):
    caplog.set_level(logging.INFO)
    run(clock, [60, 60, 60], 5)
    lines = ["train: 1 of 5 steps, about 4 min left", "train: 2 of 5 steps, about 3 min left"]
    assert [r.getMessage() for r in caplog.records] == [*lines, "train: 3 of 5 steps, about 2 min left"]


def test_a_line_each_twentieth_or_ten_minutes_and_one_at_the_end(clock, caplog):
    caplog.set_level(logging.INFO)
    run(clock, [40] * 100, 100)
    done = [int(r.getMessage().split(" of ")[0].removeprefix("train: ")) for r in caplog.records[:-1]]
    assert done == list(range(1, 100, 6))
    assert caplog.records[-1].getMessage() == "train: all 100 steps in 67 min"
    caplog.clear()
    run(clock, [100] * 1000, 10**6)
    assert len(caplog.records) == 1 + 999 * 100 // 700


def test_a_caller_with_lines_of_its_own_gets_the_first_only(clock, caplog):
    caplog.set_level(logging.INFO)
    run(clock, [60] * 5, 5, once=True)
    assert [r.getMessage() for r in caplog.records] == ["train: 1 of 5 steps, about 4 min left"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(99.4, "99 s"), (101, "2 min"), (7300, "2 h"), (200_000, "2 d")]
)
def test_times_as_people_say_them(seconds, text):
    assert progress.duration(seconds) == text


def test_a_resumed_loop_counts_its_own_units_only(clock, caplog):
    caplog.set_level(logging.INFO)
    run(clock, [1] * 9, 1010, initial=1000)
    assert re.search(r"1006 of 1010 steps, about 4 s left", caplog.text)


def test_a_short_loop_and_another_process_say_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    run(clock, [1, 1, 1], 3)
    run(clock, [30], 1)
    run(clock, [30] * 5, 9, main=False)
    assert not caplog.records
