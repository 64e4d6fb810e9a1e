"""Changes of typed steps, made from declarations: layouts with their rules, messages, and resources in use.

Nothing here knows a feature. A record's numbers come from the pools of resources, from the numbers at which something
changes, or from chance; its bytes are built and broken by their layout, one rule at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sevlab.core.events import Race
from sevlab.core.layout import FieldInfo, Kind, Layout
from sevlab.core.layout_fields import valid_place
from sevlab.core.layout_tools import breaking, read_field
from sevlab.core.payload import Message, Payload, payload_bytes
from sevlab.core.units import MASK64, PAGE_BYTES
from sevlab.core.vocabulary import FieldSpec, Record, spec_of
from sevlab.fuzz.codec import MAX_STEPS, Codec
from sevlab.fuzz.messages import Carried, Messages
from sevlab.fuzz.pools import Pools, is_resource

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

T = TypeVar("T")
Steps = tuple[Record, ...]

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 0x20, 0xFF, 0x7F0, 0xFFF, 0x1000, 0xFFFF, 0x7FFF_FFFF, 1 << 31, 1 << 32,
           1 << 47, 1 << 51, (1 << 63) - 1, 1 << 63, MASK64 - 0xFFF, MASK64)  # fmt: skip
"""Numbers at which something changes in many fields."""

LENGTHS = (0, 1, 2, 4, 8, 15, 16, 32, 64, 256)
MAX_RACE_FETCH = 4
INPUTS = 0.75
"""How often a field that is changed is one that its message is known to look at."""

CHANGES = 3
"""Most changes that one call makes."""

EXAMPLES = 0.5
"""How often a new message is one of its declared examples."""

NAMED = 0.4
"""How often its new value is one that an example of the message has there."""

HEAD, HEAD_BYTES = 0.5, 32
"""How often bytes without a declaration change near their beginning, where structures have their headers."""

RESOURCE, POOLED = 0.75, 0.45
"""How often a number is one that was seen before: where it names something that must exist, and elsewhere."""

NOTHING = 0.15
"""How often a field that names something names nothing."""

SELDOM, OFTEN, MOSTLY = 0.25, 0.6, 0.9
"""How often a field keeps its declared value: one that has better ones, in a plain message, in an example."""


class Choices(NamedTuple):
    """The fields of a layout: all, the numbers, and those with a rule that can be broken."""

    fields: tuple[FieldInfo, ...]
    numbers: tuple[FieldInfo, ...]
    numbers_and_bits: tuple[FieldInfo, ...]
    ruled: tuple[FieldInfo, ...]

    @classmethod
    def of(cls, layout: type[Layout]) -> Choices:
        """What there is in `layout`."""
        fields = tuple(layout.FIELDS.values())
        numbers = tuple(info for info in fields if info.kind is Kind.UINT)
        ruled = tuple(
            info for info in fields if info.valid_bit or info.reserved or info.values is not None or info.aligned > 1
        )
        bits = tuple(info for info in fields if info.kind in {Kind.UINT, Kind.BITS})
        return cls(fields, numbers, bits, ruled)


class Mutator:
    """Changes sequences for one target; `machine` is booted, and only looked at."""

    def __init__(self, machine: Machine, codec: Codec, messages: Messages, pools: Pools, rng: Random) -> None:
        self._machine = machine
        self._codec = codec
        self._messages = messages
        self._rng = rng
        self.pools = pools
        self._fields: dict[type[Layout], Choices] = {}
        self._kinds = [kind for kind in codec.kinds if kind is not Race]
        self._choices = {kind: messages.choices(spec_of(kind).kind) for kind in codec.kinds}
        carriers = [kind for kind in self._kinds if self._choices[kind]]
        self._weighted = self._kinds + carriers * (2 * len(self._kinds) // max(1, len(carriers)))
        self._changes: list[Callable[[list[Record]], None]] = [
            self._insert,
            self._insert,
            self._drop,
            self._duplicate,
            self._swap,
            self._field,
            self._field,
            self._message_field,
            self._message_field,
            self._message_field,
            self._break_rule,
            self._retarget,
        ]
        if Race in codec.kinds:
            self._changes.append(self._race)

    def _below(self, limit: int) -> int:
        """A number from 0 up to `limit`, which is not reached: five times as fast as `Random.randrange`."""
        return int(self._rng.random() * limit)

    def _pick(self, items: Sequence[T]) -> T:
        return items[int(self._rng.random() * len(items))]

    def reseed(self, seed: int) -> None:
        """Make what follows depend on `seed` alone."""
        self._rng.seed(seed)

    # Sequences --------------------------------------------------------------------------------------------------

    def fresh(self) -> Steps:
        """A new sequence of a few steps."""
        return tuple(self.step() for _ in range(1 + self._below(6)))

    def mutate(self, steps: Sequence[Record]) -> Steps:
        """`steps` with one to three changes; from nothing, a new sequence."""
        if not steps:
            return self.fresh()
        changed = list(steps)
        for _ in range(1 + self._below(CHANGES)):
            if changed:
                self._pick(self._changes)(changed)
        return tuple(changed[:MAX_STEPS])

    def extend(self, steps: Sequence[Record]) -> Steps:
        """`steps`, and a few new ones in the state that they lead to."""
        return (*steps[: MAX_STEPS - 4], *(self.step() for _ in range(1 + self._below(4))))

    def crossover(self, first: Sequence[Record], second: Sequence[Record]) -> Steps:
        """The beginning of one sequence and the end of another, or a piece of one inside the other."""
        if not first or not second:
            return tuple(first or second)
        rng = self._rng
        cut, start = self._below(len(first) + 1), self._below(len(second))
        end = start + 1 + self._below(len(second) - start)
        tail = first[cut:] if rng.random() < 0.5 else ()
        return (*first[:cut], *second[start:end], *tail)[:MAX_STEPS]

    def _insert(self, steps: list[Record]) -> None:
        if len(steps) < MAX_STEPS:
            steps.insert(self._below(len(steps) + 1), self.step())

    def _drop(self, steps: list[Record]) -> None:
        if len(steps) > 1:
            del steps[self._below(len(steps))]

    def _duplicate(self, steps: list[Record]) -> None:
        if len(steps) < MAX_STEPS:
            steps.insert(self._below(len(steps) + 1), self._pick(steps))

    def _swap(self, steps: list[Record]) -> None:
        if len(steps) > 1:
            one, other = self._rng.sample(range(len(steps)), 2)
            steps[one], steps[other] = steps[other], steps[one]

    def _race(self, steps: list[Record]) -> None:
        """Another party writes what a step's message says, while the step is served."""
        places = [index for index, step in enumerate(steps) if self._place(step) is not None]
        if not places or len(steps) >= MAX_STEPS:
            return
        index = self._pick(places)
        step = steps[index]
        spa, carried = self._place(step), self._messages.of(step)
        if spa is None or carried is None or carried.layout is None:
            return
        info = self._pick(self._choices_of(carried.layout).numbers)
        width = info.length_bytes
        data = (self.number(info.name, info) & info.maximum).to_bytes(width, "little")
        steps.insert(index, Race(1 + self._below(MAX_RACE_FETCH), spa + info.offset & MASK64, data))

    def _place(self, step: Record) -> int | None:
        carried = self._messages.of(step)
        if carried is None or carried.payload.place_of is None:
            return None
        return carried.payload.place_of(self._machine, step)

    # One step ---------------------------------------------------------------------------------------------------

    def step(self) -> Record:
        """A new step: half of the kinds' weight is on those that carry messages."""
        kind = self._pick(self._weighted)
        values = [self._value(field) for field in spec_of(kind).fields]
        make: Callable[..., Record] = kind
        record = make(*values)
        choices = self._choices[kind]
        return self._carry(record, *self._pick(choices)) if choices else record

    def _carry(self, record: Record, payload: Payload, message: Message) -> Record:
        """`record` with `message` in it."""
        record = _set(record, **message.record)
        if message.layout is None:
            return _put(record, payload, b"") if isinstance(getattr(record, payload.field), bytes) else record
        rng = self._rng
        fields: dict[str, Any] = {}
        for name in message.needs:
            info = message.layout.FIELDS[name]
            if info.kind in {Kind.UINT, Kind.BITS} and rng.random() < 0.85:
                fields[name] = self._legal_of(info, message.units.get(name))
        example = self._pick(message.examples) if message.examples and rng.random() < EXAMPLES else {}
        for name, value in {**message.fields, **example}.items():
            often = MOSTLY if name in example else SELDOM if name in message.units else OFTEN
            if name not in fields or rng.random() < often:
                fields[name] = value
        fields = {name: value for name, value in fields.items() if value is not None}
        fields |= {name: message.fields[name] for name in _selecting(message)}
        return _put(record, payload, message.layout.build(**fields))

    def _field(self, steps: list[Record]) -> None:
        index = self._below(len(steps))
        fields = spec_of(steps[index]).fields
        if fields:
            field = self._pick(fields)
            old = getattr(steps[index], field.name)
            steps[index] = _set(steps[index], **{field.name: self._value(field, old)})

    def _retarget(self, steps: list[Record]) -> None:
        """Every number of a step that names a resource may name another one."""
        index = self._below(len(steps))
        step = steps[index]
        for field in spec_of(step).fields:
            if issubclass(field.type, int) and field.type is not bool and self._rng.random() < 0.5:
                value = self.pools.draw(self._rng, field.name)
                if value is not None:
                    step = _set(step, **{field.name: value})
        steps[index] = step
        carried = self._messages.of(step)
        if carried is None or carried.layout is None:
            return
        data = self._bytes_of(carried, step)
        for info in self._choices_of(carried.layout).numbers:
            if self._rng.random() < 0.5:
                value = self.pools.draw(self._rng, info.name, info.unit)
                if value is not None and value <= info.maximum:
                    data = carried.layout.patch(data, **{info.name: value})
        steps[index] = _put(step, carried.payload, data)

    # One field of a message -------------------------------------------------------------------------------------

    def _choices_of(self, layout: type[Layout]) -> Choices:
        choices = self._fields.get(layout)
        if choices is None:
            choices = self._fields[layout] = Choices.of(layout)
        return choices

    def _carrier(self, steps: list[Record]) -> tuple[int, Carried, type[Layout]] | None:
        """Some step whose message has a layout; each of them as likely as the others."""
        untried = list(range(len(steps)))
        while untried:
            index = untried.pop(self._below(len(untried)))
            carried = self._messages.of(steps[index])
            if carried is not None and carried.layout is not None:
                return index, carried, carried.layout
        return None

    @staticmethod
    def _bytes_of(carried: Carried, step: Record) -> bytes:
        """The message's bytes, cut or filled to its layout."""
        assert carried.layout is not None
        size = carried.layout.SIZE
        return payload_bytes(carried.payload, step)[:size].ljust(size, b"\0")

    def _message_field(self, steps: list[Record]) -> None:
        found = self._carrier(steps)
        if found is None:
            self._field(steps)
            return
        index, carried, layout = found
        data = self._bytes_of(carried, steps[index])
        message = carried.payload.message(steps[index])
        known = carried.inputs if carried.inputs and self._rng.random() < INPUTS else self._choices_of(layout).fields
        info = self._pick(known)
        old = read_field(info, data)
        if info.kind is Kind.BYTES:
            data = layout.patch(data, **{info.name: self._leaf(old)})
        elif info.kind is Kind.ARRAY:
            position = self._below(info.elements)
            items = (*old[:position], self.number(info.name, info) & info.maximum, *old[position + 1 :])
            data = layout.patch(data, **{info.name: items})
        else:
            value = self._named(message, info.name)
            if value is None:
                unit = carried.units.get(info.name)
                near = self._rng.random() < (0.2 if unit is not None else 0.5)
                value = self.number(info.name, info, old) if near else self._legal_of(info, unit)
            data = layout.patch(data, **{info.name: value & info.maximum})
        steps[index] = _put(steps[index], carried.payload, data)

    def _named(self, message: Message | None, name: str) -> int | None:
        """One of the values that the examples of a message give a field."""
        if message is None or not message.examples or self._rng.random() >= NAMED:
            return None
        values = [example[name] for example in message.examples if example.get(name) is not None]
        return self._pick(values) if values else None

    def _break_rule(self, steps: list[Record]) -> None:
        """Break one rule of one field, or take away a valid bit."""
        found = self._carrier(steps)
        if found is None:
            return
        index, carried, layout = found
        data = self._bytes_of(carried, steps[index])
        ruled = self._choices_of(layout).ruled
        if not ruled:
            return
        info = self._pick(ruled)
        ways: list[bytes] = []
        if info.valid_bit and layout.VALID_BITMAP is not None:
            offset, mask = valid_place(layout.VALID_BITMAP, info)
            cleared = bytearray(data)
            cleared[offset] ^= mask
            ways.append(bytes(cleared))
        ways += [layout.patch(data, **{info.name: value}) for _, value in breaking(info, read_field(info, data))]
        if ways:
            steps[index] = _put(steps[index], carried.payload, self._pick(ways))

    # Values -----------------------------------------------------------------------------------------------------

    def number(self, name: str, info: FieldInfo | None = None, old: int | None = None) -> int:
        """A number for field `name`: a resource, near the old value, where something changes, or any."""
        rng = self._rng
        unit = info.unit if info is not None else ""
        named = is_resource(name, unit)
        if named and rng.random() < NOTHING:
            return 0
        if rng.random() < (RESOURCE if named else POOLED):
            value = self.pools.draw(rng, name, unit)
            if value is not None:
                return value
        way = 0.45 + 0.55 * rng.random()
        if old is not None and way < 0.7:
            return (old + self._pick((-1, 1, 8, -8, PAGE_BYTES, -PAGE_BYTES))) & MASK64 if way < 0.55 else (
                old ^ 1 << self._below(info.width_bytes * 8 if info is not None else 64)
            )  # fmt: skip
        if way < 0.9:
            return self._pick(NUMBERS)
        return rng.getrandbits(self._pick((8, 12, 16, 32, 64)))

    def _legal_of(self, info: FieldInfo, unit: str | type[Layout] | None) -> int:
        """A number that keeps the rules of a field and is what a message says that it is."""
        if isinstance(unit, str):
            value = self.pools.draw(self._rng, unit)
            return self.legal(info) if value is None else value & info.maximum
        if unit is None:
            return self.legal(info)
        numbers = {part.name: self.legal(part) for part in self._choices_of(unit).numbers_and_bits}
        return int.from_bytes(unit.build(**numbers), "little") & info.maximum

    def legal(self, info: FieldInfo) -> int:
        """A number that keeps the rules of a field."""
        values = info.values
        if isinstance(values, (tuple, frozenset)) and values:
            return cast("int", self._pick(sorted(values)))
        if isinstance(values, range) and values:
            return self._pick(values)
        value = self.number(info.name, info) & info.maximum
        return value & ~info.reserved & -info.aligned

    def _value(self, field: FieldSpec, old: Any = None) -> Any:
        rng = self._rng
        if field.type is bool:
            return rng.random() < 0.5
        if field.type is bytes:
            return self._leaf(old or b"")
        if field.type is str:
            return self._pick(self._codec.words)
        if field.type is tuple:
            return self._pairs(old or ())
        if field.name in {"vcpu", "vm", "party", "space", "domid"}:
            return self._pick((0, 0, 0, 1, 1, 2, 3))
        return self.number(field.name, None, old) & MASK64

    def _pairs(self, old: tuple[Any, ...]) -> tuple[Any, ...]:
        """A list of names with numbers, which is what lists in steps are; other items of an old one stay."""
        kept = list(old)
        if kept and self._rng.random() < 0.5:
            del kept[self._below(len(kept))]
        if kept and not isinstance(kept[0], tuple):
            return (*kept, self.number("item") & MASK64)
        name = self._pick(self._codec.words)
        return (*kept, (name, self.number(name) & MASK64))[:8]

    def _leaf(self, old: bytes) -> bytes:
        """Bytes without a declaration: other ones of the same length, or some bits and bytes changed."""
        rng = self._rng
        if not old:
            return rng.randbytes(self._pick(LENGTHS))
        if rng.random() < 0.1:
            return rng.randbytes(len(old))
        data = bytearray(old)
        for _ in range(1 + self._below(4)):
            position = self._below(min(len(data), HEAD_BYTES) if rng.random() < HEAD else len(data))
            width = self._pick((1, 1, 2, 4, 8))
            value = self._pick(NUMBERS) if rng.random() < 0.5 else rng.getrandbits(64)
            piece = (value & (1 << width * 8) - 1).to_bytes(width, "little")
            data[position : position + width] = piece[: len(data) - position]
        return bytes(data)


def _selecting(message: Message) -> tuple[str, ...]:
    """The fields that make the bytes be this message: the first that the declaration names."""
    return tuple(message.fields)[:1]


def _set(record: Record, **values: Any) -> Record:
    return cast("Record", record._replace(**values))  # type: ignore[attr-defined]  # every record is a NamedTuple


def _put(record: Record, payload: Payload, data: bytes) -> Record:
    """`record` with `data` as the bytes of its payload."""
    if isinstance(getattr(record, payload.field), bytes):
        return _set(record, **{payload.field: data})
    return _set(record, **{payload.field: int.from_bytes(data, "little")})
