"""Reads vectors out of messages that carry names, whatever their order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class NamesError(ValueError):
    """A message lacks a name, or its values do not match its names."""


class JointReader:
    """Picks `names` out of (names, values) pairs; the permutation is computed once per layout.

    Args:
        exact: refuse messages that carry other names too (commands), rather than ignore them.
    """

    def __init__(self, names: Sequence[str], *, exact: bool = False) -> None:
        self.names = tuple(names)
        self._exact = exact
        self._layout: list[str] | None = None
        self._index: NDArray[np.intp] | slice = slice(None)

    def read(self, names: Any, values: Any) -> Vector:
        """(len(self.names),) in our order, from the name and value lists of a message.

        Raises:
            NamesError: what is missing, unknown or of the wrong length.
        """
        if self._layout is None or len(names) != len(self._layout) or list(names) != self._layout:
            self._learn(list(names))
        assert self._layout is not None
        if len(values) != len(self._layout):
            raise NamesError(f"{len(values)} values for {len(self._layout)} names")
        return np.asarray(values, dtype=np.float64)[self._index]

    def _learn(self, layout: list[str]) -> None:
        self._layout = None
        where = {name: i for i, name in enumerate(layout)}
        missing = [name for name in self.names if name not in where]
        if missing:
            raise NamesError(
                f"missing {', '.join(missing)}; found {', '.join(layout) or 'no names'}"
            )
        if len(where) != len(layout):
            raise NamesError(f"a name appears twice in {', '.join(layout)}")
        unknown = [name for name in layout if name not in self.names]
        if self._exact and unknown:
            raise NamesError(f"unknown {', '.join(unknown)}; expected {', '.join(self.names)}")
        self._index = np.array([where[name] for name in self.names], dtype=np.intp)
        self._layout = layout
