"""Open a capture: compression by magic number, the format by its first bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from sevlab.core.errors import TraceFormatError

PEEK_BYTES = 1 << 14

MAX_LINE_BYTES = 1 << 18
"""Longest line of a text; also how much of it is read at once."""


class Source(NamedTuple):
    """A capture that was opened: `stream` gives its content unpacked, `head` is how it starts."""

    path: Path
    stream: IO[bytes]
    head: bytes
    file: IO[bytes]

    def text(self) -> Iterator[str]:
        """The lines of a text, without their ends; bytes that are not ASCII stay apart from each other.

        A line longer than `MAX_LINE_BYTES` comes in pieces, so that memory stays flat whatever the file is.
        """
        rest = b""
        while data := self.stream.read(MAX_LINE_BYTES):
            whole, end, rest_of = (rest + data).rpartition(b"\n")
            if end:
                yield from whole.decode("utf-8", "surrogateescape").split("\n")
            rest = rest_of
            if len(rest) >= MAX_LINE_BYTES:
                yield rest.decode("utf-8", "surrogateescape")
                rest = b""
        if rest:
            yield rest.decode("utf-8", "surrogateescape")

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        self.file.close()

    def sha256(self) -> str:
        """Digest of the file as it is on disk."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import zstandard

    return io.BufferedReader(
        cast("io.RawIOBase", zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    )


PACKED: tuple[tuple[bytes, Callable[[IO[bytes]], IO[bytes]]], ...] = (
    (b"\xfd7zXZ\0", lambda file: cast("IO[bytes]", lzma.LZMAFile(file))),  # noqa: SIM115  # the source keeps it
    (b"\x1f\x8b", lambda file: cast("IO[bytes]", gzip.GzipFile(fileobj=file))),
    (b"\x28\xb5\x2f\xfd", _zstd),
)
"""Magic number and reader of each compression. Source: .xz 1.1.0 2.1.1.1, RFC 1952 2.3.1, RFC 8878 3.1.1."""


def open_source(path: Path) -> Source:
    """Open `path`, unpacking it. Raises `TraceFormatError` for a file that cannot be read."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise TraceFormatError(f"{path}: {error.strerror or error}") from error
    magic = file.peek(6)
    for start, unpack in PACKED:
        if magic.startswith(start):
            stream: IO[bytes] = io.BufferedReader(cast("io.RawIOBase", unpack(file)), buffer_size=1 << 16)
            break
    else:
        stream = file
    try:
        head = cast("io.BufferedReader", stream).peek(PEEK_BYTES)[:PEEK_BYTES]
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        stream.close()
        file.close()
        raise TraceFormatError(f"{path}: cannot be unpacked: {error}") from error
    return Source(path, stream, head, file)
