"""A guest under an engine: its exits become steps of the machine, its events are delivered, its time passes.

Policy is not here. What the VMCB intercepts goes through `Machine.apply` and comes back as records: an injected event,
a #VC, a guest that goes on. What it does not intercept the processor does itself, in `native`. So a recording of the
steps replays without the engine.

Time is the virtual clock. It advances with the code that is executed, by about a tick for each instruction, and by a
fixed cost for each exit; no wall clock takes part, and the same guest does the same on every run.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.access import AccessKind
from sevlab.core.cpu import CONTROL_SEV_ES, INSN_BYTES_MAX, INTERRUPT_SHADOW, FaultUnwind, intercepted
from sevlab.core.delivery import RFLAGS_IF, Delivered, deliver
from sevlab.core.events import AdvanceClock, CpuExit, Fault, Injected, Schedule, SetRegisters
from sevlab.core.exceptions import WITH_ERROR_CODE
from sevlab.core.svm import EventType, ExitCode, NpfError, Vector, event
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins import io
from sevlab.plugins.engines import native
from sevlab.plugins.engines.records import Idle
from sevlab.plugins.sev_es import VcDelivered, Vmgexit

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.cpu import CpuEngine, Vcpu
    from sevlab.core.machine import Machine
    from sevlab.core.vocabulary import Outcome, Record
    from sevlab.plugins.engines.mmu import Mmu

EXIT_TICKS = 2000
"""Virtual time of an exit: about a microsecond, as a world switch and back takes."""
NATIVE_TICKS = 100
LONGEST_SLICE, SHORTEST_SLICE = 1 << 20, 1
"""Ticks: with no timer near, and the least."""
WINDOW_GRID = 61
"""While a waiting interrupt cannot be taken yet, a look at each multiple: when does not depend on how the engine got
there, and few loops take a multiple of it."""
TIMERS = frozenset((ExitCode.IOIO, ExitCode.MSR, ExitCode.VMMCALL, ExitCode.NPF, ExitCode.HLT, ExitCode.INTR))
"""Exits behind which a timer may be another, or an interrupt may wait."""
LAST_EXITS = 32
WANTED = ("ACPI", "debug exit", "reset", "SCHEDOP_shutdown: poweroff")
"""How a stop begins that the guest meant."""
V_IRQ = 1 << 8
MMIO = int(NpfError.RSVD)
FETCH, FETCH_USER = int(AccessKind.FETCH), int(AccessKind.FETCH | AccessKind.USER)
NO_CODE = (-1, b"")


class Ended(NamedTuple):
    """Why a run ended; `clean` when the guest or the user wanted it."""

    reason: str
    clean: bool


class LastExit(NamedTuple):
    """One exit for the report of a crash."""

    code: int
    info_1: int
    rip: int


class Execution:
    """One vCPU under an engine: the kernel's side of `CpuEngine`."""

    def __init__(self, machine: Machine, vcpu: Vcpu, mmu: Mmu) -> None:
        self.machine, self.vcpu, self.mmu = machine, vcpu, mmu
        self.engine: CpuEngine | None = None
        self.apply: Callable[[Record], Outcome] = machine.apply
        """Takes every step; a recorder may have put itself into its place."""
        self.exits: Counter[int] = Counter()
        self.instructions = 0
        self.last: deque[LastExit] = deque(maxlen=LAST_EXITS)
        self.ended: Ended | None = None
        self._code = NO_CODE
        """RIP, and the bytes there that were fetched for the present report."""
        self.watch: Callable[[Execution], None] | None = None
        """Called between slices: console output, a limit, an interrupted user."""
        self.pending_ticks = 0
        self.recorded = False
        """Steps carry what the hypervisor sees of the guest, so that they mean the same without the guest."""
        self.encrypted_state = bool(vcpu.vmcb.encryption_control & CONTROL_SEV_ES)

    def attach(self, engine: CpuEngine) -> None:
        """Use this engine."""
        self.engine = self.mmu.engine = engine

    def end(self, reason: str, *, clean: bool = False) -> None:
        """The run is over."""
        if self.ended is None:
            self.ended = Ended(reason, clean)
        if self.engine is not None:
            self.engine.stop()

    # Run --------------------------------------------------------------------------------------------------------

    def run(self) -> Ended:
        """Until the guest or the watch ends it."""
        engine, vcpu = self.engine, self.vcpu
        assert engine is not None  # attached
        while self.ended is None:
            if vcpu.halted:
                self._sleep()
            elif engine.run(self._slice()):
                self._between()
            elif self.mmu.fault is not None:
                fault, self.mmu.fault = self.mmu.fault, None
                self._code = NO_CODE
                self._guard(lambda fault=fault: self.raise_fault(native.exactly(self, fault)))  # type: ignore[misc]
            self.now()
            if self.watch is not None:
                self.watch(self)
            self._check_stopped()
        engine.synchronise()
        return self.ended

    def enter(self) -> None:
        """The first VMRUN."""
        self._follow(self.apply(Schedule()))

    def _check_stopped(self) -> None:
        if self.vcpu.stopped and self.ended is None:
            reason = self.machine.vm_of(self.vcpu).stopped
            self.ended = Ended(reason, clean=reason.startswith(WANTED))

    def now(self) -> int:
        """The TSC at this instruction."""
        assert self.engine is not None  # who else executes
        ticks = self.engine.elapsed()
        self.instructions += ticks
        self.pending_ticks += ticks
        return self.machine.tsc() + self.pending_ticks

    def _slice(self) -> int:
        """How many ticks until something may be due."""
        if self.vcpu.vmcb.vintr & V_IRQ:
            return WINDOW_GRID - self.now() % WINDOW_GRID
        due = io.next_event(self.machine, self.vcpu)
        if due is None:
            return LONGEST_SLICE
        return max(SHORTEST_SLICE, min(LONGEST_SLICE, due - self.now()))

    def _between(self) -> None:
        """The host's timer ends a slice when a device's is due or an interrupt can be taken now."""
        vcpu = self.vcpu
        if self.ended is not None or vcpu.stopped or vcpu.halted:
            return
        if vcpu.vmcb.vintr & V_IRQ:
            if vcpu.regs.rflags & RFLAGS_IF and not vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW:
                self._guard(lambda: self.leave(ExitCode.VINTR, 0, 0, 0))
            return
        due = io.next_event(self.machine, vcpu)
        if due is not None and due <= self.now():
            self._guard(lambda: self.leave(ExitCode.INTR, 0, 0, 0))

    def _sleep(self) -> None:
        """HLT: let time pass until a timer wakes the vCPU."""
        due = io.next_event(self.machine, self.vcpu)
        waits = self.vcpu.vmcb.interrupt_state & 2 if self.encrypted_state else self.vcpu.regs.rflags & RFLAGS_IF
        if due is None or not waits:
            self.end("halted: interrupts are off" if not waits else "halted: no timer is set", clean=not waits)
            return
        ticks = max(0, due - self.now()) + self.pending_ticks
        self.pending_ticks = 0
        self._show_registers()
        self._guard(lambda: self._follow(self.apply(Idle(self.vcpu.vcpu_id, ticks))))

    # Exits ------------------------------------------------------------------------------------------------------

    def fill(self, gva: int, kind: int, cpl: int) -> tuple[int, int] | None:
        """See `EngineSink`."""
        system = self.vcpu.system
        if system.cpl != cpl:
            system.cpl = cpl
        return self.mmu.fill(gva, kind, cpl)

    def exit(self, exit_code: int, exit_info_1: int) -> None:
        """See `EngineSink`."""
        self._code = NO_CODE
        self._guard(lambda: native.handle(self, exit_code, exit_info_1))
        if self.vcpu.halted or self.vcpu.stopped or self.ended is not None:
            assert self.engine is not None  # who else reports
            self.engine.stop()

    def nested_fill(self, gpa: int, kind: int) -> tuple[int, int] | None:
        """See `EngineSink`."""
        return self.mmu.nested_fill(gpa, kind)

    def _guard(self, report: Callable[[], None]) -> None:
        """A fault of the kernel's own access for the guest is the guest's fault."""
        try:
            report()
        except FaultUnwind as unwind:
            self.raise_fault(unwind.fault)

    def leave(self, code: int, info_1: int, info_2: int, length: int) -> None:
        """The VMCB intercepts this: an instruction of `length` bytes at RIP, or an event (0)."""
        regs = self.vcpu.regs
        insn = self.fetch(length) if length else b""
        next_rip = regs.rip + length & MASK64 if length else 0
        self._exit(CpuExit(self.vcpu.vcpu_id, code, info_1, info_2, insn, next_rip))

    def vmgexit(self) -> None:
        """VMGEXIT: RIP is behind it when the hypervisor gets control."""
        regs = self.vcpu.regs
        regs.rip = regs.rip + 4 & MASK64
        self.count(ExitCode.VMGEXIT, self.vcpu.vmcb.ghcb_gpa)
        self.pending_ticks += EXIT_TICKS
        self._pass_time()
        msr = self.vcpu.vmcb.ghcb_gpa
        page = self._shared_page(msr) if self.recorded and not msr & PAGE_MASK else b""
        self._show_registers()
        self._follow(self.apply(Vmgexit(self.vcpu.vcpu_id, msr, page)))
        if self.vcpu.vmcb.vintr & V_IRQ:
            self._between()
        self._look_at_timers()

    def _shared_page(self, gpa: int) -> bytes:
        """The GHCB as the guest left it."""
        window = self.machine.access.shared_window(self.vcpu, gpa, PAGE_BYTES)
        return b"" if window is None else window.read(0, PAGE_BYTES)

    def _show_registers(self) -> None:
        """What the processor shows of an encrypted guest's registers at an exit."""
        if self.recorded:
            regs = self.vcpu.regs
            self.apply(SetRegisters(self.vcpu.vcpu_id, (("rip", regs.rip), ("rflags", regs.rflags))))

    def count(self, code: int, info_1: int) -> None:
        """Note an exit for the summary and the report of a crash."""
        self.exits[code] += 1
        self.last.append(LastExit(code, info_1, self.vcpu.regs.rip))

    def _exit(self, step: CpuExit) -> None:
        self.count(step.exit_code, step.exit_info_1)
        self.pending_ticks += EXIT_TICKS
        self._pass_time()
        self._show_registers()
        self._follow(self.apply(step))
        if self.vcpu.vmcb.vintr & V_IRQ:
            self._between()  # the window may be open at once
        if step.exit_code in TIMERS:
            self._look_at_timers()

    def _look_at_timers(self) -> None:
        """What the hypervisor did may have set a timer, or left an interrupt that waits: end the slice in time."""
        assert self.engine is not None  # attached
        self.engine.limit(self._slice())

    def _pass_time(self) -> None:
        self.now()
        ticks, self.pending_ticks = self.pending_ticks, 0
        self.apply(AdvanceClock(ticks))

    def _follow(self, outcome: Outcome) -> None:
        """What the machine answered becomes what the guest sees."""
        for record in outcome.records:
            kind = type(record)
            if kind is VcDelivered:
                self.deliver(event(Vector.VC, EventType.EXCEPTION, record[1]))
            elif kind is Injected:
                self.deliver(record[1], next_rip=self.vcpu.vmcb.next_rip or None)

    # Events -----------------------------------------------------------------------------------------------------

    def deliver(self, word: int, *, next_rip: int | None = None) -> None:
        """Deliver an event through the guest's tables."""
        software = word >> 8 & 7 == EventType.SOFTWARE or (
            word >> 8 & 7 == EventType.EXCEPTION and word & 0xFF in (Vector.BP, Vector.OF)
        )
        how = deliver(self.machine, self.vcpu, word, next_rip=next_rip if software else None)
        if how is Delivered.SHUTDOWN:
            self.leave(ExitCode.SHUTDOWN, 0, 0, 0)
        elif how is not Delivered.DELIVERED:
            self.end(how.value)

    def exception(self, vector: int, error_code: int = 0, address: int = 0) -> None:
        """An exception of the guest's own: to the hypervisor if it asks for it, else to the guest."""
        code = ExitCode.EXCEPTION_0 + vector
        if self.vcpu.vmcb.intercepts >> code & 1:
            self.leave(code, error_code, address, 0)
            return
        if vector == Vector.PF:
            self.vcpu.system.cr2 = address
        self.deliver(event(vector, EventType.EXCEPTION, error_code if vector in WITH_ERROR_CODE else None))

    def raise_fault(self, fault: Fault) -> None:
        """A fault as a value becomes an exit or an exception.

        A nested fault of an encrypted guest outside its memory is one by a reserved bit: the hypervisor marks pages
        without memory so that the guest gets #VC (Linux arch/x86/kvm/mmu/spte.c, shadow_mmio_value).
        """
        if fault.vector != ExitCode.NPF:
            self.exception(fault.vector, fault.error_code, fault.address)
            return
        error = fault.error_code
        if self.encrypted_state and fault.address >= self.machine.vm_of(self.vcpu).memory_bytes:
            error |= MMIO
        insn = b"" if self.encrypted_state else self.fetch(INSN_BYTES_MAX)
        self._exit(CpuExit(self.vcpu.vcpu_id, ExitCode.NPF, error, fault.address, insn, 0))

    # The instruction --------------------------------------------------------------------------------------------

    def fetch(self, length: int = INSN_BYTES_MAX) -> bytes:
        """Up to `length` bytes at RIP; fewer where the next page cannot be read."""
        rip, (at, data) = self.vcpu.regs.rip, self._code
        if at != rip or len(data) < length:
            data = self._fetch(length)
            self._code = (rip, data)
        return data[:length]

    def _fetch(self, length: int) -> bytes:
        vcpu, access = self.vcpu, self.machine.access
        linear = vcpu.regs.rip if native.is_long(vcpu) else vcpu.system.cs[3] + vcpu.regs.rip & 0xFFFF_FFFF
        kind = FETCH_USER if vcpu.system.cpl == 3 else FETCH
        inside = PAGE_BYTES - (linear & PAGE_MASK)
        if length <= inside:
            place = access.guest_linear(vcpu, linear, kind)[1]
            return self.machine.memory.read(place.spa, length, place.key)
        first = access.guest_read(vcpu, linear, inside, kind)
        try:
            return first + access.guest_read(vcpu, linear + inside, length - inside, kind)
        except FaultUnwind:
            return first

    def is_intercepted(self, code: int, info_1: int = 0) -> bool:
        """Whether the VMCB wants this."""
        return intercepted(self.machine, self.vcpu, code, info_1)
