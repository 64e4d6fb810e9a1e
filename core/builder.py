"""What a plugin registers with: one builder for each machine, one facade for each plugin.

The registries become plain dictionaries (`Tables`), the slots plain attributes (`Slots`); after `freeze` nothing of
this module is touched again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.core import asp
from sevlab.core.config import MachineConfig, Option, Scalar
from sevlab.core.cpu import Vcpu
from sevlab.core.crypto import MemoryKey
from sevlab.core.dispatch import Registrar, Registry
from sevlab.core.errors import ConfigError, PluginError
from sevlab.core.events import CpuExit, Fault
from sevlab.core.state import StateDict, Stateful
from sevlab.core.svm import exit_name
from sevlab.core.vocabulary import Outcome, Record

if TYPE_CHECKING:
    from sevlab.core.access import Actor
    from sevlab.core.hypercall import HypercallOwner
    from sevlab.core.machine import Machine

Registers4 = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

ExitHandler = Callable[["Machine", Vcpu, CpuExit], None]
StepHandler = Callable[["Machine", Any], None]
CpuidHandler = Callable[["Machine", "Vcpu | None", int, int], Registers4]
Observer = Callable[["Machine", Record, Outcome], None]


class Msr(NamedTuple):
    """Handlers of one model-specific register: read gives 64 bits or a `Fault`, write a `Fault` or None.

    Called with the machine, the vCPU (None: the host), the register, and for a write the value; a handler that is
    None answers #GP(0).
    """

    read: Callable[[Machine, Vcpu | None, int], int | Fault] | None
    write: Callable[[Machine, Vcpu | None, int, int], Fault | None] | None


class Port(NamedTuple):
    """Handlers of one I/O port, width in bytes: read(machine, vcpu, port, width) -> value zero-extended, and
    write(machine, vcpu, port, width, value). The vCPU says which VM's device is meant.

    `width` is the widest access that the handlers take: a wider one is split into bytes at successive ports.
    `write_string`, where a device has it, takes the elements of a REP OUTS at once, as bytes.
    """

    read: Callable[[Machine, Vcpu, int, int], int]
    write: Callable[[Machine, Vcpu, int, int, int], None]
    width: int = 4
    write_string: Callable[[Machine, Vcpu, int, int, bytes], None] | None = None


class MmioWindow(NamedTuple):
    """A device's window in guest-physical space: handlers get the vCPU, an offset, and a width that fits in it."""

    gpa: int
    length_bytes: int
    read: Callable[[Machine, Vcpu, int, int], int]
    write: Callable[[Machine, Vcpu, int, int, int], None]


class Tables(NamedTuple):
    """The frozen tables: what handles what. Keys and handlers as the builder's registries of the same names."""

    steps: dict[type, StepHandler]
    exits: dict[int, ExitHandler]
    native: dict[int, ExitHandler]
    host_msrs: dict[int, Msr]
    guest_msrs: dict[int, Msr]
    cpuid: dict[int, CpuidHandler]
    ports: dict[int, Port]
    mmio: tuple[MmioWindow, ...]
    asp_commands: dict[tuple[str, int], asp.AspCommandEntry]
    asp_registers: dict[int, asp.AspRegister]
    nae_events: dict[int, Any]
    msr_protocol: dict[int, Any]
    vc_handlers: dict[int, Any]
    hypercalls: dict[int, Any]


class Slots:
    """Hooks into the kernel's hottest code: each one callable or None, frozen with the machine, one owner each.

    - `access_check(actor, spa, gpa, kind) -> Fault | None`: may this access happen (RMP); `gpa` -1: none
    - `key_of(asid, c_bit) -> MemoryKey | None`: the key of an access, None for plaintext
    - `vmrun_enter(machine, vcpu) -> exit code | None`: refuse a VMRUN, or load encrypted state
    - `virtual_tom(vcpu) -> gpa`: from where on a guest's data accesses are shared, below private; 0: its C-bits decide
    - `vmrun_exit(machine, vcpu, exit) -> exit | None`: what the hypervisor sees; None: nothing, it became #VC
    - `page_owner_changed(pfn, old key, new key)`: a page is written under another key than before
    - `inject_filter(machine, vcpu, event) -> event`: which event the guest gets (EVENTINJ word, 0: none)
    - `cpuid_filter(machine, vcpu, leaf, subleaf, registers) -> registers`: last word on a CPUID answer
    - `clock(machine) -> ticks`: the time-stamp counter
    - `hypercall(machine, vcpu, frame) -> HypercallEnd`: whose ABI VMMCALL speaks (see `core.hypercall`); none: #UD
    - `hypercall_registers(vcpu) -> names`: what an encrypted guest passes beside RAX when it executes VMMCALL as it is
    - `direct_interrupt(machine, vcpu) -> vector | None`: what the hypervisor injects ahead of all interrupt controllers
    - `next_timer(machine, vcpu) -> ticks | None`: when the next of the hypervisor's own timers is due
    - `nmi_complete(machine, vcpu)`: an encrypted guest says that its NMI handler has ended
    - `scheduler(machine, runnable vCPUs) -> vCPU`: who runs next
    - `start_vcpu(machine, vcpu, vector) -> bool`: a start-up IPI arrives; True: done, False: start it in real mode
    """

    __slots__ = (
        "access_check",
        "clock",
        "cpuid_filter",
        "direct_interrupt",
        "hypercall",
        "hypercall_registers",
        "inject_filter",
        "key_of",
        "next_timer",
        "nmi_complete",
        "page_owner_changed",
        "scheduler",
        "start_vcpu",
        "virtual_tom",
        "vmrun_enter",
        "vmrun_exit",
    )

    access_check: Callable[[Actor, int, int, int], Fault | None] | None
    key_of: Callable[[int, bool], MemoryKey | None] | None
    vmrun_enter: Callable[[Machine, Vcpu], int | None] | None
    virtual_tom: Callable[[Vcpu], int] | None
    vmrun_exit: Callable[[Machine, Vcpu, CpuExit], CpuExit | None] | None
    page_owner_changed: Callable[[int, MemoryKey | None, MemoryKey | None], None] | None
    inject_filter: Callable[[Machine, Vcpu, int], int] | None
    cpuid_filter: Callable[[Machine, Vcpu | None, int, int, Registers4], Registers4] | None
    clock: Callable[[Machine], int] | None
    hypercall: HypercallOwner | None
    hypercall_registers: Callable[[Vcpu], tuple[str, ...]] | None
    direct_interrupt: Callable[[Machine, Vcpu], int | None] | None
    next_timer: Callable[[Machine, Vcpu], int | None] | None
    nmi_complete: Callable[[Machine, Vcpu], None] | None
    scheduler: Callable[[Machine, tuple[Vcpu, ...]], Vcpu] | None
    start_vcpu: Callable[[Machine, Vcpu, int], bool] | None

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, None)


def _hex(key: object) -> str:
    return f"{key:#x}" if isinstance(key, int) else str(key)


class Builder:
    """Collects what all plugins register for one machine."""

    def __init__(self, config: MachineConfig) -> None:
        self.config = config
        self.steps: Registry[type, StepHandler] = Registry("step", lambda cls: cls.__name__)
        self.exits: Registry[int, ExitHandler] = Registry("exit", exit_name)
        self.native: Registry[int, ExitHandler] = Registry("native behaviour of exit", exit_name)
        self.host_msrs: Registry[int, Msr] = Registry("host MSR", _hex)
        self.guest_msrs: Registry[int, Msr] = Registry("guest MSR", _hex)
        self.cpuid: Registry[int, CpuidHandler] = Registry("CPUID leaf", _hex)
        self.ports: Registry[int, Port] = Registry("port", _hex)
        self.mmio: Registry[int, MmioWindow] = Registry("MMIO window at", _hex)
        self.asp_commands: Registry[tuple[str, int], asp.AspCommandEntry] = Registry(
            "ASP command", lambda key: f"{key[0]} {key[1]:#x}"
        )
        self.asp_registers: Registry[int, asp.AspRegister] = Registry("ASP register", _hex)
        self.nae_events: Registry[int, Any] = Registry("NAE event", _hex)
        self.msr_protocol: Registry[int, Any] = Registry("MSR-protocol request", _hex)
        self.vc_handlers: Registry[int, Any] = Registry("guest's handler of #VC", exit_name)
        self.hypercalls: Registry[int, Any] = Registry("hypercall", str)
        self.slots = Slots()
        self._slot_owners: dict[str, str] = {}
        self.components: dict[str, Stateful | StateDict[Any, Any]] = {}
        self._component_owners: dict[str, str] = {}
        self.observers: list[Observer] = []
        self.boot: list[Callable[[Machine], None]] = []
        self.entry: list[Callable[[Machine, Vcpu], None]] = []
        self.cpuid_bits: dict[tuple[int, int], Registers4] = {}
        self.mailboxes: dict[str, asp.MailboxInterface] = {}

    def for_plugin(self, plugin: str, options: tuple[Option, ...]) -> PluginBuilder:
        """The facade that plugin `plugin` registers with. Raises `ConfigError` for an option that it cannot have."""
        return PluginBuilder(self, plugin, _options(self.config.options.get(plugin, {}), options, plugin))

    def registries(self) -> tuple[Registry[Any, Any], ...]:
        """All registries, for listings."""
        return tuple(item for item in vars(self).values() if isinstance(item, Registry))

    def freeze(self) -> Tables:
        """Make the tables. Raises `PluginError` for overlapping windows and replacements of nothing."""
        windows = sorted(self.mmio.entries().values(), key=lambda entry: entry.handler.gpa)
        for below, above in pairwise(windows):
            if below.handler.gpa + below.handler.length_bytes > above.handler.gpa:
                raise PluginError(
                    f"MMIO windows overlap: {below.handler.gpa:#x} of plugin {below.plugin!r}"
                    f" reaches {above.handler.gpa:#x} of plugin {above.plugin!r}"
                )
        return Tables(
            steps=self.steps.freeze(),
            exits=self.exits.freeze(),
            native=self.native.freeze(),
            host_msrs=self.host_msrs.freeze(),
            guest_msrs=self.guest_msrs.freeze(),
            cpuid=self.cpuid.freeze(),
            ports=self.ports.freeze(),
            mmio=tuple(entry.handler for entry in windows),
            asp_commands=self.asp_commands.freeze(),
            asp_registers=self.asp_registers.freeze(),
            nae_events=self.nae_events.freeze(),
            msr_protocol=self.msr_protocol.freeze(),
            vc_handlers=self.vc_handlers.freeze(),
            hypercalls=self.hypercalls.freeze(),
        )


def _options(given: Mapping[str, Scalar], declared: tuple[Option, ...], plugin: str) -> dict[str, Scalar]:
    legal = {option.name: option for option in declared}
    for name in given:
        if name not in legal:
            expected = f"one of {', '.join(legal)}" if legal else "nothing: the plugin has no options"
            raise ConfigError(f"plugin.{plugin}.{name}: unknown option; expected {expected}")
    return {
        name: option.check(given[name], f"plugin.{plugin}.{name}") if name in given else option.default
        for name, option in legal.items()
    }


class PluginBuilder:
    """One plugin's side of the builder: what `sevlab_register` gets.

    The registries have `add(key, handler)` and `replace(key, make)`, where `make(original)` returns the handler that
    takes its place.
    """

    def __init__(self, builder: Builder, plugin: str, options: Mapping[str, Scalar]) -> None:
        self._builder = builder
        self.plugin = plugin
        self.options = options
        self.config = builder.config
        self.steps = Registrar(builder.steps, plugin)
        self.exits = Registrar(builder.exits, plugin)
        self.native = Registrar(builder.native, plugin)
        self.host_msrs = Registrar(builder.host_msrs, plugin)
        self.guest_msrs = Registrar(builder.guest_msrs, plugin)
        self.cpuid = Registrar(builder.cpuid, plugin)
        self.ports = Registrar(builder.ports, plugin)
        self.asp_commands = Registrar(builder.asp_commands, plugin)
        self.asp_registers = Registrar(builder.asp_registers, plugin)
        self.nae_events = Registrar(builder.nae_events, plugin)
        self.msr_protocol = Registrar(builder.msr_protocol, plugin)
        self.vc_handlers = Registrar(builder.vc_handlers, plugin)
        self.hypercalls = Registrar(builder.hypercalls, plugin)

    def mmio(self, window: MmioWindow) -> None:
        """Put a device's window into guest-physical space; windows may not overlap."""
        if window.length_bytes <= 0 or window.gpa < 0:
            raise PluginError(f"plugin {self.plugin!r}: MMIO window at {window.gpa:#x}: expected a positive length")
        self._builder.mmio.add(window.gpa, window, plugin=self.plugin)

    def cpuid_bits(self, leaf: int, subleaf: int = 0, **registers: int) -> None:
        """Set bits of a CPUID leaf that several plugins share: `eax`, `ebx`, `ecx`, `edx` are ORed together."""
        unknown = set(registers) - {"eax", "ebx", "ecx", "edx"}
        if unknown:
            raise PluginError(f"plugin {self.plugin!r}: CPUID {leaf:#x}: no register {', '.join(sorted(unknown))}")
        before = self._builder.cpuid_bits.get((leaf, subleaf), (0, 0, 0, 0))
        eax, ebx, ecx, edx = (registers.get(name, 0) for name in ("eax", "ebx", "ecx", "edx"))
        self._builder.cpuid_bits[leaf, subleaf] = (
            before[0] | eax,
            before[1] | ebx,
            before[2] | ecx,
            before[3] | edx,
        )

    def mailbox(self, interface: asp.MailboxInterface) -> None:
        """Add a mailbox to the ASP: its three registers and its state."""
        if interface.name in self._builder.mailboxes:
            raise PluginError(f"plugin {self.plugin!r}: the ASP already has a mailbox {interface.name!r}")
        self._builder.mailboxes[interface.name] = interface
        for offset, register in asp.mailbox_registers(interface).items():
            self.asp_registers.add(offset, register)

    def slot(self, name: str, function: Callable[..., Any]) -> None:
        """Own a slot of the kernel (see `Slots`). Raises `PluginError` for an unknown slot or a second owner."""
        owners = self._builder._slot_owners  # noqa: SLF001  # the facade is part of the builder
        if name not in Slots.__slots__:
            raise PluginError(f"plugin {self.plugin!r}: no slot {name!r}; there are {', '.join(Slots.__slots__)}")
        if name in owners:
            raise PluginError(f"slot {name!r} has two owners: plugin {owners[name]!r} and plugin {self.plugin!r}")
        owners[name] = self.plugin
        setattr(self._builder.slots, name, function)

    def replace_slot(self, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        """Take over a slot of a plugin in `REQUIRES`: `make(its function)` is called from now on, in the open.

        Raises `PluginError` for an unknown slot or one that nobody owns yet.
        """
        before = getattr(self._builder.slots, name, None)
        if before is None:
            raise PluginError(f"plugin {self.plugin!r} replaces slot {name!r}, which nobody owns")
        self._builder._slot_owners[name] = self.plugin  # noqa: SLF001
        setattr(self._builder.slots, name, make(before))

    def component(self, state: Stateful | StateDict[Any, Any], name: str = "") -> None:
        """Hang state of the plugin into the machine's tree, as `machine.components[name]` (default: the plugin)."""
        name = name or self.plugin
        owners = self._builder._component_owners  # noqa: SLF001
        if name in owners:
            raise PluginError(f"component {name!r} belongs to plugin {owners[name]!r}, not to plugin {self.plugin!r}")
        owners[name] = self.plugin
        self._builder.components[name] = state

    def observe(self, observer: Observer) -> None:
        """Be told of every step and its outcome, after it happened."""
        self._builder.observers.append(observer)

    def at_entry(self, function: Callable[[Machine, Vcpu], None]) -> None:
        """Let the hypervisor run `function` before each VMRUN: interrupts to inject, timers that are due."""
        self._builder.entry.append(function)

    def at_boot(self, function: Callable[[Machine], None]) -> None:
        """Run `function` once, when the machine is made and before its booted state is marked."""
        self._builder.boot.append(function)
