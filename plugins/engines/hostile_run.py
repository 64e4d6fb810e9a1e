"""A guest under a hostile hypervisor, from a snapshot until the handler of its #VC returns, and what went wrong there.

An input is a list of steps between the hypervisor's entries: what comes before the first `schedule` is done before the
guest goes on, what comes after it at the guest's next VMGEXIT, and so on; when the list is over the hypervisor is
honest. The steps are those of the fault boundary: lies in the next reply (`sev_es.forge`, `sev_es.forge-msr`), an event
injected with the next entry (`vmcb` at EVENTINJ), a nested mapping (`npt`; a page that is unmapped is marked as device
memory, so that the access is #VC). Vector 29 comes as an interrupt, with an exit code of the hypervisor's choice for
its error code, since an exception of that vector is not injected; that hardware pushes it then is UNVERIFIED.

What the guest does wrong is a finding. What the hypervisor can do to any guest of SEV-ES - an exception or interrupt
out of the blue, other bytes in a page - is none: after it, only what the handler shows and asks for is judged.
Source: arXiv 2404.03387 (Heckler), 2404.03526 (WeSee); spec 24593, 15.35; 56421, 2.3 and 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Done, Injected, MapFlag, NptEdit, Schedule, VmcbWrite
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.oracle import Finding
from sevlab.core.svm import EVENT_ERROR_VALID, EVENT_VALID, ExitCode, NpfError, Vector
from sevlab.core.units import MASK32, MASK64, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.core.vocabulary import Outcome, Record
from sevlab.plugins import sev_es
from sevlab.plugins.engines import native
from sevlab.plugins.engines.block_trace import BlockTrace
from sevlab.plugins.engines.execution import NO_CODE, Ended, Execution
from sevlab.plugins.engines.interrupted import RSP, Interrupted, changed_registers, plant
from sevlab.plugins.engines.prefix import Prefix, learn
from sevlab.plugins.engines.snapshot import Snapshot, differs
from sevlab.plugins.engines.symbols import Symbols
from sevlab.plugins.engines.unicorn_engine import UnicornCpu

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import Fault
    from sevlab.core.machine import Machine
    from sevlab.plugins.engines.mmu import Mmu

ORACLE = "guest-vc"
DOCUMENTATION = (
    "Whatever its hypervisor says, a #VC handler shows no private byte, asks only for what the interrupted instruction"
    " means and on behalf of code that may do that, changes only what the instruction changes, takes no fault of its"
    " own, and comes to an end. Source: arXiv 2010.07094, 2404.03387, 2404.03526; CVE-2024-25742; edk2 85b8eac59b."
)
STEPS = ("sev_es.forge", "sev_es.forge-msr", "vmcb", "npt", "schedule")

BUDGET = 1 << 18
"""Instructions, about, between two exits: a handler takes some thousands."""
MAX_EXITS, MAX_SAME, MAX_FAULTS, MAX_REPORTS = 400, 64, 12, 1000
"""VMGEXITs, the same one, faults, and reports of the engine in one run."""
MAX_REPORTS_INFLICTED = 64
"""What follows on a page that was taken away says little, and may go on for long."""
EVENT_INJ = 0xA8
"""Of the VMCB. Source: spec 24593, appendix B."""
ZEROS = bytes(8)
MSR_INFO, MSR_CPUID_REQUEST = 0xFFF, 4
CODE_AT, INFO_1_AT = 0x390, 0x398
EXCEPTION_ASKED = b"\1\0\0\0"
"""SW_EXITINFO1 of a reply: the guest is to raise what SW_EXITINFO2 says. Source: 56421, 4.1."""
PRIVILEGED = frozenset((ExitCode.MSR, ExitCode.IOIO, ExitCode.WBINVD, ExitCode.INVD, ExitCode.MONITOR, ExitCode.MWAIT,
                        ExitCode.DR7_READ, ExitCode.DR7_WRITE))  # fmt: skip
"""What code at CPL 3 gets #GP for before anything is intercepted; IOIO without IOPL and bitmap. Source: 24593, 15.7."""
MMIO_CODES = (sev_es.NaeCode.MMIO_READ, sev_es.NaeCode.MMIO_WRITE)


class Request(NamedTuple):
    """What the guest asked its hypervisor: the exit code of the page, or the whole MSR."""

    by_page: bool
    code: int
    info_1: int
    info_2: int
    rip: int


class HostileRun(Execution):
    """One vCPU that is put back and run again and again; `start` first."""

    def __init__(self, machine: Machine, vcpu: Vcpu, mmu: Mmu) -> None:
        super().__init__(machine, vcpu, mmu)
        self.findings: list[Finding] = []
        self.requests: list[Request] = []
        self.texts: list[str] = []
        self.marks: dict[int, Callable[[HostileRun], bool]] = {}
        """Code that is not executed but answered, by address; True: the guest goes on behind the call."""
        self.expected_faults: frozenset[int] = frozenset()
        """Instructions whose faults the guest expects."""
        self.symbols = Symbols()
        self._steps: Iterator[Record] = iter(())
        self._hostile = self._stop_at_handler = False
        self._natural = 0
        self._prefix: Prefix | None = None
        self._handler_pages: frozenset[int] = frozenset()
        self._clear()

    def name_of(self, address: int) -> str:
        """A place in the guest's code, by name where it has one."""
        return self.symbols.name(address) or f"{address:#x}"

    def _clear(self) -> None:
        self.findings, self.requests, self.texts = [], [], []
        self._inflicted = self._tampered = False
        self._faults = self._same = self._reports = 0
        self._most_reports = MAX_REPORTS
        self._served: list[tuple[int, bool]] = []
        """(exit code, whether by the hardware or at CPL 0) of each #VC that the interrupted instruction means."""
        self._claimed = False
        self._first = 0
        """Where the first #VC of the hardware's was."""
        self._shown: set[str] = set()
        self._lies: list[sev_es.ForgeReply | sev_es.ForgeMsr] = []

    # Start ------------------------------------------------------------------------------------------------------------

    def start(self, trace: BlockTrace, around: tuple[int, int], *, strict: bool = False) -> Interrupted:
        """Make the present state, before an instruction, that from which every input runs.

        `around` is the code (first address, end) to which the handler returns. Raises `FaultUnwind` without an
        instruction at RIP.
        """
        assert isinstance(self.engine, UnicornCpu)  # `boot` made it
        self._trace = trace
        self.before = plant(self, strict=strict)
        self._secrets = self.before.secrets
        trace.stop_in(*around)
        for address in self.marks:
            trace.mark(address)
        self._snapshot = Snapshot(self)
        vm = self.machine.vm_of(self.vcpu)
        self._memory_spa, self._memory_bytes = vm.memory_spa, vm.memory_bytes
        self._hostile = True
        self._prefix = learn(self, self._to_the_handler, self.back)
        self._handler_pages = self._code_pages()
        return self.before

    def _code_pages(self) -> frozenset[int]:
        """Where the code lies that runs when nobody lies."""
        self.play(())
        found = set()
        for edge in self._trace.edges():
            try:
                _, place = self.machine.access.guest_linear(self.vcpu, self._trace.address_of(edge), 0)
            except FaultUnwind:
                continue  # it was mapped by what the run went on to
            found.add(place.spa >> PAGE_SHIFT)
        return frozenset(found)

    def back(self) -> None:
        """To the start."""
        self._snapshot.restore()
        self._clear()
        self._trace.begin()

    def _to_the_handler(self) -> bool:
        """Until the #VC of the interrupted instruction is delivered; False: it raises none."""
        self._trace.skip(self.before.rip)
        self._stop_at_handler = True
        self.run()
        self._stop_at_handler = False
        self._natural = self._served[0][0] if self._served else 0
        return self._first == self.before.rip

    # One input --------------------------------------------------------------------------------------------------------

    def play(self, steps: Sequence[Record]) -> Ended:
        """Run one input; what it showed is in `findings`, `requests` and `texts` until the next."""
        self.back()
        self._steps = iter(steps)
        if self._prefix is not None and (not steps or isinstance(steps[0], Schedule)):
            next(self._steps, None)
            self._prefix.take(self)
            self._served.append((self._natural, True))
        else:
            self._guard(self._first_entry)
            if self.vcpu.regs.rip == self.before.rip:
                self._trace.skip(self.before.rip)
        ended = self.run()
        self._judge_shared()
        return ended

    def run(self) -> Ended:
        """Until the handler has returned, or cannot."""
        if not self._hostile:
            return super().run()
        engine, vcpu, trace = self.engine, self.vcpu, self._trace
        assert engine is not None  # `start` looked
        while self.ended is None:
            if vcpu.stopped:
                self.end(self.machine.vm_of(vcpu).stopped)
            elif vcpu.halted:
                self.end("halted")
            elif not engine.run(BUDGET):
                fault, self.mmu.fault = self.mmu.fault, None
                self._code = NO_CODE
                self._reports += 1
                if self._reports > self._most_reports:
                    self.end("faults without end")
                elif fault is not None:
                    self._guard(lambda fault=fault: self.raise_fault(native.exactly(self, fault)))  # type: ignore[misc]
            elif trace.take_stop():
                self._guard(self._stopped_at_a_block)
            elif self.ended is None and not (vcpu.stopped or vcpu.halted):
                self.end("no end in sight")
                self.find_crash("loop", f"the guest runs on at {self.name_of(vcpu.regs.rip)} and does not exit")
        ended = self.ended
        assert ended is not None
        return ended

    def _stopped_at_a_block(self) -> None:
        regs = self.vcpu.regs
        answer = self.marks.get(regs.rip)
        if answer is not None and answer(self):
            regs.rip = int.from_bytes(self.machine.access.guest_read(self.vcpu, regs.rsp, 8), "little")
            regs.rsp = regs.rsp + 8 & MASK64
            regs.rax = 0
        elif answer is None and not self._came_back():
            self._trace.skip(regs.rip)

    # The hypervisor ---------------------------------------------------------------------------------------------------

    def _first_entry(self) -> None:
        self._next_steps()
        if self.vcpu.vmcb.event_inj & EVENT_VALID:
            self.leave(ExitCode.INTR, 0, 0, 0)  # an interrupt of the host gives it the guest before the instruction

    def _guard(self, report: Callable[[], None]) -> None:
        """As ever, but a fault may be followed by another, when the hypervisor took away what deliveries need."""
        for _ in range(MAX_FAULTS):
            try:
                report()
            except FaultUnwind as unwind:
                report = partial(self.raise_fault, unwind.fault)
            else:
                return
        self.end("faults without end")

    def _next_steps(self) -> None:
        """What the hypervisor does before it enters the guest."""
        vcpu_id, apply = self.vcpu.vcpu_id, self.machine.apply
        for step in self._steps:
            if isinstance(step, Schedule):
                return
            if isinstance(step, VmcbWrite):
                if step.offset == EVENT_INJ and len(step.data) == 8:
                    apply(VmcbWrite(vcpu_id, EVENT_INJ, step.data))
            elif isinstance(step, NptEdit):
                self._map(step)
            elif isinstance(step, (sev_es.ForgeReply, sev_es.ForgeMsr)):
                self._lies.append(step)

    def _map(self, step: NptEdit) -> None:
        """One page of the guest elsewhere in its memory, or nowhere; more would be the hypervisor's own end."""
        unmap = step.flags & MapFlag.UNMAP
        inside = 0 <= step.spa - self._memory_spa < self._memory_bytes
        if step.page_bytes != PAGE_BYTES or step.gpa >= self._memory_bytes or not (unmap or inside):
            return
        if isinstance(self.machine.apply(step._replace(vm=self.vcpu.vm_id)).records[0], Done):
            self._inflicted, self._most_reports = True, MAX_REPORTS_INFLICTED
            self._tampered |= not unmap

    def exit(self, exit_code: int, exit_info_1: int) -> None:
        """See `EngineSink`; so many and no more."""
        if self._hostile:
            self._reports += 1
            if self._reports > self._most_reports:
                self.end("many exits")
                return
        super().exit(exit_code, exit_info_1)

    def _slice(self) -> int:
        """No timer ends a run of an input."""
        return BUDGET if self._hostile else super()._slice()

    def _pass_time(self) -> None:
        """Time is no input here: it passes without a step."""
        if not self._hostile:
            super()._pass_time()
            return
        self.now()
        ticks, self.pending_ticks = self.pending_ticks, 0
        self.machine.clock.advance(ticks)

    def count(self, code: int, info_1: int) -> None:
        if self._hostile:
            self.exits[code] += 1  # who wants more of a run plays it again
        else:
            super().count(code, info_1)

    # What the guest does ----------------------------------------------------------------------------------------------

    def vmgexit(self) -> None:
        if self._hostile:
            self._ask()
            self._next_steps()
        super().vmgexit()
        if self._hostile:
            self._look_at_reply()

    def _look_at_reply(self) -> None:
        """Lie in the reply before the guest looks at it; a reply that asks for an exception inflicts one."""
        vmcb, memory = self.vcpu.vmcb, self.machine.memory
        lies, self._lies = self._lies, []
        by_msr = vmcb.ghcb_gpa & PAGE_MASK
        spa = None if by_msr else self.machine.access.translate_gpa(self.vcpu, vmcb.ghcb_gpa)
        for lie in lies:
            if isinstance(lie, sev_es.ForgeMsr):
                vmcb.ghcb_gpa = lie.value if by_msr else vmcb.ghcb_gpa
            elif spa is not None and lie.offset + len(lie.data) <= PAGE_BYTES:
                memory.write(spa + lie.offset, lie.data, None, TAG_HYPERVISOR)
        if spa is not None and memory.read(spa + INFO_1_AT, 4, None) == EXCEPTION_ASKED:
            self._inflicted = True

    def _follow(self, outcome: Outcome) -> None:
        if self._hostile:
            for record in outcome.records:
                if isinstance(record, sev_es.VcDelivered):
                    self._served.append((record.error_code, True))
                    self._first = self._first or self.vcpu.regs.rip
                elif isinstance(record, Injected):
                    self._note_injected(record.event)
        super()._follow(outcome)
        if self._stop_at_handler and self._served:
            self.end("at the handler")

    def _note_injected(self, word: int) -> None:
        """An event that the hypervisor made up: a #VC claims an exit code, anything else is inflicted."""
        if word & 0xFF != Vector.VC or not word & EVENT_ERROR_VALID:
            self._inflicted = True
            return
        self._claimed = True
        code = word >> 32 & MASK32
        try:
            insn = sev_es.decode_vc(self.fetch(), native.code_bits(self.vcpu))
        except FaultUnwind:
            insn = None
        if insn is not None and code in sev_es.VC_MNEMONICS and sev_es.may_raise(insn, code):
            self._served.append((code, self.vcpu.system.cpl == 0))

    def raise_fault(self, fault: Fault) -> None:
        if self._hostile and fault.vector == ExitCode.NPF:
            fault = fault._replace(error_code=fault.error_code | NpfError.RSVD)
        super().raise_fault(fault)

    def exception(self, vector: int, error_code: int = 0, address: int = 0) -> None:
        if self._hostile:
            self._faults += 1
            regs = self.vcpu.regs
            kernel = self.vcpu.system.cpl == 0
            if kernel and regs.rip not in self.expected_faults:
                what = f"exception {vector} ({error_code:#x})"
                self.find_crash("kernel-fault", f"{what} at {self.name_of(regs.rip)}, address {address:#x}")
            if self._faults > MAX_FAULTS:
                self.end("faults without end")
                return
        super().exception(vector, error_code, address)

    def deliver(self, word: int, *, next_rip: int | None = None) -> None:
        super().deliver(word, next_rip=next_rip)
        if self._hostile and self.vcpu.stopped:
            self.find_crash("kernel-fault", f"a triple fault at {self.name_of(self.vcpu.regs.rip)}")

    # Oracles ----------------------------------------------------------------------------------------------------------

    def _find(self, rule: str, message: str) -> None:
        handler = f"{self._served[-1][0]:#x}" if self._served else "none"
        self.findings.append(Finding(ORACLE, rule, message, handler, self.before.mnemonic))

    @property
    def claimed(self) -> bool:
        """Whether the hypervisor made up a #VC: to raise an exception then is to refuse it."""
        return self._claimed

    def find_crash(self, rule: str, message: str) -> None:
        """A finding, unless the hypervisor did what no guest withstands."""
        if not (self._inflicted or self._tampered):
            self._find(rule, message)

    def _ask(self) -> None:
        """The guest shows its hypervisor a request."""
        vcpu = self.vcpu
        msr = vcpu.vmcb.ghcb_gpa
        where = vcpu.regs.rip
        if msr & PAGE_MASK:
            request = Request(False, msr, 0, 0, where)
            if msr & MSR_INFO == MSR_CPUID_REQUEST:
                self._judge_code(ExitCode.CPUID, where)
        else:
            spa = self.machine.access.translate_gpa(vcpu, msr)
            page = b"" if spa is None else self.machine.memory.read(spa & -PAGE_BYTES, PAGE_BYTES, None)
            words = memoryview(page)[CODE_AT : CODE_AT + 24].cast("Q") if page else (0, 0, 0)
            request = Request(True, words[0], words[1], words[2], where)
            if words[0] in MMIO_CODES:
                self._judge_mmio(request)
            else:
                self._judge_code(words[0], where)
            self._judge_bytes(page, "the GHCB")
        last = self.requests[-1] if self.requests else None
        self._same = self._same + 1 if request == last else 0
        self.requests.append(request)
        if self._same > MAX_SAME:
            self.end("the same request again and again")
            self.find_crash("loop", f"the same request {request.code:#x} {MAX_SAME} times from {self.name_of(where)}")
        elif len(self.requests) > MAX_EXITS:
            self.end("many exits")

    def _judge_code(self, code: int, where: int) -> None:
        """A request must be what an interrupted instruction means, on behalf of code that may do that."""
        if code not in sev_es.VC_MNEMONICS or self._tampered or not (self._served or self._claimed):
            return
        allowed = [may for known, may in self._served if known == code]
        if not allowed:
            message = f"asks for {code:#x} from {self.name_of(where)}, which the interrupted instruction does not mean"
            self._find("request", message)
        elif code in PRIVILEGED and not any(allowed):
            self._find("privilege", f"asks for {code:#x} from {self.name_of(where)} on behalf of user code")

    def _judge_mmio(self, request: Request) -> None:
        """Memory that the guest shares is none of its own: what lies there the hypervisor sees anyway."""
        if request.info_1 >= self._memory_bytes or self._tampered:
            return
        page = self.machine.memory.pages.get(self._memory_spa + request.info_1 >> PAGE_SHIFT)
        if page is not None and page.key is not None:
            where = self.name_of(request.rip)
            self._find("private-mmio", f"a device access to the guest's own memory at {request.info_1:#x} from {where}")

    def _judge_bytes(self, page: bytes, where: str) -> None:
        page = page.replace(ZEROS, b"")  # a page is mostly that, and no secret has any
        for what, secret in self._secrets:
            if secret in page and what not in self._shown:
                self._shown.add(what)
                self._find("leak", f"{where} shows {what}")

    def _judge_shared(self) -> None:
        """Secrets in whatever else lies in the open."""
        pages = self.machine.memory.pages
        for pfn in self.machine.memory.written():
            page = pages.get(pfn)
            if page is not None and page.key is None:
                self._judge_bytes(bytes(page.data), f"the page at {pfn << PAGE_SHIFT:#x}")

    def _came_back(self) -> bool:
        """Whether the guest is back in the interrupted code, at the stack it had; if so, judge what it brings."""
        before, vcpu = self.before, self.vcpu
        regs = vcpu.regs
        if vcpu.system.cpl != before.cpl or not 0 <= regs.rsp - before.registers[RSP] < PAGE_BYTES:
            return False
        if regs.rip not in (before.rip, before.rip + before.length & MASK64):
            self.end("an exception for the interrupted code")
            return True
        self.end("returned")
        if self._tampered:
            return True
        for rule, message in changed_registers(before, vcpu):
            self._find(rule, message)
        memory = self.machine.memory
        for span in before.spans:
            if memory.read(span.spa, len(span.data), span.key) != span.data:
                self._find("memory", f"{span.what} changed")
        for pfn in self._handler_pages.intersection(memory.written()):
            if differs(memory, pfn):
                self._find("memory", f"code of the handler, in the page at {pfn << PAGE_SHIFT:#x}, changed")
        return True
