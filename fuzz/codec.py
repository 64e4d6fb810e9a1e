"""Inputs: every byte string is a list of at most 64 steps of a target's kinds, and every such list is a byte string.

A step is a byte for its kind, then its fields in order. Numbers say their length first, so that small ones are short;
bytes that are mostly zero are written as the runs that are not. Past the end everything reads zero, so that no byte
string is refused, and `decode(encode(steps)) == steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sevlab.core.errors import CampaignError
from sevlab.core.steps import SETTABLE_REGISTERS, SETTABLE_SYSTEM_REGISTERS
from sevlab.core.vocabulary import FieldSpec, Record, Vocabulary, spec_of

MAX_STEPS = 64
"""Longest sequence that one input decodes to."""

MAX_BYTES = 0xFF * 0xFF
"""Longest field of bytes: what 255 runs of 255 bytes hold, so that whatever is decoded can be encoded."""

DENSE_LIMIT = 0xF8
"""A field of bytes begins with its length below this, else its runs follow."""

GAP_LIMIT = 16
"""So many zeros end a run."""

REMEMBERED_INPUTS, REMEMBERED_STEPS, REMEMBERED_BYTES = 4096, 4096, 1 << 26
"""How much is kept of what was decoded and encoded lately."""

NUMBER, TEXT, BYTES, TUPLE, FLAG = range(5)
MAX_DEPTH = 4
MAX_ITEMS = 32

LITERAL = 0xFF
WORDS = ("", "wbinvd", "invd", "clflush", "sev", "tee", *SETTABLE_REGISTERS, *SETTABLE_SYSTEM_REGISTERS)
"""Strings of the kernel's steps; a target may add more."""


class Reader:
    """Takes values off the front of a byte string; past the end everything is zero."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> bool:
        """Whether any byte is left."""
        return self._position < len(self._data)

    def byte(self) -> int:
        """The next byte."""
        position = self._position
        self._position = position + 1
        return self._data[position] if position < len(self._data) else 0

    def take(self, length: int) -> bytes:
        """The next `length` bytes, zero-filled past the end."""
        piece = self._data[self._position : self._position + length]
        self._position += length
        return piece.ljust(length, b"\0")

    def number(self) -> int:
        """A number: one byte says how many bytes follow (0 to 8)."""
        return int.from_bytes(self.take(self.byte() % 9), "little")

    def sparse(self) -> bytes:
        """A field of bytes."""
        first = self.byte()
        if first < DENSE_LIMIT:
            return self.take(first)
        out = bytearray(self.number() % (MAX_BYTES + 1))
        position = 0
        for _ in range(self.byte()):
            position += self.number()
            run = self.take(self.byte())
            room = len(out) - position
            if room <= 0:
                break
            out[position : position + len(run)] = run[:room]
            position += len(run)
        return bytes(out)


class Codec:
    """Bytes to steps and back, for the step kinds of one target.

    Raises `CampaignError` for an unknown kind.
    """

    def __init__(self, vocabulary: Vocabulary, kinds: Iterable[str], words: Sequence[str] = ()) -> None:
        self.kinds: list[type] = []
        for kind in kinds:
            record = vocabulary.kinds.get(kind)
            if record is None or not spec_of(record).is_step:
                raise CampaignError(
                    f"there is no step of kind {kind!r}; there are {', '.join(sorted(vocabulary.kinds))}"
                )
            self.kinds.append(record)
        self._numbers = {record: number for number, record in enumerate(self.kinds)}
        self._takers = [tuple(self._taker(field) for field in spec_of(record).fields) for record in self.kinds]
        self.words = tuple(dict.fromkeys((*WORDS, *words)))[:LITERAL]
        self._word_numbers = {word: number for number, word in enumerate(self.words)}
        self._decoded: dict[bytes, tuple[Record, ...]] = {}
        self._decoded_bytes = 0
        self._encoded: dict[tuple[type, Record], bytes] = {}

    # Decoding ---------------------------------------------------------------------------------------------------

    def decode(self, data: bytes) -> tuple[Record, ...]:
        """The steps of any byte string."""
        steps = self._decoded.get(data)
        if steps is None:
            steps = self._decode(data)
            self._remember(data, steps)
        return steps

    def _decode(self, data: bytes) -> tuple[Record, ...]:
        reader = Reader(data)
        steps: list[Record] = []
        kinds, takers = self.kinds, self._takers
        while reader.left and len(steps) < MAX_STEPS:
            number = reader.byte() % len(kinds)
            steps.append(kinds[number](*[take(reader) for take in takers[number]]))
        return tuple(steps)

    def _remember(self, data: bytes, steps: tuple[Record, ...]) -> None:
        """Keep what `data` decodes to: a fuzzer comes back to its corpus, and runs what it has just written."""
        self._decoded_bytes += sum(len(value) for step in steps for value in step if isinstance(value, bytes))
        if self._decoded_bytes > REMEMBERED_BYTES or len(self._decoded) >= REMEMBERED_INPUTS:
            self._decoded.clear()
            self._decoded_bytes = 0
        self._decoded[data] = steps

    def _taker(self, field: FieldSpec) -> Callable[[Reader], Any]:
        """What takes the value of a field off a reader."""
        if field.type is bytes:
            return Reader.sparse
        if field.type is bool:
            return lambda reader: bool(reader.byte() & 1)
        if field.type is str:
            return self._text
        if field.type is tuple:
            return lambda reader: self._tuple(reader, 0)
        return Reader.number

    def _text(self, reader: Reader) -> str:
        number = reader.byte()
        if number == LITERAL:
            text = reader.take(reader.byte()).decode("utf-8", "replace")
            return text.encode()[:0xFF].decode("utf-8", "ignore")  # a replacement is longer than what it replaces
        return self.words[number % len(self.words)]

    def _tuple(self, reader: Reader, depth: int) -> tuple[Any, ...]:
        return tuple(self._item(reader, depth + 1) for _ in range(reader.byte() % (MAX_ITEMS + 1)) if reader.left)

    def _item(self, reader: Reader, depth: int) -> Any:
        kind = reader.byte() % 5
        if kind == TEXT:
            return self._text(reader)
        if kind == BYTES:
            return reader.sparse()
        if kind == FLAG:
            return bool(reader.byte() & 1)
        if kind == TUPLE and depth < MAX_DEPTH:
            return self._tuple(reader, depth)
        return reader.number()

    # Encoding ---------------------------------------------------------------------------------------------------

    def accepts(self, step: Record) -> bool:
        """Whether the target's kinds hold this step, and its values can be written."""
        try:
            return self._decode(self._encode(step)) == (step,)
        except CampaignError:
            return False

    def encode(self, steps: Sequence[Record]) -> bytes:
        """The bytes of `steps`. Raises `CampaignError` for what no bytes decode to."""
        if len(steps) > MAX_STEPS:
            raise CampaignError(f"{len(steps)} steps: an input has at most {MAX_STEPS}")
        encoded = self._encoded
        pieces = []
        for step in steps:
            key = (type(step), step)  # records of two classes may be equal
            piece = encoded.get(key)
            if piece is None:
                if len(encoded) >= REMEMBERED_STEPS:
                    encoded.clear()
                piece = encoded[key] = self._encode(step)
            pieces.append(piece)
        data = b"".join(pieces)
        self._remember(data, tuple(steps))
        return data

    def _encode(self, step: Record) -> bytes:
        number = self._numbers.get(type(step))
        if number is None:
            raise CampaignError(f"a step of kind {spec_of(step).kind!r} is none of this target's")
        out = bytearray((number,))
        for field, value in zip(spec_of(step).fields, step, strict=True):
            self._put_field(out, field, value)
        return bytes(out)

    def _put_field(self, out: bytearray, field: FieldSpec, value: Any) -> None:
        if field.type is bytes:
            put_bytes(out, value)
        elif field.type is bool:
            out.append(int(value))
        elif field.type is str:
            self._put_text(out, value)
        elif field.type is tuple:
            self._put_tuple(out, value, 0)
        else:
            put_number(out, value)

    def _put_text(self, out: bytearray, value: str) -> None:
        number = self._word_numbers.get(value)
        if number is not None:
            out.append(number)
            return
        raw = value.encode()
        if len(raw) > 0xFF:
            raise CampaignError(f"a text of {len(raw)} bytes: expected at most 255")
        out += bytes((LITERAL, len(raw))) + raw

    def _put_tuple(self, out: bytearray, value: tuple[Any, ...], depth: int) -> None:
        if len(value) > MAX_ITEMS or depth >= MAX_DEPTH:
            raise CampaignError(f"a list of {len(value)} items at depth {depth}: expected {MAX_ITEMS}, {MAX_DEPTH - 1}")
        out.append(len(value))
        for item in value:
            if isinstance(item, bool):
                out += bytes((FLAG, item))
            elif isinstance(item, int):
                out.append(NUMBER)
                put_number(out, item)
            elif isinstance(item, str):
                out.append(TEXT)
                self._put_text(out, item)
            elif isinstance(item, bytes):
                out.append(BYTES)
                put_bytes(out, item)
            else:
                out.append(TUPLE)
                self._put_tuple(out, item, depth + 1)


def put_number(out: bytearray, value: int) -> None:
    """Append a number. Raises `CampaignError` beyond 64 bits."""
    if not 0 <= value < 1 << 64:
        raise CampaignError(f"{value} does not fit in 64 bits")
    raw = value.to_bytes(8, "little").rstrip(b"\0")
    out.append(len(raw))
    out += raw


def put_bytes(out: bytearray, value: bytes) -> None:
    """Append a field of bytes in the shorter form. Raises `CampaignError` for more than `MAX_BYTES`."""
    if len(value) > MAX_BYTES:
        raise CampaignError(f"a field of {len(value)} bytes: expected at most {MAX_BYTES}")
    if len(value) < DENSE_LIMIT and (len(value) < GAP_LIMIT or value.count(0) * 2 < len(value)):
        out.append(len(value))
        out += value
        return
    runs = _runs(value)
    if len(runs) > 0xFF:  # nothing sparse about it: runs of full length
        runs = [(start, value[start : start + 0xFF]) for start in range(0, len(value), 0xFF)]
    out.append(DENSE_LIMIT)
    put_number(out, len(value))
    out.append(len(runs))
    position = 0
    for start, run in runs:
        put_number(out, start - position)
        out.append(len(run))
        out += run
        position = start + len(run)


def _runs(value: bytes) -> list[tuple[int, bytes]]:
    """(offset, bytes) of what is not zero; short gaps belong to a run, of at most 255 bytes."""
    runs: list[tuple[int, bytes]] = []
    position, gap = 0, bytes(GAP_LIMIT)
    while position < len(value):
        if not value[position]:
            rest = value[position:].lstrip(b"\0")
            position = len(value) - len(rest)
            continue
        end = value.find(gap, position)
        end = min(len(value) if end < 0 else end, position + 0xFF)
        runs.append((position, value[position:end]))
        position = end
    return runs
