"""Open a capture: compression by magic number, the format by its first bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import zstandard
from sevlab.core.errors import TraceFormatError

PEEK_BYTES = 1 << 14

MAX_DICTIONARY_BYTES = 1 << 28
"""What a decompressor may take: a file says how much it wants, xz -9 wants 65 MiB, zstd --ultra -22 128 MiB."""

PIECE_BYTES = 1 << 10
"""How much of a packed file is unpacked at once: no compression makes more than some megabytes of it."""

MAX_LINE_BYTES = 1 << 18
"""Longest line of a text; also how much of it is read at once."""


UNPACK_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
"""What reading a packed file raises where it is damaged."""


class Source(NamedTuple):
    """A capture that was opened: `stream` gives its content unpacked, `head` is how it starts."""

    path: Path
    stream: IO[bytes]
    head: bytes
    file: IO[bytes]

    def text(self) -> Iterator[str]:
        """The lines of a text."""
        return lines_of(self.stream)

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        self.file.close()

    def sha256(self) -> str:
        """Digest of the file as it is on disk."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def lines_of(stream: IO[bytes]) -> Iterator[str]:
    r"""The lines of a text, without their ends; bytes that are no text are shown as `\xff`.

    A line longer than `MAX_LINE_BYTES` comes in pieces, so that memory stays flat whatever the file is.
    """
    rest = b""
    while data := stream.read(MAX_LINE_BYTES):
        whole, end, behind = (rest + data).rpartition(b"\n")
        if end:
            yield from whole.decode("utf-8", "backslashreplace").split("\n")
        rest = behind
        if len(rest) >= MAX_LINE_BYTES:
            yield rest.decode("utf-8", "backslashreplace")
            rest = b""
    if rest:
        yield rest.decode("utf-8", "backslashreplace")


class _Unpacked(io.RawIOBase):
    """The content of a packed file of one or several frames; `make` gives the decompressor of one.

    The libraries' own readers allocate whatever dictionary an .xz file asks for, and end quietly where a .zst file was
    cut off.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], Any]) -> None:
        self._file = file
        self._make = make
        self._decompressor = make()
        self._data = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase.readinto`. Raises `EOFError` where the file ends inside a frame."""
        while not self._data:
            packed = self._decompressor.unused_data.lstrip(b"\0") if self._decompressor.eof else b""
            packed = packed or self._file.read(PIECE_BYTES)
            if self._decompressor.eof:
                packed = packed.lstrip(b"\0")  # padding between frames
                if not packed:
                    return 0
                self._decompressor = self._make()
            elif not packed:
                raise EOFError("the compressed file ends too early")
            self._data = self._decompressor.decompress(packed)
        count = min(len(buffer), len(self._data))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count


def _xz(file: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Unpacked(file, lambda: lzma.LZMADecompressor(memlimit=MAX_DICTIONARY_BYTES)))


def _zstd(file: IO[bytes]) -> IO[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_DICTIONARY_BYTES)
    return io.BufferedReader(_Unpacked(file, decompressor.decompressobj))


PACKED: tuple[tuple[bytes, Callable[[IO[bytes]], IO[bytes]]], ...] = (
    (b"\xfd7zXZ\0", _xz),
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
    return open_stream(path, file)


def open_stream(path: Path, raw: IO[bytes]) -> Source:
    """A source of what is in `raw`, which is called `path`. Raises `TraceFormatError` where it cannot be unpacked."""
    file = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast("io.RawIOBase", raw))
    magic = file.peek(6)
    for start, unpack in PACKED:
        if magic.startswith(start):
            stream: IO[bytes] = io.BufferedReader(cast("io.RawIOBase", unpack(file)), buffer_size=1 << 16)
            break
    else:
        stream = file
    try:
        head = cast("io.BufferedReader", stream).peek(PEEK_BYTES)[:PEEK_BYTES]
    except UNPACK_ERRORS as error:
        stream.close()
        file.close()
        raise TraceFormatError(f"{path}: cannot be unpacked: {error}") from error
    return Source(path, stream, head, file)
