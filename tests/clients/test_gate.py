import threading

import pytest

from clients.gate import Gate, Mode, SiteClosed


def test_a_running_site_answers_and_counts():
    gate = Gate(lambda request: request + b"!")
    assert gate.answer(b"grade") == b"grade!"
    assert (gate.mode, gate.answered, gate.answering) == (Mode.RUNNING, 1, False)


@pytest.mark.parametrize("close", [Gate.pause, Gate.drain])
def test_a_closed_site_answers_nothing(close):
    gate = Gate(bytes)
    close(gate)
    with pytest.raises(SiteClosed, match=r"the site is (paused|draining)"):
        gate.answer(b"")


def test_a_paused_site_answers_after_resume():
    gate = Gate(bytes)
    gate.pause()
    gate.resume()
    assert gate.answer(b"x") == b"x"


def test_a_draining_site_stays_draining():
    gate = Gate(bytes)
    gate.drain()
    gate.resume()
    assert gate.mode is Mode.DRAINING


def test_an_idle_site_is_drained_at_once():
    gate = Gate(bytes)
    gate.drain()
    assert gate.drained.is_set()


def test_draining_waits_for_the_answer_inside_and_refuses_the_one_behind_it():
    entered, leave = threading.Event(), threading.Event()

    def slow(request):
        entered.set()
        assert leave.wait(5)
        return request

    gate = Gate(slow)
    replies, refused = [], []

    def second():
        try:
            gate.answer(b"second")
        except SiteClosed as error:
            refused.append(error)

    threads = [threading.Thread(target=lambda: replies.append(gate.answer(b"first"))), threading.Thread(target=second)]
    threads[0].start()
    assert entered.wait(5)
    threads[1].start()
    gate.drain()
    assert not gate.drained.is_set()
    leave.set()
    for thread in threads:
        thread.join(5)
    assert (replies, len(refused), gate.drained.is_set()) == ([b"first"], 1, True)


def test_a_site_that_fails_has_left_the_gate():
    def fail(_request):
        raise ValueError("disk full")

    gate = Gate(fail)
    with pytest.raises(ValueError, match="disk full"):
        gate.answer(b"")
    assert (gate.answering, gate.answered) == (False, 0)
