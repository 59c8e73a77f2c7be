"""One operator per cell: whoever holds the lease commands, everybody else watches and may stop."""

from dataclasses import dataclass

from robot_bridge.console.access import Session

LAPSE_S = 10.0
"""A holder that says nothing for so long loses the lease; its deadman was lost long before."""


@dataclass(eq=False)
class Lease:
    session: Session
    since_s: float
    renewed_s: float
    asked_by: str = ""
    """Somebody else would like to have it."""


class LeaseTaken(Exception):
    """Another operator holds the cell; `str` names who."""


class Leases:
    """Of all cells, by cell name. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    def holder(self, cell: str, now_s: float) -> Lease | None:
        lease = self._leases.get(cell)
        if lease is not None and now_s - lease.renewed_s > LAPSE_S:
            del self._leases[cell]
            return None
        return lease

    def acquire(self, cell: str, session: Session, now_s: float) -> Lease:
        """Raises LeaseTaken; the holder then sees who asked."""
        lease = self.holder(cell, now_s)
        if lease is None:
            lease = self._leases[cell] = Lease(session, now_s, now_s)
        elif lease.session is not session:
            lease.asked_by = session.name
            raise LeaseTaken(lease.session.name)
        lease.renewed_s = now_s
        return lease

    def renew(self, session: Session, now_s: float) -> None:
        """All leases of a session that was just heard."""
        for lease in self._leases.values():
            if lease.session is session and now_s - lease.renewed_s <= LAPSE_S:
                lease.renewed_s = now_s

    def release(self, cell: str, session: Session) -> bool:
        lease = self._leases.get(cell)
        if lease is None or lease.session is not session:
            return False
        del self._leases[cell]
        return True

    def holds(self, cell: str, session: Session, now_s: float) -> bool:
        lease = self.holder(cell, now_s)
        return lease is not None and lease.session is session
