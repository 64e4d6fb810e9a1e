"""Entries to bytes and back: a block is a sequence of msgpack values, checked against the declarations.

A record is an array `[kind, field, ...]`, where kind is the number of its declaration in the header, or the number of
an equal record in the same block: records count from 0 as their arrays come. A step begins an entry, and two numbers
follow it: nanoseconds since the entry before it in the block (for the first: since 0), and the vCPU. The records up to
the next step are its outcome.
"""

from __future__ import annotations

from collections import Counter, namedtuple
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

MAX_REPEATED_BYTES = 128
"""Longest packed record that may stand again as a number: bounds what a small file can stand for. Its bytes, texts and
tuples then hold no more bytes, characters and elements than that, and this is what a reader looks at."""

END = b"\xc0"
"""A nil behind the block: it is the last value unless the last record swallowed it."""

NOTHING: Any = None
"""Stands for a number that the block does not hold any more."""

Check = Callable[[Sequence[Any]], bool]


class Kind(NamedTuple):
    """A record kind as the codec uses it.

    `check` says whether values fit the declaration; `is_short`: nothing in it has a length of its own.
    """

    number: int
    is_step: bool
    cls: type
    check: Check
    is_short: bool
    spec: RecordSpec


class Codec:
    """What packs and unpacks entries of the declarations `kinds`.

    Classes come from `vocabulary`; a kind that it lacks or declares otherwise gets a class made of the declaration,
    and a line in `foreign` that says why: such records can be shown but mean nothing to a machine.
    """

    def __init__(self, kinds: Sequence[RecordSpec], vocabulary: Vocabulary) -> None:
        self.foreign: dict[str, str] = {}
        self.kinds: list[Kind] = []
        for number, spec in enumerate(kinds):
            types = tuple(_wire_type(field) for field in spec.fields)
            cls = self._class_of(spec, vocabulary)
            is_short = not {bytes, str, tuple} & set(types)
            self.kinds.append(Kind(number, spec.is_step, cls, _make_check(types), is_short, spec))
        self.vocabulary = Vocabulary({kind.spec.kind: kind.cls for kind in self.kinds})
        self._by_number = dict(enumerate(self.kinds))
        self.by_class = {kind.cls: kind for kind in self.kinds}

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

    def unpack(self, block: bytes) -> list[Entry]:
        """All entries of a block. Raises `TraceFormatError` that names the record that is wrong."""
        entries: list[Entry] = []
        outcome: list[Record] = []
        step: Record | None = None
        time_ns, vcpu, arrays = 0, 0, 0
        kinds, new = self._by_number, tuple.__new__
        known: dict[int, tuple[Record, bool]] = {}
        unpacker = _unpacker(block + END)
        item: Any = ()
        try:
            for records, item in enumerate(unpacker):
                if records >= MAX_BLOCK_RECORDS and item is not None:
                    raise TraceFormatError(f"more than {MAX_BLOCK_RECORDS} records")
                if item.__class__ is int:
                    record, is_step = known[item]
                elif item is None:
                    break
                else:
                    _, is_step, cls, check, is_short, spec = kinds[item[0]]
                    values = item[1:]
                    if not check(values):
                        raise TraceFormatError(f"{spec.kind} holds {values!r:.200}, expected {_words(spec)}")
                    record = new(cls, values)
                    if is_short or _items(values) <= MAX_REPEATED_BYTES:
                        known[arrays] = record, is_step
                    arrays += 1
                if not is_step:
                    if step is None:
                        raise TraceFormatError("an outcome before any step")
                    outcome.append(record)
                    continue
                if step is not None:
                    entries.append(Entry(time_ns, vcpu, step, tuple(outcome)))
                    outcome = []
                step = record
                time_ns = (time_ns + next(unpacker, NOTHING)) & MASK64  # a TypeError unless it is a number
                vcpu = next(unpacker, NOTHING)
                if vcpu.__class__ is not int or vcpu < -1:
                    raise TraceFormatError(f"vCPU {vcpu!r:.20}")
            if item is not None or unpacker.tell() != len(block) + len(END):
                raise TraceFormatError("the block ends inside a record")
        except TraceFormatError as error:
            raise TraceFormatError(f"entry {len(entries)} of the block: {error}") from error
        except (ValueError, TypeError, LookupError, RecursionError, msgpack.UnpackException) as error:
            what = f"{type(error).__name__} {error!s:.80}"
            raise TraceFormatError(f"entry {len(entries)} of the block: {item!r:.80}: {what}") from error
        if step is not None:
            entries.append(Entry(time_ns, vcpu, step, tuple(outcome)))
        return entries


class BlockPacker:
    """Packs the entries of one block. After an entry that was refused the block takes no further one.

    Most records are objects that the block has met before - an importer reads a line that repeats only once - and are
    known by their identity, which lasts as long as they are kept here.
    """

    def __init__(self, codec: Codec) -> None:
        self._by_class = codec.by_class
        self._pack = msgpack.Packer(autoreset=True).pack
        self._kept: list[Record] = []
        self._steps: dict[int, bytes] = {}
        self._outcomes: dict[int, bytes] = {}
        """What stands for a record that was met before, by its `id`."""
        self._numbers: dict[bytes, bytes] = {}
        """The same by the record's packed form."""
        self._written: list[bytes] = []
        self._kind_numbers: dict[bytes, int] = {}
        self._time = self._arrays = 0

    def __len__(self) -> int:
        """How many records the block holds."""
        return len(self._written)

    def pack(self, entry: Entry) -> bytes:
        """The bytes of `entry`, the next one. Raises `TraceFormatError` for what the declarations do not allow."""
        time_ns, vcpu, step, outcome = entry
        if not 0 <= time_ns <= MASK64 or not -1 <= vcpu <= MASK64:
            raise TraceFormatError(f"time {time_ns}, vCPU {vcpu}: expected a time from 0 to 2^64-1 and a vCPU from -1")
        if len(outcome) >= MAX_BLOCK_RECORDS:
            raise TraceFormatError(f"{len(outcome)} outcome records: expected fewer than {MAX_BLOCK_RECORDS}")
        begin = self._steps.get(id(step)) or self._new(step, self._steps, is_step=True)
        parts: list[Any] = list(map(self._outcomes.get, map(id, outcome)))
        if None in parts:
            for place, part in enumerate(parts):
                if part is None:
                    parts[place] = self._new(outcome[place], self._outcomes, is_step=False)
        self._written.append(begin)
        self._written += parts
        since, self._time = self._time, time_ns
        return b"".join((begin, self._pack(_delta(time_ns, since)), self._pack(vcpu), *parts))

    def _new(self, record: Record, known: dict[int, bytes], *, is_step: bool) -> bytes:
        """What stands for a record that is not among the `known` objects: its array, or the number of an equal one."""
        kind = self._by_class.get(type(record))
        if kind is None or kind.is_step != is_step:
            raise TraceFormatError(
                f"{record!r:.80} is not {'a step' if is_step else 'an outcome record'} of this trace's vocabulary;"
                " is its plugin in the header?"
            )
        values = _values(kind, record)
        try:
            packed: bytes = self._pack((kind.number, *values))
        except (OverflowError, ValueError) as error:
            raise TraceFormatError(f"{record!r:.200}: {error}") from error
        number = self._numbers.get(packed)
        written = packed
        if number is None:
            number = self._pack(self._arrays)
            self._arrays += 1
            self._kind_numbers[packed] = self._kind_numbers[number] = kind.number
        else:
            written = number
        if len(packed) <= MAX_REPEATED_BYTES:
            known[id(record)] = self._numbers[packed] = number
            self._kept.append(record)
        return written

    def kinds(self, records: int) -> Counter[int]:
        """How many of the first `records` are of each kind, by the kind's number."""
        found: Counter[int] = Counter()
        for part, count in Counter(self._written[:records]).items():
            found[self._kind_numbers[part]] += count
        return found


def _items(values: Record) -> int:
    """How many bytes, characters and elements the bytes, texts and tuples among `values` hold."""
    items = 0
    for value in values:
        kind = value.__class__
        if kind is tuple:
            items += len(value) + _items(value)
        elif kind is bytes or kind is str:
            items += len(value)
    return items


def _unpacker(data: bytes) -> Any:
    unpacker = msgpack.Unpacker(
        use_list=False, max_buffer_size=len(data), max_array_len=MAX_ARRAY_ITEMS, max_map_len=0, max_ext_len=0
    )
    unpacker.feed(data)
    return unpacker


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
