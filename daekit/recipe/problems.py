"""Everything that is wrong with a recipe, gathered to be told at once, each with its line and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

from daekit.errors import UserError
from daekit.recipe.tree import Node, Path, Place


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``; did you mean 'X'?`` for the candidate that looks most like ``name``, or nothing when none does."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Names for a message: ``a, b and c``, or ``none``."""
    names = list(names)
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def dotted(path: Path) -> str:
    """A key path as users write it in an override: ``stages.kd.teacher.ensemble.0.weight``."""
    return ".".join(str(part) for part in path)


@dataclass
class Problems:
    """Collects what is wrong with one recipe.

    Attributes:
        name: of the recipe, the first words of the message.
        root: the tree in which places are looked up; None before it is read.
    """

    name: str
    root: Node | None = None
    found: list[tuple[Place, str]] = field(default_factory=list)
    _unread: set[Path] = field(default_factory=set)

    def add(self, path: Path, message: str, place: Place | None = None) -> None:
        """Note a problem at ``path``; its place is that of the nearest key that exists unless given."""
        if place is None:
            place = self.root.locate(path).place if self.root else Place()
        self.found.append((place, f"{dotted(path)}: {message}" if path else message))

    def add_unread(self, path: Path, message: str, place: Place | None = None) -> None:
        """Like ``add``, for a value that cannot be read: what is found later at the same keys would only follow from it."""
        self._unread.add(path)
        self.add(path, message, place)

    def unread(self, path: Path) -> bool:
        """Whether the value at ``path`` is already known not to be readable."""
        return path in self._unread

    def add_check(self, path: Path, message: str) -> None:
        """Like ``add``, unless something at, above or below ``path`` could not be read."""
        if not any(path[: len(other)] == other[: len(path)] for other in self._unread):
            self.add(path, message)

    def given(self, path: Path) -> bool:
        """Whether the recipe itself writes a value (other than null) at ``path``."""
        node = self.root.find(path) if self.root else None
        return node is not None and node.value is not None

    def raise_if_any(self) -> None:
        """Raises: UserError: one message with every problem, in the order of the file, overrides last."""
        if not self.found:
            return
        ordered = sorted(self.found, key=lambda problem: (problem[0].override is not None, problem[0].line or 0))
        lines = [f"  {place}{message}" for place, message in ordered]
        count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        raise UserError("\n".join([f"{self.name}: {count}", *lines]))
