"""What a leader knows of one other member, and whether it may send more (thesis 3.5, 10.2.1; etcd's Progress)."""

from __future__ import annotations

from collections import deque


class Progress:
    """Made anew at each election, so nothing of another term is ever counted.

    Invariants: `match` never falls; `match < next`; while probing, at most one message is unanswered.
    """

    def __init__(self, next: int, now: float) -> None:
        self.match = 0
        """This member holds the leader's log up to here, durably."""
        self.next = next
        """The first entry to send."""
        self.probing = True
        """It is not known where the logs part: one message at a time."""
        self.unanswered: deque[tuple[int, float]] = deque()
        """(last commit_id, when sent) of each `data` message under way."""
        self.heard_at = now
        """When it last answered in this term. A new leader grants everyone one election timeout."""
        self.has_answered = False
        """... and that was no grant."""
        self.round = 0
        """The newest read round that it confirmed."""
        self.told = 0
        """The commit_id in the newest heartbeat to it."""
        self.needs_snapshot = False
        """It lacks entries that the leader's log no longer has: it gets none before it has installed a snapshot."""
        self._asked = 0
        self._probe_due = True
        self._held_back = False

    def heard(self, now: float) -> None:
        """The member has answered, whatever it said."""
        self.heard_at = now
        self.has_answered = True

    def may_send(self, last: int, window: int) -> bool:
        """True when there is something to send and room in the window of unanswered messages."""
        if self._held_back or self.needs_snapshot:
            return False
        if self.probing:
            return not self.unanswered and (self._probe_due or self.next <= last)
        return self.next <= last and len(self.unanswered) < window

    def sent(self, last: int, now: float) -> None:
        """A message with the entries up to `last` is on its way (`last` is `next - 1` for an empty one)."""
        assert last >= self.next - 1, f"sent up to {last}, but next is {self.next}"
        self._asked = self.next - 1
        self.next = last + 1
        self.unanswered.append((last, now))
        self._probe_due = False

    def acknowledged(self, match: int) -> None:
        """The member holds everything up to `match`: it says so of that very message (TRAPS 8)."""
        while self.unanswered and self.unanswered[0][0] <= match:
            self.unanswered.popleft()
        self.match = max(self.match, match)
        self.next = max(self.next, self.match + 1)
        self.probing = False
        self._held_back = False

    def is_stale(self, asked: int) -> bool:
        """True for a refusal, of entries that follow position `asked`, that later news has overtaken."""
        if self.probing:
            return not self.unanswered or asked != self._asked
        return asked <= self.match

    def refused(self, found: int) -> None:
        """The logs part; `found` is the newest position that may still match. Goes back, but not below `match`."""
        self._probe_from(max(self.match, found) + 1)

    def ask_for(self, base: int) -> None:
        """The leader's log begins after `base`. When what is next to send is gone, find out whether the member holds
        the base: entries that it acknowledges now may have been under way."""
        if self.next <= base and not self.unanswered and not self.needs_snapshot:
            self._probe_from(base + 1)

    def lacks(self) -> None:
        """The member does not hold the base of the leader's log (thesis 5.3)."""
        self.unanswered.clear()
        self.probing = self.needs_snapshot = True

    def installed(self, match: int) -> None:
        """The member has a snapshot as of `match`, or holds that entry after all: entries after it follow."""
        self.needs_snapshot = False
        self.unanswered.clear()
        self.next = match + 1
        self.acknowledged(match)

    def found(self, commit_id: int) -> None:
        """The member has committed so far: it holds the base again."""
        self.needs_snapshot = False
        self._probe_from(max(self.match, commit_id) + 1)

    def lost(self) -> None:
        """What is under way may never be answered: find out again where the member stands."""
        self._probe_from(self._first_unanswered)

    def hold_back(self) -> None:
        """The member can't take entries now, and asking again at once would not help: wait for the next heartbeat."""
        self._probe_from(self._first_unanswered)
        self._held_back = True

    def release(self) -> None:
        """A heartbeat later: ask again."""
        self._held_back = False

    @property
    def _first_unanswered(self) -> int:
        """Where to begin again. While probing `match` says nothing yet: stay where the probe was."""
        if not self.probing:
            return self.match + 1
        return max(self.match, self._asked) + 1 if self.unanswered else self.next

    def _probe_from(self, next: int) -> None:
        self.unanswered.clear()
        self.probing = True
        self.next = next
        self._probe_due = True
