"""Mailboxes: nothing is lost or doubled, and who sleeps is woken."""

from __future__ import annotations

import threading
import time

import pytest

from envs.serving.mailbox import Calls, Mailbox


def test_what_many_threads_post_arrives_once_and_in_each_ones_order() -> None:
    mail: Mailbox[tuple[int, int]] = Mailbox()

    def post(thread: int) -> None:
        for i in range(2000):
            mail.post([(thread, i)])

    threads = [threading.Thread(target=post, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    got = []
    while len(got) < 8000:
        assert mail.wait(20.0), f"{len(got)} of 8000 came, then nobody rang"
        got.append(mail.next())
    for thread in threads:
        thread.join()
    assert not mail.wait(0.0)
    for k in range(4):
        assert [i for thread, i in got if thread == k] == list(range(2000))
    mail.close()


def test_a_sleeper_wakes_for_a_post_and_at_its_time() -> None:
    mail: Mailbox[str] = Mailbox()
    began = time.monotonic()
    assert not mail.wait(0.05)
    assert time.monotonic() - began >= 0.05
    late = threading.Timer(0.1, mail.post, [["here"]])
    late.start()
    assert mail.wait(None) and mail.next() == "here"
    with pytest.raises(IndexError):
        mail.next()
    late.join()
    mail.close()
    mail.post(["nobody takes it"])


def test_a_call_that_fails_does_not_keep_the_others_from_being_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls, made = Calls(), []

    def broken() -> None:
        raise RuntimeError("a bug")

    for call in (lambda: made.append(1), broken, lambda: made.append(2)):
        calls.ask(call)
    calls.make()
    assert made == [1, 2]
    assert "a call into the front failed" in caplog.text
    calls.close()
