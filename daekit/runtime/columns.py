"""Several texts that grow at the same time, in a terminal: side by side where it is wide enough, else one below the other."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence
from typing import TextIO

_NARROWEST = 36  # characters of a column
_GAP = " | "
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


class Columns:
    """Texts side by side. Lines that no text will change any more are printed for good, those below are drawn anew."""

    def __init__(self, out: TextIO, names: Sequence[str], size: tuple[int, int]) -> None:
        """``size``: columns and lines of the terminal."""
        self._out, self._height = out, size[1]
        self._width = (size[0] - len(_GAP) * (len(names) - 1) - 1) // len(names)
        self._texts, self._done = [""] * len(names), [False] * len(names)
        self._printed = self._live = 0
        out.write(_BOLD + self._row([name[: self._width] for name in names]) + _PLAIN + "\n")

    def add(self, column: int, piece: str) -> None:
        """A text has grown."""
        self._texts[column] += piece
        self._draw()

    def end(self, column: int) -> None:
        """A text is whole."""
        self._done[column] = True
        self._draw()

    def _draw(self) -> None:
        columns = [wrapped(text, self._width) for text in self._texts]
        longest = max(map(len, columns))
        # of a text that still grows only the last line changes
        growing = [len(lines) - 1 for lines, done in zip(columns, self._done, strict=True) if not done]
        final = max(min(growing, default=longest), self._printed)
        shown = longest if all(self._done) else min(longest, final + max(self._height - 2, 1))
        rows = [self._row([lines[at] if at < len(lines) else "" for lines in columns]) for at in range(self._printed, shown)]
        back = f"\x1b[{self._live}A" if self._live else ""
        self._out.write(f"{back}\r\x1b[J" + "".join(f"{row}\n" for row in rows))
        self._out.flush()
        self._live = shown - final
        self._printed = final

    def _row(self, cells: Sequence[str]) -> str:
        return _GAP.join(cell + " " * (self._width - width_of(cell)) for cell in cells).rstrip()


class Stack:
    """Texts one below the other: the first is printed while it grows, the others when the ones above are whole."""

    def __init__(self, out: TextIO, names: Sequence[str], size: tuple[int, int] | None = None) -> None:
        self._out, self._names = out, names
        self._texts, self._done, self._at = [""] * len(names), [False] * len(names), -1
        self._next()

    def add(self, column: int, piece: str) -> None:
        """A text has grown."""
        self._texts[column] += piece
        if column == self._at:
            self._print(piece)

    def end(self, column: int) -> None:
        """A text is whole."""
        self._done[column] = True
        while self._at < len(self._names) and self._done[self._at]:
            self._print("\n")
            self._next()

    def _next(self) -> None:
        self._at += 1
        if self._at < len(self._names):
            marks = (_BOLD, _PLAIN) if self._out.isatty() else ("", "")
            self._print(f"{marks[0]}{self._names[self._at]}:{marks[1]} {self._texts[self._at]}")

    def _print(self, text: str) -> None:
        self._out.write(printable(text))
        self._out.flush()


def display(out: TextIO, names: Sequence[str]) -> Columns | Stack:
    """Columns where ``out`` is a terminal that is wide enough for several texts."""
    size = shutil.get_terminal_size()
    wide = len(names) > 1 and (size.columns - 1) // len(names) - len(_GAP) >= _NARROWEST
    return (Columns if out.isatty() and wide else Stack)(out, names, (size.columns, size.lines))


def printable(text: str) -> str:
    """What a model or a row says must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "    " if c == "\t" else ascii(c)[1:-1] for c in text)


def width_of(text: str) -> int:
    """Cells of a terminal that a printable text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text; a longer text begins with the same lines but for the last."""
    lines: list[str] = []
    for paragraph in printable(text).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            candidate = f"{line} {word}" if line else word
            if width_of(candidate) <= width:
                line = candidate
                continue
            if line:
                lines.append(line)
            line = ""
            for character in word:  # of a word that is longer than a line
                if width_of(line + character) > width:
                    lines.append(line)
                    line = ""
                line += character
        lines.append(line)
    return lines
