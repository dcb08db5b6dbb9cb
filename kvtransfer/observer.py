"""Where transfers report what they did, so that a service can export it. No metrics library is known here."""

from __future__ import annotations

from typing import Protocol


class TransferObserver(Protocol):
    """Called from the event loop; must return at once and not raise."""

    def pull_started(self, transport: str) -> None: ...

    def bytes_received(self, transport: str, count: int) -> None:
        """``count`` bytes of verified blocks."""
        ...

    def pull_finished(self, transport: str, seconds: float, exposed_seconds: float) -> None:
        """A pull ended well, ``seconds`` after its start, ``exposed_seconds`` of it behind the computation."""
        ...

    def pull_failed(self, transport: str, reason: str) -> None:
        """A pull that started failed or was cancelled (``reason`` "cancelled")."""
        ...

    def lease_expired(self) -> None:
        """Nobody asked for a published transfer in time."""
        ...


class NullObserver:
    """Reports to nobody; also a base class for observers of some of the events."""

    def pull_started(self, transport: str) -> None:
        return None

    def bytes_received(self, transport: str, count: int) -> None:
        return None

    def pull_finished(self, transport: str, seconds: float, exposed_seconds: float) -> None:
        return None

    def pull_failed(self, transport: str, reason: str) -> None:
        return None

    def lease_expired(self) -> None:
        return None
