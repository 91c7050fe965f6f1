"""What a leader knows of one other member (thesis 3.5, 10.2.1)."""

from __future__ import annotations

import pytest

from raftnode.consensus.progress import Progress


def probing(next: int = 10) -> Progress:
    return Progress(next, now=0.0)


def replicating(match: int = 9) -> Progress:
    """Where the logs match is known, so that several messages may be under way."""
    progress = probing(match + 1)
    progress.sent(match, 0.0)
    progress.acknowledged(match)
    assert not progress.probing
    return progress


def test_probe_is_one_message_at_a_time() -> None:
    """A new leader does not know where the logs part: it sends one message, even with nothing to send, and waits.
    (Thesis 3.5, 10.2.1.)"""
    progress = probing()
    assert progress.may_send(last=9, window=8), "an empty probe"
    progress.sent(9, 0.0)
    assert not progress.may_send(last=50, window=8)
    progress.acknowledged(9)
    assert progress.may_send(last=50, window=8)


def test_probe_is_not_repeated_without_need() -> None:
    """Once the logs are known to match and nothing is left to send, nothing is sent. (TRAPS 38.)"""
    progress = replicating()
    assert not progress.may_send(last=9, window=8)
    assert progress.may_send(last=10, window=8)


def test_window_limits_what_is_unanswered() -> None:
    """As many messages as the window takes, and one more for each that is answered; with a window of 1, one. (TRAPS
    38.)"""
    for window in (1, 3):
        progress = replicating()
        for n in range(window):
            assert progress.may_send(last=50, window=window)
            progress.sent(10 + n, 0.0)
        assert not progress.may_send(last=50, window=window)
        progress.acknowledged(10)
        assert progress.may_send(last=50, window=window)


def test_one_acknowledgement_stands_for_all_before_it() -> None:
    """Acknowledgements of earlier messages were lost: a later one answers for them as well. (Thesis 3.5.)"""
    progress = replicating()
    for last in (10, 12, 15):
        progress.sent(last, 0.0)
    progress.acknowledged(12)
    assert [last for last, _ in progress.unanswered] == [15]
    assert (progress.match, progress.next) == (12, 16)


def test_match_only_rises() -> None:
    """Acknowledgements come late and twice. (TRAPS 8; PySyncObj #167.)"""
    progress = replicating(20)
    progress.acknowledged(15)
    assert (progress.match, progress.next) == (20, 21)
    progress.acknowledged(20)
    assert progress.match == 20


def test_refusal_goes_back_but_not_below_match() -> None:
    """The hint of a refusal is a hint: what is known to match stays so. (TRAPS 8, 12.)"""
    progress = probing(100)
    progress.sent(99, 0.0)
    progress.refused(40)
    assert (progress.next, progress.probing) == (41, True)
    assert progress.may_send(last=120, window=1)
    progress = replicating(60)
    progress.refused(40)
    assert progress.next == 61


def test_stale_refusals_are_known_by_the_position_they_answer() -> None:
    """While probing, only the refusal of the newest probe counts, and it counts once; while replicating, none of what
    is known to match does. (TRAPS 12, 36.)"""
    progress = probing(100)
    assert progress.is_stale(99), "nothing was asked"
    progress.sent(99, 0.0)
    assert progress.is_stale(98)
    assert not progress.is_stale(99)
    progress.refused(40)
    assert progress.is_stale(99), "answered"
    progress.sent(60, 0.0)
    assert progress.is_stale(99)
    assert not progress.is_stale(40)
    progress = replicating(60)
    assert progress.is_stale(60)
    assert not progress.is_stale(61)


def test_lost_messages_are_sent_again_from_match() -> None:
    """The link was cut: whatever was under way is forgotten, and a probe finds out where the member stands. (TRAPS
    36.)"""
    progress = replicating(9)
    progress.sent(20, 0.0)
    progress.sent(30, 0.0)
    progress.lost()
    assert (progress.match, progress.next, progress.probing) == (9, 10, True)
    assert not progress.unanswered
    assert progress.may_send(last=9, window=1), "even with nothing new"


def test_lost_probe_is_repeated_where_it_was() -> None:
    """While probing, `match` says nothing yet: to begin behind it would be to send the whole log. However often the
    probe is lost or held back, it stays at its place, and goes on from the place of a hint. (TRAPS 12, 38.)"""
    progress = probing(100)
    for again in (progress.lost, progress.hold_back, progress.lost):
        again()
        assert progress.next == 100, "nothing was under way"
        progress.sent(120, 0.0)
        again()
        assert (progress.next, progress.probing) == (100, True)
        progress.release()
    progress.sent(120, 0.0)
    progress.refused(40)
    progress.sent(70, 0.0)
    progress.lost()
    assert progress.next == 41


def test_member_that_takes_nothing_is_left_alone_until_it_is_released() -> None:
    """Its disk is full: asking again at once would keep both busy. A heartbeat later it is asked again, and its first
    acknowledgement ends it all. (store docstring.)"""
    progress = replicating(9)
    progress.sent(10, 0.0)
    progress.hold_back()
    assert not progress.may_send(last=50, window=8)
    progress.release()
    assert progress.may_send(last=50, window=8)
    progress.hold_back()
    progress.acknowledged(10)
    assert progress.may_send(last=50, window=8)


def test_what_is_sent_follows_on() -> None:
    """A message never ends before the place where it begins. (Thesis 3.5.)"""
    progress = probing(10)
    with pytest.raises(AssertionError, match="next is 10"):
        progress.sent(8, 0.0)
