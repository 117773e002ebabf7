"""DNA from files, standard input and prompts: FASTA or one sequence a line, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import io
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from futurefill_rs.cli.terminal import CommandError

GZIP = b"\x1f\x8b"


class Record(NamedTuple):
    """A sequence of a file: the first word of its header, or the number of its line; bases in capitals."""

    name: str
    bases: bytes


def is_header(line: bytes) -> bool:
    return line.startswith((b">", b";"))


def bases_of(line: bytes, known: bytes, place: str) -> bytes:
    """The letters of a line in capitals, without blanks; a `CommandError` for one that is not `known`."""
    bases = b"".join(line.split()).upper()
    if bases.translate(None, known):
        column = next(
            i for i, byte in enumerate(line) if not line[i : i + 1].isspace() and _not_in(byte, known)
        )
        got = line[column:].decode("utf-8", "replace")[0]
        raise CommandError(f"{place}, column {column + 1}: expected DNA ({known.decode()}), got {got!r}")
    return bases


def _not_in(byte: int, known: bytes) -> bool:
    return bytes([byte]).upper() not in known


def records(lines: Iterable[bytes], known: bytes, place: str) -> Iterator[Record]:
    """The sequences in some lines: FASTA if the first line that is not blank is a header.

    Raises:
        CommandError: a letter that is not `known`, by line and column; a header without a sequence.
    """
    name: str | None = None
    header = 0
    parts: list[bytes] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if is_header(line) and (name is not None or not header):
            if name is not None:
                yield _record(name, parts, f"{place}: line {header}")
            words = line[1:].split()
            name = words[0].decode("utf-8", "surrogateescape") if words else str(number)
            header, parts = number, []
            continue
        bases = bases_of(line, known, f"{place}: line {number}")
        header = header or number
        if name is None:
            yield Record(str(number), bases)
        else:
            parts.append(bases)
    if name is not None:
        yield _record(name, parts, f"{place}: line {header}")


def _record(name: str, parts: list[bytes], place: str) -> Record:
    if not parts:
        raise CommandError(f"{place}: expected a sequence after this header, got none")
    return Record(name, b"".join(parts))


class SequenceFile:
    """A file of sequences that can be read several times; standard input for `-`."""

    def __init__(self, name: str, command: str) -> None:
        self._name, self._place = name, f"{command}: {name}"
        self._content: bytes | None = None
        try:
            if name == "-":
                if sys.stdin is None:
                    raise CommandError(f"{command}: standard input is closed")
                self._place = f"{command}: standard input"
                self._content = sys.stdin.buffer.read()
            elif not stat.S_ISREG(Path(name).stat().st_mode):
                # A pipe can be read once.
                self._content = Path(name).read_bytes()
        except OSError as error:
            raise CommandError(f"{self._place}: {error.strerror or error}") from None

    def records(self, known: bytes) -> Iterator[Record]:
        """See `records`; unreadable and damaged files are `CommandError`s too."""
        try:
            with io.BytesIO(self._content) if self._content is not None else open(self._name, "rb") as file:
                compressed = file.read(len(GZIP)) == GZIP
                file.seek(0)
                lines: Iterable[bytes] = gzip.GzipFile(fileobj=file) if compressed else file
                yield from records(lines, known, self._place)
        except (OSError, EOFError, zlib.error) as error:
            words = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise CommandError(f"{self._place}: {words}") from None
