"""Which phases and faults there are, and which of them are combined: every such pair is a cell of the table."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    PRESIGN = "presign"
    PUT = "PUT half-way"
    COMPLETE = "complete (hashing)"
    CREATE = "POST deployment"
    VERIFYING = "verifying, unpacking"
    STARTING = "instance starting"
    GATE = "health gate"
    CANARY = "canary step"
    PROMOTE = "promotion"
    DRAIN = "drain"
    STOP = "stop of the old release"
    SCALE = "scale"
    ROLLBACK = "rollback"
    CONFIG = "config change"
    DELETE = "delete"


class Fault(StrEnum):
    SERVER_KILL = "server: kill -9"
    SERVER_TERM = "server: SIGTERM"
    OLD_KEEPER = "old keeper: kill -9"
    OLD_SANDBOX = "old sandbox: kill -9"
    OLD_APP = "old app: kill -9"
    OLD_EGRESS = "old slirp4netns: kill -9"
    OLD_DIALER = "old dialer: kill -9"
    NEW_KEEPER = "new keeper: kill -9"
    NEW_SANDBOX = "new sandbox: kill -9"
    NEW_APP = "new app: kill -9"
    NEW_EGRESS = "new slirp4netns: kill -9"
    NEW_DIALER = "new dialer: kill -9"
    CLI_KILL = "CLI: kill -9"
    CLI_INTERRUPT = "CLI: Ctrl-C"
    CLI_INTERRUPT_TWICE = "CLI: Ctrl-C twice"
    VANISH = "client: vanishes"
    RIVAL_OTHER = "second deploy: other artifact"
    RIVAL_SAME = "second deploy: same artifact"
    RIVAL_SAME_KEY = "second deploy: same Idempotency-Key"


SERVER = frozenset({Fault.SERVER_KILL, Fault.SERVER_TERM})
OLD = frozenset({Fault.OLD_KEEPER, Fault.OLD_SANDBOX, Fault.OLD_APP, Fault.OLD_EGRESS, Fault.OLD_DIALER})
NEW = frozenset({Fault.NEW_KEEPER, Fault.NEW_SANDBOX, Fault.NEW_APP, Fault.NEW_EGRESS, Fault.NEW_DIALER})
HELPERS = frozenset({Fault.OLD_EGRESS, Fault.OLD_DIALER, Fault.NEW_EGRESS, Fault.NEW_DIALER})
"""What an instance survives: its app goes on."""
CLI = frozenset({Fault.CLI_KILL, Fault.CLI_INTERRUPT, Fault.CLI_INTERRUPT_TWICE})
RIVALS = frozenset({Fault.RIVAL_OTHER, Fault.RIVAL_SAME, Fault.RIVAL_SAME_KEY})

WITH_NEW = frozenset(
    {Phase.STARTING, Phase.GATE, Phase.CANARY, Phase.PROMOTE, Phase.DRAIN, Phase.STOP, Phase.SCALE, Phase.ROLLBACK,
     Phase.CONFIG}
)  # fmt: skip
"""Phases in which an instance beside the old one exists or is about to."""
UPLOADS = frozenset({Phase.PRESIGN, Phase.PUT, Phase.COMPLETE})
ROLLOUTS = frozenset(
    {Phase.VERIFYING, Phase.STARTING, Phase.GATE, Phase.CANARY, Phase.PROMOTE, Phase.DRAIN, Phase.STOP}
)
DEPLOYS = UPLOADS | ROLLOUTS | {Phase.CREATE}


def fits(phase: Phase, fault: Fault) -> bool:
    """Whether the pair means anything: there must be something to hit."""
    if fault in NEW:
        return phase in WITH_NEW
    if fault is Fault.RIVAL_SAME_KEY:
        return phase in DEPLOYS
    return True


CELLS = [(phase, fault) for phase in Phase for fault in Fault if fits(phase, fault)]
