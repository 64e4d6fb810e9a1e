"""Which message a record carries, by what the plugins declare; looked up once a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sevlab.core.layout import Layout
from sevlab.core.payload import Message, Payload
from sevlab.core.plugins import PluginSet
from sevlab.core.vocabulary import Record, spec_of


class Carried(NamedTuple):
    """What one record carries: the payload, the message's number and name, its layout."""

    payload: Payload
    number: int
    name: str
    layout: type[Layout] | None


class Messages:
    """The payloads of a set of plugins, by record kind."""

    __slots__ = ("_declared", "by_kind")

    def __init__(self, payloads: Iterable[Payload]) -> None:
        self.by_kind: dict[str, list[Payload]] = {}
        self._declared: dict[tuple[int, int], Message] = {}
        for payload in payloads:
            self.by_kind.setdefault(payload.kind, []).append(payload)
            for message in payload.messages:
                self._declared[id(payload), message.number] = message

    @classmethod
    def of_plugins(cls, plugins: PluginSet) -> Messages:
        """What the hook `sevlab_payloads` gives."""
        return cls(payload for found in plugins.call("sevlab_payloads").values() for payload in found)

    def of(self, record: Record) -> Carried | None:
        """What `record` carries, None when nobody says."""
        undeclared = None
        for payload in self.by_kind.get(spec_of(record).kind, ()):
            number = payload.message_of(record)
            if number is not None:
                message = self._declared.get((id(payload), number))
                if message is not None:
                    return Carried(payload, number, message.name, message.layout)
                undeclared = undeclared or Carried(payload, number, f"{number:#x}", payload.layout)
        return undeclared

    def number_of(self, record: Record) -> int | None:
        """The number of a record's message alone; a message that nobody declares is -1."""
        found = None
        for payload in self.by_kind.get(spec_of(record).kind, ()):
            number = payload.message_of(record)
            if number is not None:
                if (id(payload), number) in self._declared:
                    return number
                found = -1
        return found

    def choices(self, kind: str) -> list[tuple[Payload, Message]]:
        """Every declared message that a record of `kind` can carry."""
        return [(payload, message) for payload in self.by_kind.get(kind, ()) for message in payload.messages]
