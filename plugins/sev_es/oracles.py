"""Oracles of SEV-ES: what a hypervisor keeps of an encrypted vCPU, and what the reference guest lets itself be told."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from sevlab.core.access import CPL_USER
from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.events import CpuExit, Injected, VmExit
from sevlab.core.oracle import Finding, Oracle
from sevlab.core.svm import EVENT_VALID, ExitCode
from sevlab.core.units import PAGE_MASK
from sevlab.core.vocabulary import Outcome, Record, spec_of
from sevlab.plugins.sev_es.ghcb import NaeCode
from sevlab.plugins.sev_es.insn import MNEMONICS, decode
from sevlab.plugins.sev_es.records import GhcbRequest, VcDelivered
from sevlab.plugins.sev_es.states import vm_protocol

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

X87, SSE, AVX = 1, 2, 4


class VcpuInvariants:
    """What the hypervisor keeps of an encrypted vCPU is architecturally possible."""

    name = "sev_es.vcpu"
    after = ("sev_es.vmgexit",)
    documentation = (
        "XCR0 that a guest reports has x87 set, AVX only with SSE (not judged of SNP guests); a vCPU that runs under"
        " SEV-ES, or whose VMRUN was tried, has a save area at an aligned address of memory other than 0: one that was"
        " taken away stays asleep. Source: 24594, XSETBV; 24593, 15.35 (VMRUN); Linux sync of XCR0 from the GHCB, and"
        " pre_sev_run."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        vcpu, kind = machine.vcpus.get(step[0]), spec_of(step).kind
        found = [] if vcpu is None else self._judge(machine, vcpu, kind, runs=not (vcpu.stopped or vcpu.halted))
        for record in outcome.records:
            if isinstance(record, VmExit) and record.exit_code == ExitCode.INVALID:
                found += self._judge(machine, machine.vcpus[record.vcpu], kind, runs=True)
        return tuple(dict.fromkeys(found))

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        """Whether a vCPU has a save area was judged when it ran: one that was never entered may have none yet."""
        judged = [self._judge(machine, vcpu, "", runs=False) for vcpu in machine.vcpus.values()]
        return tuple(finding for found in judged for finding in found)

    def _judge(self, machine: Machine, vcpu: Vcpu, handler: str, *, runs: bool) -> list[Finding]:
        xcr0, vmcb = vcpu.system.xcr0, vcpu.vmcb
        found = []
        own = vm_protocol(machine, vcpu).snp  # whose guest makes save areas itself, with any XCR0
        if not own and (not xcr0 & X87 or (xcr0 & AVX and not xcr0 & SSE)):
            found.append(Finding(self.name, "xcr0", f"vCPU {vcpu.vcpu_id}: XCR0 is {xcr0:#x}", handler))
        if runs and vmcb.encryption_control & CONTROL_SEV_ES and not has_save_area(machine, vcpu):
            message = f"vCPU {vcpu.vcpu_id} runs with a save area at {vmcb.vmsa_pa:#x}"
            found.append(Finding(self.name, "vmsa", message, handler))
        return found


def has_save_area(machine: Machine, vcpu: Vcpu) -> bool:
    """Whether the VMCB names a page of memory; page 0 is nobody's."""
    spa = vcpu.vmcb.vmsa_pa
    return not spa & PAGE_MASK and 0 < spa < machine.memory.size_bytes


class PrivateMmio:
    """The reference guest never asks for a device access to its own private memory."""

    name = "sev_es.private-mmio"
    documentation = (
        "A #VC handler does not emulate an access to memory that is the guest's own: the hypervisor would see, or give,"
        " what is private. Source: edk2 85b8eac59b; arXiv 2010.07094; Linux vc_do_mmio."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        findings = []
        for record in outcome.records:
            if isinstance(record, GhcbRequest) and record.exit_code in {NaeCode.MMIO_READ, NaeCode.MMIO_WRITE}:
                vm = machine.vm_of(machine.vcpus[record.vcpu])
                if record.info_1 < vm.memory_bytes:
                    message = f"a device access to private memory at {record.info_1:#x}"
                    findings.append(Finding(self.name, "private", message, f"{record.exit_code:#x}"))
        return tuple(findings)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class VcProvenance:
    """The reference guest asks its hypervisor only for what its own instruction means, and user code gets no kernel's.

    The instruction is the step's, which the hypervisor does not choose; the claimed code is.
    """

    name = "sev_es.provenance"
    after = ("exit",)
    documentation = (
        "A #VC handler sends a request only when the bytes at RIP are an instruction that can raise this exit code, and"
        " for user space (CPL 3) none for a port or for device memory: user space has no permission for either."
        " Source: Linux vc_check_opcode_bytes (CVE-2024-25742), vc_ioio_check and the refusal of user-mode MMIO"
        " (CVE-2023-46813); edk2 VmgExitLib."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        if not isinstance(step, CpuExit) or outcome.first(VcDelivered) is None:
            return ()
        request = outcome.first(GhcbRequest)
        expected = MNEMONICS.get(step.exit_code)
        vcpu = machine.vcpus.get(step.vcpu)
        if request is None or vcpu is None:
            return ()
        if vcpu.system.cpl == CPL_USER:
            asked = next((made for made in requests_of(outcome, step.vcpu) if made.exit_code in KERNEL_ONLY), None)
            if asked is not None:
                message = f"user space got a request of {asked.exit_code:#x} at {asked.info_1:#x}"
                return (Finding(self.name, "privilege", message, f"{asked.exit_code:#x}"),)
        if expected is None:
            return ()
        sixty_four = vcpu.system.cs[1] & 0x200 and vcpu.system.efer & 0x100
        insn = decode(step.insn[:15], 64 if sixty_four else 32 if vcpu.system.cs[1] & 0x400 else 16)
        if insn is not None and insn.mnemonic in expected:
            return ()
        found = "no instruction" if insn is None else insn.mnemonic
        message = f"#VC {step.exit_code:#x} was served at {found}"
        return (Finding(self.name, "opcode", message, f"{step.exit_code:#x}"),)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


KERNEL_ONLY = frozenset((ExitCode.IOIO, NaeCode.MMIO_READ, NaeCode.MMIO_WRITE))
"""Requests that a #VC handler makes for the kernel alone: user space has neither an I/O bitmap nor device memory."""


def requests_of(outcome: Outcome, vcpu_id: int) -> tuple[GhcbRequest, ...]:
    """The requests by the page that a vCPU's guest made in a step."""
    return tuple(record for record in outcome.records if isinstance(record, GhcbRequest) and record.vcpu == vcpu_id)


class EventProvenance:
    """An event reaches an encrypted guest as what it was injected as.

    Remembers, from one step to the next, what each VMCB asks for.
    """

    name = "sev_es.event"
    documentation = (
        "An event that waits in EVENTINJ is delivered with the type that it was injected with, or not at all: an"
        " interrupt is no software interrupt, which only an INT instruction of the guest's own makes."
        " Source: 24593, 15.20 and 15.35.7; CVE-2024-25744 (Heckler), Linux b82a8dbd3d2f."
    )

    def __init__(self) -> None:
        self._waiting: WeakKeyDictionary[Machine, dict[int, int]] = WeakKeyDictionary()

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        waited = self._waiting.get(machine)
        findings = []
        if waited:
            for record in outcome.records:
                if isinstance(record, Injected) and record.vcpu in waited:
                    asked = waited[record.vcpu]
                    if asked & 0xFF == record.event & 0xFF and (asked ^ record.event) & 0x700:
                        message = f"vector {asked & 0xFF:#x} injected as type {asked >> 8 & 7}"
                        message += f" arrived as type {record.event >> 8 & 7}"
                        findings.append(Finding(self.name, "type", message, spec_of(step).kind))
        waits = {
            vcpu_id: vcpu.vmcb.event_inj
            for vcpu_id, vcpu in machine.vcpus.items()
            if vcpu.vmcb.event_inj & EVENT_VALID and vcpu.vmcb.encryption_control & CONTROL_SEV_ES
        }
        if waits or waited:
            self._waiting[machine] = waits
        return tuple(findings)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        self._waiting.pop(machine, None)
        return ()


ORACLES: tuple[Oracle, ...] = (VcpuInvariants(), VcProvenance(), PrivateMmio(), EventProvenance())
