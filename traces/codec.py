"""Entries to bytes and back: msgpack arrays, one a record, checked against the declarations.

A record is `[kind, field, ...]`, where kind is the number of its declaration in the header. A step begins an entry and
has two more elements, `[kind, time, vcpu, field, ...]`: nanoseconds since the entry before it in the block (for the
first: since 0), and the vCPU. The records up to the next step are its outcome.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import msgpack
from sevlab.core.errors import TraceFormatError
from sevlab.core.units import MASK64
from sevlab.core.vocabulary import FieldSpec, Record, RecordSpec, Vocabulary, spec_of
from sevlab.traces.schema import Entry

MAX_ARRAY_ITEMS = 4096
"""Longest array: with it and msgpack's limit of 1024 levels, no block makes a reader allocate more than 32 MB."""

MAX_BLOCK_RECORDS = 1 << 18
"""Most records in a block, for the same reason: the shortest take two bytes, but each becomes an object."""

MAX_DEPTH = 8
"""Deepest nesting of a tuple field."""

CACHED_RECORDS = 1 << 12
CACHED_BYTES = 256
"""Packed outcome records that the writer keeps for each kind, and how long one may be: at most a megabyte a kind."""

END = b"\xc0"
"""A nil behind the block: it is the last value unless the last record swallowed it."""

Check = Callable[[Sequence[Any]], bool]


class Kind(NamedTuple):
    """A record kind as the codec uses it.

    `check` says whether values fit the declaration; `packed` are the bytes of records written before.
    """

    number: int
    is_step: bool
    cls: type
    check: Check
    spec: RecordSpec
    packed: dict[Record, bytes]


class Codec:
    """Packs and unpacks entries of the declarations `kinds`.

    Classes come from `vocabulary`; a kind that it lacks or declares otherwise gets a class made of the declaration,
    and a line in `foreign` that says why: such records can be shown but mean nothing to a machine.
    """

    def __init__(self, kinds: Sequence[RecordSpec], vocabulary: Vocabulary) -> None:
        self.foreign: dict[str, str] = {}
        self.kinds: list[Kind] = []
        for number, spec in enumerate(kinds):
            types = tuple(_wire_type(field) for field in spec.fields)
            cls = self._class_of(spec, vocabulary)
            self.kinds.append(Kind(number, spec.is_step, cls, _make_check(types), spec, {}))
        self.vocabulary = Vocabulary({kind.spec.kind: kind.cls for kind in self.kinds})
        self._by_number = dict(enumerate(self.kinds))
        self._by_class = {kind.cls: kind for kind in self.kinds}
        self._pack = msgpack.Packer(autoreset=True).pack

    def _class_of(self, spec: RecordSpec, vocabulary: Vocabulary) -> type:
        known = vocabulary.kinds.get(spec.kind)
        if known is not None:
            if _comparable(spec_of(known)) == _comparable(spec):
                return known
            self.foreign[spec.kind] = f"declared otherwise here: {_words(spec_of(known))}; in the file: {_words(spec)}"
        else:
            self.foreign[spec.kind] = "not declared here; is a plugin missing?"
        made = namedtuple("Foreign", [field.name for field in spec.fields], rename=True)  # type: ignore[misc]  # noqa: PYI024  # its fields are known at run time
        made.SPEC = spec  # type: ignore[attr-defined]
        return made

    def pack(self, entry: Entry, since: int) -> tuple[bytes, list[int]]:
        """The bytes of `entry`, `since` being the time of the one before it, and the numbers of its kinds.

        Raises `TraceFormatError` for what the declarations do not allow.
        """
        time_ns, vcpu, step, outcome = entry
        if not 0 <= time_ns <= MASK64 or not -1 <= vcpu <= MASK64:
            raise TraceFormatError(f"time {time_ns}, vCPU {vcpu}: expected a time from 0 to 2^64-1 and a vCPU from -1")
        if len(outcome) >= MAX_BLOCK_RECORDS:
            raise TraceFormatError(f"{len(outcome)} outcome records: expected fewer than {MAX_BLOCK_RECORDS}")
        kind = self._by_class.get(type(step))
        if kind is None or not kind.is_step:
            raise TraceFormatError(
                f"{step!r:.80} is not a step of this trace's vocabulary; is its plugin in the header?"
            )
        numbers = [kind.number]
        packed = [self._packed((kind.number, _delta(time_ns, since), vcpu, *_values(kind, step)), step)]
        for record in outcome:
            number, data = self._outcome(record)
            numbers.append(number)
            packed.append(data)
        return b"".join(packed), numbers

    def _outcome(self, record: Record) -> tuple[int, bytes]:
        """Number and bytes of an outcome record; most are as one shortly before."""
        kind = self._by_class.get(type(record))
        if kind is None or kind.is_step:
            raise TraceFormatError(
                f"{record!r:.80} is not an outcome record of this trace's vocabulary; is its plugin in the header?"
            )
        try:
            data = kind.packed.get(record)
        except TypeError:  # it holds something that no record may hold
            data = None
        if data is None:
            values = _values(kind, record)
            data = self._packed((kind.number, *values), record)
            if len(kind.packed) >= CACHED_RECORDS:
                kind.packed.clear()
            if len(data) <= CACHED_BYTES:
                kind.packed[values] = data
        return kind.number, data

    def _packed(self, array: tuple[Any, ...], record: Record) -> bytes:
        try:
            return self._pack(array)  # type: ignore[no-any-return]
        except (OverflowError, ValueError) as error:
            raise TraceFormatError(f"{record!r:.200}: {error}") from error

    def unpack(self, block: bytes) -> list[Entry]:
        """All entries of a block. Raises `TraceFormatError` that names the record that is wrong."""
        entries: list[Entry] = []
        outcome: list[Record] = []
        step: Record | None = None
        time_ns, vcpu = 0, 0
        kinds, new = self._by_number, tuple.__new__
        known: dict[Any, Record] = {}  # outcome records of the block: most come many times
        unpacker = msgpack.Unpacker(
            use_list=False,
            max_buffer_size=len(block) + len(END),
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=0,
            max_ext_len=0,
        )
        unpacker.feed(block + END)
        array: Any = ()
        try:
            for records, array in enumerate(unpacker):
                if records >= MAX_BLOCK_RECORDS:
                    raise TraceFormatError(f"more than {MAX_BLOCK_RECORDS} records")
                if array is None:
                    break
                record = known.get(array)
                if record is not None:
                    outcome.append(record)
                    continue
                _, is_step, cls, check, spec, _ = kinds[array[0]]
                values = array[3 if is_step else 1 :]
                if not check(values):
                    raise TraceFormatError(f"{spec.kind} holds {values!r:.200}, expected {_words(spec)}")
                record = new(cls, values)
                if not is_step:
                    if step is None:
                        raise TraceFormatError("an outcome before any step")
                    outcome.append(record)
                    known[array] = record
                    continue
                if step is not None:
                    entries.append(Entry(time_ns, vcpu, step, tuple(outcome)))
                    outcome = []
                step = record
                time_ns = (time_ns + array[1]) & MASK64  # a TypeError unless it is a number
                vcpu = array[2]
                if vcpu.__class__ is not int or vcpu < -1:
                    raise TraceFormatError(f"vCPU {vcpu!r:.20}")
            if array is not None or unpacker.tell() != len(block) + len(END):
                raise TraceFormatError("the block ends inside a record")
        except TraceFormatError as error:
            raise TraceFormatError(f"entry {len(entries)} of the block: {error}") from error
        except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException) as error:
            what = f"{type(error).__name__} {error!s:.80}"
            raise TraceFormatError(f"entry {len(entries)} of the block: {array!r:.80}: {what}") from error
        if step is not None:
            entries.append(Entry(time_ns, vcpu, step, tuple(outcome)))
        return entries


def _values(kind: Kind, record: Record) -> Record:
    """The values of `record` in types that travel. Raises `TraceFormatError` unless they fit its declaration."""
    if kind.check(record):
        return record
    plain = tuple(_plain(value) for value in record)  # enumeration members become their numbers
    if not kind.check(plain):
        raise TraceFormatError(f"{kind.spec.kind} holds {plain!r:.200}, expected {_words(kind.spec)}")
    return plain


def _delta(time_ns: int, since: int) -> int:
    """The difference, modulo 2^64, as the signed number of least size."""
    delta = (time_ns - since) & MASK64
    return delta - (1 << 64) if delta >> 63 else delta


def _wire_type(field: FieldSpec) -> type:
    return bool if field.type is bool else int if issubclass(field.type, int) else field.type


def _comparable(spec: RecordSpec) -> tuple[Any, ...]:
    return spec.kind, spec.is_step, tuple((field.name, _wire_type(field), field.role) for field in spec.fields)


def _words(spec: RecordSpec) -> str:
    fields = ", ".join(f"{field.name}: {_wire_type(field).__name__}" for field in spec.fields)
    return f"{spec.kind}({fields})"


@cache
def _make_check(types: tuple[type, ...]) -> Check:
    """One generated expression over a record's values: all types at once, then signs, then what tuples hold.

    msgpack itself refuses numbers past 64 bits; the bitwise or of numbers is negative when one of them is.
    """
    tests = ["tuple(map(type, v)) == types"]
    numbers = [f"v[{index}]" for index, expected in enumerate(types) if expected is int]
    if numbers:
        tests.append(f"({' | '.join(numbers)}) >= 0")
    tests += [f"(not v[{n}] or plain(v[{n}], {MAX_DEPTH}))" for n, expected in enumerate(types) if expected is tuple]
    scope = {"types": types, "plain": _is_plain}
    return cast("Check", eval(f"lambda v: {' and '.join(tests)}", scope))  # noqa: S307  # indices only


def _is_plain(items: tuple[Any, ...], depth: int) -> bool:
    """Whether a tuple holds only what msgpack carries, to `depth` levels."""
    if len(items) > MAX_ARRAY_ITEMS:
        return False
    for item in items:
        kind = item.__class__
        if kind is tuple:
            if not depth or not _is_plain(item, depth - 1):
                return False
        elif kind is int:
            if not -(1 << 63) <= item <= MASK64:
                return False
        elif kind not in {str, bytes, bool}:
            return False
    return True


def _plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """An equal value of a type that travels: numbers of enumerations, tuples of named tuples, to `depth` levels."""
    if isinstance(value, tuple):
        return tuple(_plain(item, depth - 1) for item in value) if depth >= 0 else value
    if isinstance(value, bool) or not isinstance(value, (int, str, bytes)):
        return value
    return int(value) if isinstance(value, int) else str(value) if isinstance(value, str) else bytes(value)
