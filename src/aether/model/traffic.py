"""What the edge has counted of the requests to one release."""

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """`seconds` is the sum over `answers` of the time from asking the release to the head of its answer."""

    answers: int = 0
    errors: int = 0
    """Answers of 500 and above, those included that the edge gave in the release's place."""
    seconds: float = 0.0

    @property
    def error_rate(self) -> float:
        return self.errors / self.answers if self.answers else 0.0

    @property
    def latency(self) -> float:
        """Mean in seconds."""
        return self.seconds / self.answers if self.answers else 0.0

    def since(self, before: "Traffic") -> "Traffic":
        """What was counted after `before` was."""
        return Traffic(self.answers - before.answers, self.errors - before.errors, self.seconds - before.seconds)

    def copy(self) -> "Traffic":
        return Traffic(self.answers, self.errors, self.seconds)
