"""What the fronts tell whoever counts: starts, first tokens, gaps, ends.

A seam: ``splitserve.metrics.RouterMetrics`` has its shape, ``NullObserver`` is the one that counts nothing.
"""

from __future__ import annotations

from typing import Protocol


class RequestObserver(Protocol):
    """Told about each answer; times in seconds, ``model`` is a name that workers serve."""

    def request_started(self, model: str) -> None: ...

    def request_ended(self, model: str) -> None:
        """Once for each ``request_started``, however it ended."""
        ...

    def observe_first_token(self, model: str, seconds: float) -> None:
        """``seconds`` since the client's request arrived."""
        ...

    def observe_inter_token(self, model: str, seconds: float, tokens: int = 1) -> None:
        """``tokens`` arrived together, ``seconds`` after the one before."""
        ...

    def observe_success(
        self, model: str, finish_reason: str, seconds: float, prompt_tokens: int, generation_tokens: int
    ) -> None:
        """An answer is complete, ``seconds`` after its request arrived."""
        ...

    def observe_failure(self, model: str, error: str) -> None:
        """An answer ended with an error of this class of ``splitserve.errors``."""
        ...


class NullObserver:
    """Counts nothing."""

    def request_started(self, model: str) -> None:
        pass

    def request_ended(self, model: str) -> None:
        pass

    def observe_first_token(self, model: str, seconds: float) -> None:
        pass

    def observe_inter_token(self, model: str, seconds: float, tokens: int = 1) -> None:
        pass

    def observe_success(
        self, model: str, finish_reason: str, seconds: float, prompt_tokens: int, generation_tokens: int
    ) -> None:
        pass

    def observe_failure(self, model: str, error: str) -> None:
        pass
