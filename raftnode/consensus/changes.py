"""What a change of the membership may be, and what comes next (rule 8; thesis chapter 4). All pure: a membership in,
the command of the next one out.

Members are added and taken one at a time, so that any majority of one membership shares a voter with any majority of
the next (thesis 4.1). Who is new is a *learner* first, with the whole log and without a vote. The leader makes it a
voter when it has caught up (4.2.1), and if it takes the place of another member, takes that one out in the step after
that. No client has to stay for these further steps, nor the leader: what is meant stands in the membership itself.

A member that answers with another node id has lost its disk, and with that its votes and acknowledgements. That is the
same change as taking the old voter out and adding a learner, whose address happens to be the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from raftnode.consensus.membership import Membership
from raftnode.messages import MembersCommand


class ChangeRefused(Exception):
    """The change is not made; nothing was appended. `code` is one of `messages.CODES`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def added(members: Membership, address: str, node: str, is_silent: bool) -> MembersCommand | None:
    """With the node at `address` as a learner (`node` is "" while its id is not known); None when it is a member.

    `is_silent` tells that the node which is known at this address has not been heard for an election timeout: only then
    another one may come in its place. Raises ChangeRefused.
    """
    known = members.node_of(address)
    if known is None:
        return _command(members, learners={**members.learners, address: node})
    if node in ("", known):
        return None
    if known == "" and address in members.learners:
        return _command(members, learners={**members.learners, address: node})
    if known and not is_silent:
        raise ChangeRefused(
            "wrong_node",
            f"{address} is a member as node {known}, which answers; node {node} can't be a member at the same address: "
            "give the new node an address of its own, or stop the old one",
        )
    return readmitted(members, address, node)


def readmitted(members: Membership, address: str, node: str) -> MembersCommand:
    """With another node at the address of a member, as a learner: it has promised nothing of what the old one has.

    Also for a voter that this leader has not met: others may have, and count on what it promised.
    """
    voters = {voter: id for voter, id in members.voters.items() if voter != address}
    if not voters:
        raise ChangeRefused("last_voter", f"{address} is the only voter: nobody else has what it has promised")
    return _command(members, voters=voters, learners={**members.learners, address: node})


def removed(members: Membership, address: str) -> MembersCommand:
    """Without a member. Raises ChangeRefused for who is none, and for the last voter."""
    if members.node_of(address) is None:
        raise ChangeRefused("no_such_member", f"{address} is no member; there are: {', '.join(members.addresses)}")
    voters = {voter: id for voter, id in members.voters.items() if voter != address}
    learners = {learner: id for learner, id in members.learners.items() if learner != address}
    if not voters:
        raise ChangeRefused(
            "last_voter",
            f"{address} is the only voter, and without it the cluster ends: add another member first, or stop the node",
        )
    return _command(members, voters=voters, learners=learners)


def replaced(members: Membership, old: str, new: str, node: str = "") -> MembersCommand:
    """With `new` in the place of `old`: as a learner that is to replace it, or, if it has a vote already, at once.

    Raises ChangeRefused.
    """
    if members.node_of(old) is None:
        raise ChangeRefused("no_such_member", f"{old} is no member; there are: {', '.join(members.addresses)}")
    if new == old:
        raise ChangeRefused(
            "bad_request",
            f"{old} can't replace itself: to exchange the disk of a member, stop it, empty its data directory and "
            "start it again; it comes back by itself",
        )
    if new in members.voters:
        return removed(members, old)
    if members.replaces.get(new) == old:
        raise ChangeRefused("change_under_way", f"{new} takes the place of {old} already, once it has caught up")
    learners = {**members.learners, new: members.learners.get(new) or node}
    return _command(members, learners=learners, replaces={**members.replaces, new: old})


def promoted(members: Membership, learner: str) -> MembersCommand:
    """With a learner as a voter."""
    learners = {other: id for other, id in members.learners.items() if other != learner}
    return _command(members, voters={**members.voters, learner: members.learners[learner]}, learners=learners)


def next_steps(members: Membership, caught_up: Collection[str]) -> Iterable[MembersCommand]:
    """What the leader does of its own, the first that is possible: take out who has been replaced, and give a vote to a
    learner that has caught up."""
    for new, old in sorted(members.replaces.items()):
        if new in members.voters:
            yield removed(members, old)
    for learner in sorted(members.learners.keys() & set(caught_up)):
        yield promoted(members, learner)


def voters_changed(members: Membership, command: MembersCommand) -> set[str]:
    """The addresses whose vote is given, taken, or another node's: one at most (thesis 4.1)."""
    everyone = members.voters.keys() | command.voters.keys()
    return {
        address
        for address in everyone
        if (address in members.voters) != (address in command.voters)
        or (members.voters[address] not in ("", command.voters[address]))
    }


def _command(
    members: Membership,
    *,
    voters: dict[str, str] | None = None,
    learners: dict[str, str] | None = None,
    replaces: dict[str, str] | None = None,
) -> MembersCommand:
    """The command of a membership that differs from `members` in what is given. Sorted, so that equal memberships have
    equal bytes; an intent goes with either of its two members."""
    new_voters = members.voters if voters is None else voters
    new_learners = members.learners if learners is None else learners
    intents = members.replaces if replaces is None else replaces
    everyone = new_voters.keys() | new_learners.keys()
    return MembersCommand(
        voters=dict(sorted(new_voters.items())),
        learners=dict(sorted(new_learners.items())),
        replaces={new: old for new, old in sorted(intents.items()) if {new, old} <= everyone},
    )


class CatchingUp:
    """How far each learner of one leader has come, in rounds (thesis 4.2.1): it has caught up once it holds what was
    committed at the beginning of a round within the time limit. What is written meanwhile is then so little that the
    cluster would not have to wait for it long if its vote were needed."""

    def __init__(self, limit: float) -> None:
        """`limit`: the longest that a round may take, in seconds."""
        self._limit = limit
        self._rounds: dict[str, tuple[int, float]] = {}

    def clear(self) -> None:
        """Another leader begins anew."""
        self._rounds.clear()

    def caught_up(self, matches: dict[str, int], commit_id: int, now: float) -> set[str]:
        """Who of these learners, given with how far it holds the log, has caught up."""
        found: set[str] = set()
        for learner in self._rounds.keys() - matches.keys():
            del self._rounds[learner]
        for learner, match in sorted(matches.items()):
            target, began = self._rounds.setdefault(learner, (commit_id, now))
            if match < target:
                continue
            if now - began <= self._limit:
                found.add(learner)
            self._rounds[learner] = (commit_id, now)
        return found
