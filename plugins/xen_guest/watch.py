"""Watch a kernel talk to Xen, and help it over what encryption breaks when asked to.

Every hypercall is noted where it is made: the VMMCALL itself and, since kernels make them through a stub, the code that
called the stub. Of pages that Xen uses too the place is the hypercall that made the page known. With `adapt` the guest
gets what its kernel lacks: arguments in the GHCB, its linear buffers (`xen`'s option of that name), and those pages as
if it had mapped them shared. A kernel that does these things itself is left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sevlab.core.cpu import CONTROL_SEV_ES, FaultUnwind
from sevlab.core.events import CpuExit
from sevlab.core.memory import TAG_PUBLIC
from sevlab.core.svm import ExitCode
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins.engines import Symbols
from sevlab.plugins.sev_es import Ghcb, GhcbReply, Vmgexit
from sevlab.plugins.xen import (
    Adapted,
    Domain,
    Hypercalled,
    HypercallPage,
    SharedPage,
    Survival,
    after_firmware,
    domain_of,
    shared_pages,
)
from sevlab.plugins.xen_guest.breaks import Reason, breaks_linear, replacement, row_of

if TYPE_CHECKING:
    from sevlab.core.vocabulary import Outcome, Record
    from sevlab.plugins.engines import Booted

ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8")
VMMCALL_EVENT = int(ExitCode.VMMCALL)
MISSING_INPUT = (2, 4)
"""SW_EXITINFO1 and SW_EXITINFO2 of a refusal. Source: 56421, 4.1.8."""


class Place:
    """Where in the kernel something is done."""

    __slots__ = ("caller", "rip")

    def __init__(self, rip: int, caller: int) -> None:
        self.rip, self.caller = rip, caller


class Step:
    """One thing that the kernel does with Xen, from one place."""

    def __init__(self, name: str, place: Place) -> None:
        self.name, self.place = name, place
        self.count = 0
        self.result: int | None = None
        self.broken: dict[Reason, str] = {}
        """Reasons, with what takes the step's place."""

    def breaks(self, reason: Reason, instead: str = "") -> None:
        """Note a reason."""
        self.broken.setdefault(reason, instead or reason.value.instead)


class XenGuestWatch:
    """Takes the place of the execution's `apply`."""

    def __init__(self, booted: Booted, *, adapt: bool = False, symbols: Symbols | None = None) -> None:
        self.machine, self.execution, self.vcpu = booted.machine, booted.execution, booted.execution.vcpu
        self.adapt, self.symbols = adapt, symbols or Symbols()
        domain = domain_of(self.machine, self.vcpu)
        assert domain is not None  # the machine has Xen
        self.domain: Domain = domain
        self.steps: dict[tuple[str, int], Step] = {}
        self._c_bit = self.machine.vm_of(self.vcpu).c_bit_mask
        self._call: tuple[int, tuple[int, ...], Place] = (0, (), Place(0, 0))
        self._msr = Place(0, 0)
        self._pages: dict[int, tuple[SharedPage, Place]] = {}
        self._apply = self.execution.apply
        self.execution.apply = self.apply
        if self._c_bit:
            self.execution.mmu.private = self.reached_privately
        after_firmware(self.machine, self.vcpu)
        self._look_at_pages()

    # What happens ---------------------------------------------------------------------------------------------------

    def apply(self, step: Record) -> Outcome:
        """A step of the guest's, and what Xen makes of it."""
        if isinstance(step, CpuExit) and step.exit_code == VMMCALL_EVENT:
            self._note_call()
        elif isinstance(step, CpuExit) and step.exit_code == ExitCode.MSR:
            self._msr = Place(self.vcpu.regs.rip, 0)
        elif isinstance(step, Vmgexit) and self.adapt and not step.ghcb_msr & PAGE_MASK:
            self._pass_registers(step.ghcb_msr)
        outcome = self._apply(step)
        changed = False
        for record in outcome.records:
            if isinstance(record, Hypercalled):
                changed = True
                self._hypercalled(record)
            elif isinstance(record, HypercallPage):
                self._hypercall_page()
            elif isinstance(record, Adapted) and record.what == "buffer":
                self._linear()
            elif (
                isinstance(record, GhcbReply)
                and record.exit_code == VMMCALL_EVENT
                and (record.info_1, record.info_2) == MISSING_INPUT
            ):
                missing = self._current()
                missing.count += 1
                missing.breaks(Reason.REGISTERS)
        if changed:
            self._look_at_pages()
        return outcome

    def _note_call(self) -> None:
        """VMMCALL: what is in the registers, and where it is."""
        regs = self.vcpu.regs
        place = Place(regs.rip, self._return_address())
        self._call = (regs.rax, tuple(getattr(regs, name) for name in ARGUMENTS), place)

    def _return_address(self) -> int:
        """What is on top of the stack: hypercalls are made by a stub of their own."""
        try:
            return int.from_bytes(self.machine.access.guest_read(self.vcpu, self.vcpu.regs.rsp, 8), "little")
        except FaultUnwind:
            return 0

    def _current(self) -> Step:
        """The step of the hypercall that is under way."""
        number, _, place = self._call
        row = self._row()
        name = f"hypercall {number}" if row is None else row.name
        return self.steps.setdefault((name, place.caller), Step(name, place))

    def _hypercalled(self, record: Hypercalled) -> None:
        step = self._current()
        step.count += 1
        step.result = record.result
        row = self._row()
        if self._c_bit and row is not None and breaks_linear(row):
            self._linear()

    def _row(self) -> Survival | None:
        """What is known of the hypercall that is under way."""
        number, arguments, _ = self._call
        return row_of(number, arguments[0] if arguments else 0)

    def _linear(self) -> None:
        """Its buffer is at a linear address."""
        row = self._row()
        self._current().breaks(Reason.LINEAR, "" if row is None else replacement(row))

    def _hypercall_page(self) -> None:
        """A WRMSR of the guest's: by the time that Xen serves it, an SEV-ES guest is in its #VC handler."""
        step = self.steps.setdefault(("hypercall page", self._msr.rip), Step("hypercall page", self._msr))
        step.count += 1
        if self._c_bit:
            step.breaks(Reason.HYPERCALL_PAGE)

    def _pass_registers(self, gpa: int) -> None:
        """What a `sev_es_hcall_prepare` of Xen's would put into the GHCB."""
        window = self.machine.access.shared_window(self.vcpu, gpa, PAGE_BYTES)
        if window is None:
            return
        ghcb: Any = Ghcb(window)
        shown = Ghcb.from_bytes(window.read(0, PAGE_BYTES))
        if shown.value_or_zero("sw_exit_code") != VMMCALL_EVENT or shown.is_valid("rdi"):
            return
        self._current().breaks(Reason.REGISTERS)
        for name, value in zip(ARGUMENTS, self._call[1], strict=False):
            setattr(ghcb, name, value)

    # Pages ----------------------------------------------------------------------------------------------------------

    def _look_at_pages(self) -> None:
        """Note the pages that Xen uses from now on; private memory among them breaks what registered it."""
        added = [page for page in shared_pages(self.machine, self.domain) if page.gfn not in self._pages]
        for page in added:
            self._pages[page.gfn] = (page, self._call[2])
            if self._c_bit and page.own:
                self._step_of(page, self._call[2]).breaks(Reason.OWN_PAGE)
                if self.adapt:
                    self._make_shared(page)
        if added and self._c_bit:
            self.execution.mmu.forget()

    def _step_of(self, page: SharedPage, place: Place) -> Step:
        step = self.steps.setdefault((page.name, place.caller), Step(page.name, place))
        step.count = max(step.count, 1)
        return step

    def _make_shared(self, page: SharedPage) -> None:
        """Turn a private page into a shared one of the same contents, with what Xen has written there."""
        spa = self.machine.access.translate_gpa(self.vcpu, page.gfn << PAGE_SHIFT)
        if spa is None:
            return
        memory = self.machine.memory
        contents = bytearray(memory.read(spa, PAGE_BYTES, self.machine.access.key_of(self.vcpu.asid, c_bit=True)))
        for offset, length in page.areas:
            contents[offset : offset + length] = memory.read(spa + offset, length, None)
        memory.write(spa, bytes(contents), None, TAG_PUBLIC)

    def reached_privately(self, gpa: int) -> bool:
        """The guest reaches a page with the C-bit set: whether it stays private."""
        found = self._pages.get(gpa >> PAGE_SHIFT)
        if found is None:
            return True
        page, place = found
        if not page.own:
            self._step_of(page, place).breaks(Reason.PRIVATE)
        return not self.adapt

    # What to tell ---------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Everything, as data."""
        return {
            "adapted": self.adapt,
            "encrypted": bool(self._c_bit),
            "es": bool(self.vcpu.vmcb.encryption_control & CONTROL_SEV_ES),
            "hypercalls": sum(step.count for step in self.steps.values() if step.result is not None),
            "steps": [self._data(step) for step in self.steps.values()],
        }

    def _data(self, step: Step) -> dict[str, Any]:
        place = step.place
        return {
            "step": step.name,
            "count": step.count,
            "result": None if step.result is None else _signed(step.result),
            "rip": f"{place.rip:#x}",
            "symbol": self.symbols.name(place.rip),
            "caller": f"{place.caller:#x}",
            "caller_symbol": self.symbols.name(place.caller),
            "breaks": [{"why": reason.value.why, "instead": instead} for reason, instead in step.broken.items()],
        }

    def lines(self) -> list[str]:
        """The same to read: what works in one list, and what breaks in a list to work off."""
        steps = list(self.steps.values())
        broken = [step for step in steps if step.broken]
        lines = ["", f"Xen: steps {len(steps)}, taken {sum(step.count for step in steps)} times"]
        lines += [f"  {self._line(step)}" for step in steps if not step.broken]
        if not broken:
            return lines
        lines.append(f"\nbreaks under encryption, {'and was done for the kernel' if self.adapt else 'as it did here'}:")
        reasons = [reason for reason in Reason if any(reason in step.broken for step in broken)]
        for reason in reasons:
            lines.append(f"\n  {reason.value.why}")
            if reason.value.instead:
                lines.append(f"  instead: {reason.value.instead}")
            for step in broken:
                if reason in step.broken:
                    lines.append(f"    {self._line(step)}")
                    if not reason.value.instead and step.broken[reason]:
                        lines.append(f"           instead: {step.broken[reason]}")
        return lines

    def _line(self, step: Step) -> str:
        place = step.place
        at = self.symbols.name(place.caller) or f"{place.caller:#x}" if place.caller else ""
        stub = self.symbols.name(place.rip) or f"{place.rip:#x}"
        where = f"{at} by {stub}" if at else stub if place.rip else "before the first instruction"
        result = "" if step.result is None else f" -> {_signed(step.result)}"
        return f"{step.count:>5}  {step.name}{result}  {place.caller or place.rip:#x} {where}"


def _signed(value: int) -> int:
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value
