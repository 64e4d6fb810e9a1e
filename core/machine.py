"""The machine: compose it from a configuration and plugins, apply steps, reset, snapshot.

`apply(step)` is total: whatever the step, the answer is an outcome. Only an `InvariantViolation` - our bug, or what an
oracle looks for - leaves it, and with an oracle sink attached not even that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sevlab.core import steps
from sevlab.core.access import Access
from sevlab.core.asp import Asp, Mailbox
from sevlab.core.buffers import SharedFetches
from sevlab.core.builder import Builder, Registers4
from sevlab.core.caches import CachedMemory
from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.cpu import Vcpu
from sevlab.core.determinism import Clock, Entropy
from sevlab.core.errors import ConfigError, InvariantViolation, PluginError
from sevlab.core.events import KERNEL_RECORDS, Race, Refused
from sevlab.core.guests import create_guest
from sevlab.core.hypervisor import Hypervisor, Vm
from sevlab.core.memory import Memory
from sevlab.core.oracle import OracleSink
from sevlab.core.pages import MemoryImage
from sevlab.core.plugins import PluginSet, load
from sevlab.core.state import Journal, StateDict, Stateful, StateImage, capture, restore
from sevlab.core.vocabulary import Outcome, Record, Vocabulary, spec_of

INDEXED_LEAVES = frozenset((4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x8000_001D, 0x8000_0020, 0x8000_0026))
"""CPUID leaves that look at ECX; all others answer whatever it holds. Source: spec 24594, E.3 and E.4."""

_record = tuple.__new__
"""Makes an outcome without the keyword machinery, at every step."""

KERNEL = "core"
"""The name under which the kernel itself registers."""


class Snapshot(NamedTuple):
    """Explicit data of a whole machine; equal snapshots mean equal machines."""

    state: StateImage
    memory: MemoryImage


class Machine:
    """An executable model of one AMD server.

    `config` says what it is made of; `given` maps names to plugin modules that take part without being installed.
    Raises `ConfigError` or `PluginError` for what cannot be composed.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        given: Mapping[str, Any] | None = None,
        plugins: PluginSet | None = None,
    ) -> None:
        self.config = config or MachineConfig()
        self.plugins = plugins or load([*self.config.plugins, *(given or {})], given=given)
        builder = compose(self.config, self.plugins)
        self.tables = builder.freeze()
        self.slots = builder.slots
        self.vocabulary = vocabulary(self.plugins)
        self.sink: OracleSink | None = None

        part = self.config.part
        size_bytes = self.config.memory_bytes
        self.memory = (
            CachedMemory(size_bytes, key_bits=part.key_bits, coherent=part.coherent)
            if self.config.caches
            else Memory(size_bytes, key_bits=part.key_bits)
        )
        self.memory.page_owner_changed = self.slots.page_owner_changed
        self.fetches = SharedFetches(self.memory)
        self.access = Access(self)
        self.entropy = Entropy(seed=self.config.seed)
        self.clock = Clock()
        self.hypervisor = Hypervisor()
        self.asp = Asp(device_id=part.asp_device)
        self.asp.mailboxes.update({name: Mailbox() for name in builder.mailboxes})
        self.mailboxes = dict(builder.mailboxes)
        self.vcpus: StateDict[int, Vcpu] = StateDict()
        self.components: StateDict[str, Stateful | StateDict[Any, Any]] = StateDict(builder.components)
        self._cpuid_bits = builder.cpuid_bits
        self._observers = tuple(builder.observers)
        self.at_entry = tuple(builder.entry)
        """What the hypervisor runs before each VMRUN."""
        self._records: list[Record] = []
        self.emit: Callable[[Record], None] = self._records.append
        """Handlers call this with each record that the other side would see."""

        self._journal = Journal()
        for guest in self.config.guests:
            create_guest(self, guest)
        for boot in builder.boot:
            boot(self)
        self._records.clear()
        self.mark()

    # Steps ------------------------------------------------------------------------------------------------------

    def apply(self, step: Record) -> Outcome:
        """Apply one step; returns what the other side produced.

        Raises only `InvariantViolation`, and only without an oracle sink; with one, the violation becomes a finding
        and the sequence is over: further steps are refused until `reset`.
        """
        records = self._records
        sink = self.sink
        if sink is not None and sink.tainted:
            return Outcome((Refused("the sequence ended with a violation"),))
        handler = self.tables.steps.get(type(step))
        fetches = self.fetches
        if fetches.watched:
            fetches.begin()
        else:
            fetches.count = 0
        if handler is None:
            return Outcome((Refused(f"no plugin handles a step of kind {spec_of(step).kind!r}"),))
        try:
            handler(self, step)
        except InvariantViolation as violation:
            if sink is None:
                records.clear()
                raise
            sink.violation(violation, step)
        outcome = _record(Outcome, (tuple(records),))
        records.clear()
        if sink is not None:
            sink.step_end(self, step, outcome)
        for observer in self._observers:
            observer(self, step, outcome)
        if fetches.watched and not isinstance(step, Race):
            fetches.end()
        return outcome

    # Reset and snapshots ----------------------------------------------------------------------------------------

    def mark(self, *, keep_lent: bool = False) -> None:
        """Make the present state what `reset` returns to; `keep_lent`: an engine goes on executing on its pages."""
        self._journal.mark(self._roots())
        self.memory.mark(keep_lent=keep_lent)
        self.access.mark()

    def reset(self, *, forget: bool = True) -> None:
        """Return to the marked state, with an empty sink; costs only what changed since.

        `forget` False: the caller knows that no nested table changed, and keeps the cached translations.
        """
        self._records.clear()  # of a step that something left by an exception
        self._journal.reset()
        self.memory.reset()
        if forget:
            self.access.forget()
        if self.sink is not None:
            self.sink.begin()

    @property
    def changed(self) -> Sequence[Stateful | StateDict[Any, Any]]:
        """The parts of the state that changed since the mark, in the order of their first change; grows in place."""
        return self._journal.changed

    def snapshot(self) -> Snapshot:
        """The whole state as explicit data."""
        return Snapshot(capture(self._tree()), self.memory.capture())

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the state of `snapshot`; `reset` still returns to the mark."""
        restore(self._tree(), snapshot.state)
        self.memory.restore(snapshot.memory)
        self.access.forget()

    def _roots(self) -> tuple[Stateful | StateDict[Any, Any], ...]:
        return (self.entropy, self.clock, self.hypervisor, self.asp, self.vcpus, self.components)

    def _tree(self) -> StateDict[str, Any]:
        names = ("entropy", "clock", "hypervisor", "asp", "vcpus", "components")
        return StateDict(zip(names, self._roots(), strict=True))

    # What handlers ask ------------------------------------------------------------------------------------------

    def vm_of(self, vcpu: Vcpu) -> Vm:
        """The VM that `vcpu` belongs to."""
        return self.hypervisor.vms[vcpu.vm_id]

    def tsc(self) -> int:
        """The time-stamp counter: the slot `clock`, else the virtual clock; 64 bits."""
        clock = self.slots.clock
        return self.clock.tsc if clock is None else clock(self)

    def cpuid(self, vcpu: Vcpu | None, leaf: int, subleaf: int) -> Registers4:
        """EAX, EBX, ECX, EDX for the host (`vcpu` None) or as the hypervisor answers a guest; unknown leaves are 0."""
        handler = self.tables.cpuid.get(leaf)
        if handler is not None:
            registers = handler(self, vcpu, leaf, subleaf)
        else:
            known = (leaf, subleaf if leaf in INDEXED_LEAVES else 0)
            registers = self._cpuid_bits.get(known, (0, 0, 0, 0))
        if self.slots.cpuid_filter is not None:
            registers = self.slots.cpuid_filter(self, vcpu, leaf, subleaf, registers)
        return registers

    def create_guest(self, guest: GuestConfig) -> Vm:
        """Add a VM with its vCPUs, memory and nested page tables."""
        return create_guest(self, guest)


def compose(config: MachineConfig, plugins: PluginSet) -> Builder:
    """Let every plugin register, in dependency order; the kernel's own steps come first."""
    for name in config.options:
        if name not in plugins.names:
            raise ConfigError(f"plugin.{name}: no such plugin in this machine; loaded are {', '.join(plugins.names)}")
    builder = Builder(config)
    steps.register(builder.for_plugin(KERNEL, ()))
    for name in plugins.names:
        options = plugins.call_one(name, "sevlab_options") or ()
        plugins.call_one(name, "sevlab_register", builder=builder.for_plugin(name, options))
    return builder


def vocabulary(plugins: PluginSet) -> Vocabulary:
    """All record kinds of the kernel and of `plugins`. Raises `PluginError` for a kind that is declared twice."""
    owners = {spec_of(record).kind: (KERNEL, record) for record in KERNEL_RECORDS}
    for name, records in plugins.call("sevlab_records").items():
        for record in records:
            kind = spec_of(record).kind
            if kind in owners:
                raise PluginError(f"record {kind!r} is declared twice: by {owners[kind][0]!r} and by plugin {name!r}")
            owners[kind] = (name, record)
    return Vocabulary({kind: record for kind, (_, record) in owners.items()})
