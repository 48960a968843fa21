"""Work beside the device's: in order, bounded, and an error in it ends the program."""

import threading
import time

import pytest

from pipelines.beside import Beside, Waits


def test_what_is_given_is_done_in_order_beside_the_caller_and_before_the_end():
    done, waits = [], Waits()
    with Beside(waits, "writing", ahead=2) as beside:
        for n in range(8):
            beside.do(lambda n: done.append((n, threading.get_ident())), n)
    assert [n for n, _ in done] == list(range(8))
    assert {thread for _, thread in done} != {threading.get_ident()}


def test_no_more_than_a_few_pieces_wait():
    may_go, given, waits = threading.Event(), [], Waits()

    def give():
        with Beside(waits, "writing", ahead=3) as beside:
            for n in range(6):
                beside.do(may_go.wait)
                given.append(n)

    thread = threading.Thread(target=give)
    thread.start()
    time.sleep(0.5)
    assert len(given) == 3
    may_go.set()
    thread.join(10)
    assert len(given) == 6
    assert waits.seconds["writing"] > 0.3


@pytest.mark.parametrize("more", [0, 5])
def test_an_error_beside_ends_the_program_and_what_waits_is_not_begun(more):
    begun = []

    def work(n):
        begun.append(n)
        if n == 1:
            raise OSError("no space left")

    def give():
        with Beside(Waits(), "writing", ahead=8) as beside:
            for n in range(2 + more):
                beside.do(work, n)

    with pytest.raises(OSError, match="no space left"):
        give()
    assert begun == [0, 1]


def test_an_error_of_the_caller_is_the_one_that_is_seen():
    def give():
        with Beside(Waits(), "writing") as beside:
            beside.do(lambda: 1 / 0)
            raise KeyError

    with pytest.raises(KeyError):
        give()


def test_what_was_given_before_the_caller_failed_is_still_done():
    done = []

    def give():
        with Beside(Waits(), "writing", ahead=8) as beside:
            for n in range(6):
                beside.do(lambda n: (time.sleep(0.05), done.append(n)), n)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give()
    assert done == list(range(6))


def test_waits_are_shares_of_the_time_by_what_was_waited_for():
    waits = Waits()
    assert str(waits) == "no waiting"

    def slow():
        for n in range(3):
            time.sleep(0.05)
            yield n

    assert list(waits.over(slow(), "videos")) == [0, 1, 2]
    assert waits.seconds["videos"] >= 0.15
    waits.seconds["videos"], waits.began = 5.0, time.monotonic() - 20.0
    assert str(waits) == "25% of the time waiting for videos"
