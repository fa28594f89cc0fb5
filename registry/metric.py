"""What a measure of pictures must offer: a spec that loads nothing, and one call after loading.

Measures come through the entry-point group `hdb.metrics`, by the door that base models use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from registry.errors import HdbError

if TYPE_CHECKING:
    import numpy as np

REFERENCES = ("person", "text")


class Metric(Protocol):
    """A loaded measure."""

    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        """Score every picture (H, W, 3) uint8 against every reference, higher is closer.

        References are photos of people or texts, as the spec says; a row for each picture.
        """


@runtime_checkable
class Recogniser(Metric, Protocol):
    """A measure against photos that also says where a face lies among faces: hdb then looks people
    up by it, beside comparing them."""

    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Embed the largest face of every picture (H, W, 3) uint8, aligned by its own landmarks.

        Return (N, D) float32, a row of NaN for a picture without a face.
        """

    def likeness(self, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """Compare embeddings (N, D) row by row, higher is closer: (N,); 0 for a row of NaN."""


@dataclass(frozen=True)
class MetricSpec:
    """One measure; `load` may raise HdbError where its weights cannot be had.

    `fetch`, if there is one, downloads what `load` needs to a cache; it is called only where the
    user asks for it.
    """

    name: str
    summary: str
    against: str  # "person": photos of people; "text": prompts
    families: tuple[str, ...]  # of base models it can judge; empty for any
    load: Callable[[], Metric]
    fetch: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        """Raise HdbError for a spec that could not work."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise HdbError(f"metric name {self.name!r} is not a word")
        if self.against not in REFERENCES:
            raise HdbError(
                f"metric {self.name}: against is {self.against!r}; choose {' or '.join(REFERENCES)}"
            )
        if not callable(self.load):
            raise HdbError(f"metric {self.name}: load must be callable")
        if self.fetch is not None and not callable(self.fetch):
            raise HdbError(f"metric {self.name}: fetch must be callable, or None")

    def judges(self, family: str) -> bool:
        return not self.families or family in self.families
