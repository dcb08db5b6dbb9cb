"""What is known of one request after it ended. Plain data; nothing here measures or judges."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that reached the client together."""

    time: float  # seconds; the clock of ``Record.sent``
    tokens: int  # at least 1


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are in seconds of one monotonic clock."""

    scheduled: float  # when the load wanted it to start
    sent: float
    ended: float
    arrivals: tuple[Arrival, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0  # as the server counts them
    cached_tokens: int = 0  # of the prompt, found in a cache; 0 if the server does not say
    counted: bool = True  # the server said how many tokens each event carries; else one is assumed
    label: str = ""  # which part of a mixed load
    error: str | None = None  # why it failed, in a few words

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0].time - self.sent

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
        return self.arrivals[-1].time - self.sent

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 for an answer of one token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0
