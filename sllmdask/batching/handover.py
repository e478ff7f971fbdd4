"""One request's move from one instance to another, as two tables: what each half does at each event, and what it is then.

The *source* has the request, and asks. The *destination* answers; each of its answers may be repeated, and carries the
incarnation of its process, so that nobody takes the word of a new process for that of the one before it. A move is known by the
request and an epoch, which grows with every move and every attempt at one. Two rules make the rest:

- The source lets the request go on only after a definite refusal, after an abort that was answered, or on proof that the
  destination's process is gone. While it does not know, nobody runs the request.
- The destination runs the request at most once, and remembers for ever what became of the move: a commit is answered again as
  it was answered first, and what was aborted stays so, whatever comes late.

Time is an event here, and so is the end of the request. Nothing here waits, sends or computes.

Source: live migration in Llumnix (OSDI '24), whose commit is ambiguous when its answer is lost; two-phase commit with a durable
answer, Gray 1978; fencing by epochs, as in any lease protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Source(StrEnum):
    """What the half is that has the request."""

    #: It asked for a reservation. The request runs.
    ASKING = "asking"
    #: It gives away what the request has so far. The request runs.
    COPYING = "copying"
    #: The request is stopped, all of it is given away, and the destination was told to run it.
    COMMITTING = "committing"
    #: Nobody answered that; it asks what became of it.
    DOUBTING = "doubting"
    #: The destination has it not: it is told that it will not come.
    RECALLING = "recalling"
    #: The request runs here on.
    STAYED = "stayed"
    #: The destination runs it, and nothing of it is here.
    MOVED = "moved"
    #: The request has ended meanwhile.
    ENDED = "ended"

    @property
    def final(self) -> bool:
        return self in (Source.STAYED, Source.MOVED, Source.ENDED)

    @property
    def stopped(self) -> bool:
        """Whether the request stands still, and nobody may say anything of it before the move is over."""
        return self in (Source.COMMITTING, Source.DOUBTING, Source.RECALLING)


class Heard(StrEnum):
    """What happens to the source. The first five are answers of the destination."""

    RESERVED = "reserved"
    REFUSED = "refused"
    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"
    #: All but a rest was given away, and the request was stopped between two steps.
    STOPPED = "stopped"
    #: No answer in time, or no connection.
    LOST = "no answer"
    #: An answer of another incarnation, or a closed port: the destination's process has ended.
    GONE = "destination gone"
    #: The request has ended, or its client has left.
    OVER = "request over"
    #: It cannot be given away, for a reason of this side.
    FAILED = "cannot go"


class Do(StrEnum):
    """What the source does when it enters a state, in this order."""

    RESERVE = "send reserve"
    PART = "send append"
    COMMIT = "send commit"
    QUERY = "send query"
    ABORT = "send abort"
    #: Let the request go on here, if it was stopped, and keep nothing for the move.
    KEEP = "go on here"
    #: Free what the request has here.
    LEAVE = "free it here"


@dataclass(frozen=True)
class Turn:
    """What the source is next, and what it does."""

    state: Source
    actions: tuple[Do, ...] = ()


#: How a move begins.
BEGIN = Turn(Source.ASKING, (Do.RESERVE,))

_STAY = Turn(Source.STAYED, (Do.KEEP,))
_CALL_OFF = Turn(Source.STAYED, (Do.ABORT, Do.KEEP))
_ENDED = Turn(Source.ENDED, (Do.ABORT, Do.KEEP))
#: It was stopped, and nobody wants it any more: its front door has it continued elsewhere, or its client has left.
_UNWANTED = Turn(Source.ENDED, (Do.ABORT, Do.LEAVE))
_MOVED = Turn(Source.MOVED, (Do.LEAVE,))
_RECALL = Turn(Source.RECALLING, (Do.ABORT,))

#: Everything that may happen to the source, answers that come late or twice included.
SOURCE: Mapping[tuple[Source, Heard], Turn] = {
    # Nothing that was sent can make the destination run the request, so nothing has to be waited for.
    (Source.ASKING, Heard.RESERVED): Turn(Source.COPYING, (Do.PART,)),
    (Source.ASKING, Heard.REFUSED): _STAY,
    (Source.ASKING, Heard.ABORTED): _STAY,
    (Source.ASKING, Heard.UNKNOWN): _CALL_OFF,
    (Source.ASKING, Heard.LOST): _CALL_OFF,
    (Source.ASKING, Heard.GONE): _STAY,
    (Source.ASKING, Heard.OVER): _ENDED,
    (Source.ASKING, Heard.FAILED): _CALL_OFF,
    (Source.COPYING, Heard.RESERVED): Turn(Source.COPYING, (Do.PART,)),
    (Source.COPYING, Heard.REFUSED): _CALL_OFF,
    (Source.COPYING, Heard.ABORTED): _STAY,
    (Source.COPYING, Heard.UNKNOWN): _CALL_OFF,
    (Source.COPYING, Heard.LOST): _CALL_OFF,
    (Source.COPYING, Heard.GONE): _STAY,
    (Source.COPYING, Heard.OVER): _ENDED,
    (Source.COPYING, Heard.FAILED): _CALL_OFF,
    (Source.COPYING, Heard.STOPPED): Turn(Source.COMMITTING, (Do.COMMIT,)),
    # From here on the destination may run it, whatever was heard.
    (Source.COMMITTING, Heard.COMMITTED): _MOVED,
    (Source.COMMITTING, Heard.ABORTED): _STAY,
    (Source.COMMITTING, Heard.GONE): _STAY,
    (Source.COMMITTING, Heard.LOST): Turn(Source.DOUBTING, (Do.QUERY,)),
    (Source.COMMITTING, Heard.UNKNOWN): _RECALL,
    (Source.COMMITTING, Heard.RESERVED): Turn(Source.COMMITTING),
    (Source.COMMITTING, Heard.REFUSED): Turn(Source.COMMITTING),
    (Source.COMMITTING, Heard.OVER): _UNWANTED,
    (Source.DOUBTING, Heard.OVER): _UNWANTED,
    (Source.RECALLING, Heard.OVER): _UNWANTED,
    (Source.DOUBTING, Heard.COMMITTED): _MOVED,
    (Source.DOUBTING, Heard.ABORTED): _STAY,
    (Source.DOUBTING, Heard.GONE): _STAY,
    (Source.DOUBTING, Heard.LOST): Turn(Source.DOUBTING, (Do.QUERY,)),
    # The commit may still be on its way: it must find that the move was aborted.
    (Source.DOUBTING, Heard.RESERVED): _RECALL,
    (Source.DOUBTING, Heard.UNKNOWN): _RECALL,
    (Source.DOUBTING, Heard.REFUSED): Turn(Source.DOUBTING),
    (Source.RECALLING, Heard.COMMITTED): _MOVED,
    (Source.RECALLING, Heard.ABORTED): _STAY,
    (Source.RECALLING, Heard.GONE): _STAY,
    (Source.RECALLING, Heard.LOST): _RECALL,
    (Source.RECALLING, Heard.UNKNOWN): Turn(Source.RECALLING),
    (Source.RECALLING, Heard.RESERVED): Turn(Source.RECALLING),
    (Source.RECALLING, Heard.REFUSED): Turn(Source.RECALLING),
}


class Target(StrEnum):
    """What the destination is of one move."""

    #: It has not heard of it.
    NOTHING = "nothing"
    #: Blocks are leased to it, and filled.
    RESERVED = "reserved"
    #: It has taken the request over; also long after that one has ended or gone elsewhere.
    COMMITTED = "committed"
    #: It will not take it any more.
    ABORTED = "aborted"


class Asked(StrEnum):
    """What happens to the destination: messages, with what came of doing it where that is not certain, and time."""

    RESERVE = "reserve"
    RESERVE_FAILED = "reserve, refused"
    APPEND = "append"
    APPEND_FAILED = "append, refused"
    EXTEND = "extend"
    EXTEND_FAILED = "extend, refused"
    COMMIT = "commit"
    COMMIT_FAILED = "commit, refused"
    QUERY = "query"
    ABORT = "abort"
    #: Nothing was heard of the move for too long.
    LATE = "deadline"
    #: The same request, with a higher epoch.
    NEWER = "newer move"


#: What a refusal of the engine makes of a message.
FAILED: Mapping[Asked, Asked] = {
    Asked.RESERVE: Asked.RESERVE_FAILED,
    Asked.APPEND: Asked.APPEND_FAILED,
    Asked.EXTEND: Asked.EXTEND_FAILED,
    Asked.COMMIT: Asked.COMMIT_FAILED,
}

#: Messages that the engine is asked about first, by the state in which they mean something.
TRIED: Mapping[Target, tuple[Asked, ...]] = {
    Target.NOTHING: (Asked.RESERVE,),
    Target.RESERVED: (Asked.APPEND, Asked.EXTEND, Asked.COMMIT),
    Target.COMMITTED: (),
    Target.ABORTED: (),
}


@dataclass(frozen=True)
class Reply:
    """What the destination is next, whether it frees what the move had reserved, and what it answers, if it was asked."""

    state: Target
    answer: Heard | None
    frees: bool = False


_REFUSED = Reply(Target.NOTHING, Heard.REFUSED)
_UNKNOWN = Reply(Target.NOTHING, Heard.UNKNOWN)
_RESERVED = Reply(Target.RESERVED, Heard.RESERVED)
_COMMITTED = Reply(Target.COMMITTED, Heard.COMMITTED)
_ABORTED = Reply(Target.ABORTED, Heard.ABORTED)
_FREED = Reply(Target.ABORTED, Heard.ABORTED, frees=True)
_DROPPED = Reply(Target.ABORTED, None, frees=True)

#: Everything that may happen to the destination.
TARGET: Mapping[tuple[Target, Asked], Reply] = {
    (Target.NOTHING, Asked.RESERVE): _RESERVED,
    (Target.NOTHING, Asked.RESERVE_FAILED): _REFUSED,
    (Target.NOTHING, Asked.APPEND): _UNKNOWN,
    (Target.NOTHING, Asked.EXTEND): _UNKNOWN,
    (Target.NOTHING, Asked.COMMIT): _UNKNOWN,
    (Target.NOTHING, Asked.QUERY): _UNKNOWN,
    # What comes late finds a tombstone.
    (Target.NOTHING, Asked.ABORT): _ABORTED,
    (Target.RESERVED, Asked.RESERVE): _RESERVED,
    (Target.RESERVED, Asked.APPEND): _RESERVED,
    (Target.RESERVED, Asked.APPEND_FAILED): _FREED,
    (Target.RESERVED, Asked.EXTEND): _RESERVED,
    (Target.RESERVED, Asked.EXTEND_FAILED): Reply(Target.RESERVED, Heard.REFUSED),
    (Target.RESERVED, Asked.COMMIT): _COMMITTED,
    (Target.RESERVED, Asked.COMMIT_FAILED): _FREED,
    (Target.RESERVED, Asked.QUERY): _RESERVED,
    (Target.RESERVED, Asked.ABORT): _FREED,
    (Target.RESERVED, Asked.LATE): _DROPPED,
    (Target.RESERVED, Asked.NEWER): _DROPPED,
    **{(Target.COMMITTED, asked): _COMMITTED for asked in (Asked.RESERVE, Asked.APPEND, Asked.EXTEND, Asked.COMMIT)},
    **{(Target.COMMITTED, asked): _COMMITTED for asked in (Asked.QUERY, Asked.ABORT)},
    **{(Target.ABORTED, asked): _ABORTED for asked in (Asked.RESERVE, Asked.APPEND, Asked.EXTEND, Asked.COMMIT)},
    **{(Target.ABORTED, asked): _ABORTED for asked in (Asked.QUERY, Asked.ABORT)},
}


def as_markdown() -> str:
    """Both tables, as ``docs/migration.md`` shows them."""
    rows = ["| the source is | it hears | then it is | and does |", "|---|---|---|---|"]
    for (source, heard), turn in SOURCE.items():
        actions = ", ".join(turn.actions) or "-"
        rows.append(f"| {source} | {heard} | {turn.state} | {actions} |")
    rows += ["", "| the destination is | it is asked | then it is | and answers |", "|---|---|---|---|"]
    for (target, asked), reply in TARGET.items():
        answer = " and ".join([*(["frees what was reserved"] if reply.frees else []), *([reply.answer] if reply.answer else [])])
        rows.append(f"| {target} | {asked} | {reply.state} | {answer} |")
    return "\n".join(rows)
