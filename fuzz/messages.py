"""Which message a record carries, by what the plugins declare; looked up once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from sevlab.core.layout import FieldInfo, Layout
from sevlab.core.payload import Message, Payload
from sevlab.core.plugins import PluginSet
from sevlab.core.vocabulary import Record, spec_of


class Carried(NamedTuple):
    """What one record carries: the payload, the message's number and name, its layout."""

    payload: Payload
    number: int
    name: str
    layout: type[Layout] | None
    units: Mapping[str, str | type[Layout]] = {}
    inputs: tuple[FieldInfo, ...] = ()
    """The fields that the message is known to look at."""


def carried_of(payload: Payload, message: Message) -> Carried:
    """What a record carries that has this message."""
    layout = message.layout
    names = dict.fromkeys((*message.needs, *message.fields))
    inputs = () if layout is None else tuple(layout.FIELDS[name] for name in names if name in layout.FIELDS)
    return Carried(payload, message.number, message.name, layout, message.units, inputs)


class Carrier(NamedTuple):
    """One payload of a record class: how its message is known, and what those that are declared are."""

    payload: Payload
    message_of: Callable[[Record], int | None]
    declared: dict[int, Carried]


class Messages:
    """The payloads of a set of plugins, by record kind."""

    __slots__ = ("_by_type", "by_kind")

    def __init__(self, payloads: Iterable[Payload]) -> None:
        self.by_kind: dict[str, list[Payload]] = {}
        self._by_type: dict[type, tuple[Carrier, ...]] = {}
        for payload in payloads:
            self.by_kind.setdefault(payload.kind, []).append(payload)

    @classmethod
    def of_plugins(cls, plugins: PluginSet) -> Messages:
        """What the hook `sevlab_payloads` gives."""
        return cls(payload for found in plugins.call("sevlab_payloads").values() for payload in found)

    def of(self, record: Record) -> Carried | None:
        """What `record` carries, None when nobody says."""
        undeclared = None
        for carrier in self._carriers(type(record)):
            number = carrier.message_of(record)
            if number is not None:
                carried = carrier.declared.get(number)
                if carried is not None:
                    return carried
                undeclared = undeclared or Carried(carrier.payload, number, f"{number:#x}", carrier.payload.layout)
        return undeclared

    def number_of(self, record: Record) -> int | None:
        """The number of a record's message alone; a message that nobody declares is -1."""
        found = None
        carriers = self._by_type.get(type(record))
        for _, message_of, declared in self._carriers(type(record)) if carriers is None else carriers:
            number = message_of(record)
            if number is not None:
                if number in declared:
                    return number
                found = -1
        return found

    def _carriers(self, kind: type) -> tuple[Carrier, ...]:
        """What records of a class may carry, looked up once."""
        carriers = self._by_type.get(kind)
        if carriers is None:
            carriers = self._by_type[kind] = tuple(
                Carrier(
                    payload,
                    payload.message_of,
                    {message.number: carried_of(payload, message) for message in payload.messages},
                )
                for payload in self.by_kind.get(spec_of(kind).kind, ())
            )
        return carriers

    def choices(self, kind: str) -> list[tuple[Payload, Message]]:
        """Every declared message that a record of `kind` can carry."""
        return [(payload, message) for payload in self.by_kind.get(kind, ()) for message in payload.messages]
