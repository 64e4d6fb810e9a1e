"""Resources: values that earlier steps and their outcomes named, kept by what they are.

A handle that LAUNCH_START returned, an ASID, the address of a context page: later steps use them where a field has the
same name or unit. Nothing here knows any feature: names come from records and layouts.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING

from sevlab.core.layout import Kind, Layout
from sevlab.core.layout_tools import read_field
from sevlab.core.vocabulary import Outcome, Record, spec_of
from sevlab.fuzz.messages import Messages

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

MAX_VALUES = 64
"""Values kept of one resource; the oldest go."""

OWN = 0.7
"""How often a field gets a value that one of its own name had, where any resource of its kind would do."""

EDGES = 0.5
"""How often a number of a range is one at its ends."""

SUFFIXES = ("spa", "gpa", "asid", "handle")
"""A field whose name ends so holds such a thing, whatever stands before it."""


def resource_of(name: str, unit: str = "") -> str:
    """Which pool a field draws from: its unit, the end of its name, or its name."""
    if unit:
        return unit
    last = name.rpartition("_")[2]
    return last if last in SUFFIXES else name


def is_resource(name: str, unit: str = "") -> bool:
    """Whether a field names something: most values that nobody made are refused at the first look."""
    return resource_of(name, unit) in SUFFIXES


class Pools:
    """Values by resource, in the order in which they were first seen, and the ranges that every machine has."""

    __slots__ = ("ranges", "values")

    def __init__(self) -> None:
        self.values: dict[str, list[int]] = {}
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        """First and last of numbers in a row: ports, MSRs, CPUID leaves, windows of devices."""

    def add(self, resource: str, value: int) -> None:
        """Keep `value`; zero says nothing."""
        if not value:
            return
        pool = self.values.setdefault(resource, [])
        if value not in pool:
            pool.append(value)
            if len(pool) > MAX_VALUES:
                del pool[0]

    def keep(self, name: str, value: int, unit: str = "") -> None:
        """Keep the value of a field: as one of that name, and as one of its resource."""
        self.add(name, value)
        resource = resource_of(name, unit)
        if resource != name:
            self.add(resource, value)

    def draw(self, rng: Random, name: str, unit: str = "") -> int | None:
        """A value for a field, mostly one that a field of that name had; None when none is known."""
        ranges = self.ranges.get(name)
        if ranges:
            first, last = ranges[int(rng.random() * len(ranges))]
            way = rng.random()
            if way < EDGES:
                return (first, last, last + 1, first + 1)[int(way / EDGES * 4)]
            return first + int(rng.random() * (last - first + 1))
        own, wide = self.values.get(name), self.values.get(resource_of(name, unit))
        pool = own if own and (not wide or rng.random() < OWN) else wide
        return pool[int(rng.random() * len(pool))] if pool else None

    # Harvest ----------------------------------------------------------------------------------------------------

    def harvest_layout(self, layout: type[Layout], data: bytes) -> None:
        """Keep the numbers in the fields of a structure."""
        for name, info in layout.FIELDS.items():
            if info.kind is Kind.UINT and info.offset + info.length_bytes <= len(data):
                self.keep(name, read_field(info, data), info.unit)

    def harvest(self, messages: Messages, step: Record, outcome: Outcome) -> None:
        """Keep what a step and its outcome name."""
        for record in (step, *outcome.records):
            for field, value in zip(spec_of(record).fields, record, strict=True):
                if field.type is not bool and isinstance(value, int):
                    self.keep(field.name, value)
                elif field.type is tuple:
                    self._keep_pairs(value)
        carried = messages.of(step)
        if carried is None or carried.layout is None:
            return
        value = getattr(step, carried.payload.field)
        if isinstance(value, bytes):
            self.harvest_layout(carried.layout, value)
        if carried.payload.answer is not None:
            kind, name = carried.payload.answer
            for record in outcome.records:
                if spec_of(record).kind == kind:
                    self.harvest_layout(carried.layout, getattr(record, name))

    def _keep_pairs(self, pairs: object) -> None:
        """Keep the numbers of a list of (name, number)."""
        for pair in pairs if isinstance(pairs, tuple) else ():
            if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int):
                self.add(pair[0], pair[1])

    def harvest_machine(self, machine: Machine) -> None:
        """Keep what every machine has: its vCPUs and VMs, and where their memory lies."""
        for vcpu_id in machine.vcpus:
            self.add("vcpu", vcpu_id)
        for vm_id, vm in machine.hypervisor.vms.items():
            self.add("vm", vm_id)
            for offset in (0, 0x1000, vm.memory_bytes // 2, vm.memory_bytes - 0x1000):
                self.add("spa", vm.memory_spa + offset)
                self.add("gpa", offset)
        tables = machine.tables
        for resource, numbers in (("port", tables.ports), ("msr", tables.guest_msrs), ("leaf", tables.cpuid)):
            self.ranges[resource] = rows(numbers)
        self.ranges["mmio"] = [(window.gpa, window.gpa + window.length_bytes - 1) for window in tables.mmio]


def rows(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each row of numbers."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
