"""What fuzzing of hypercalls needs, as data: a target, coordinates of state, and oracles.

The bounds of masks and arrays are watched by the buffers themselves: `VpMask` and every shared window refuse to be
left, and a violation is a finding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.events import CpuExit, MemoryWrite, Party, SetRegisters, Space
from sevlab.core.hypercall import CodeMode, code_mode
from sevlab.core.oracle import Finding, Oracle, StateCounter, Target
from sevlab.core.payload import Message, Payload
from sevlab.core.svm import ExitCode
from sevlab.core.vocabulary import spec_of
from sevlab.plugins.xen import grants
from sevlab.plugins.xen.arguments import HvFlush, HvFlushEx, HvSendIpiEx
from sevlab.plugins.xen.dispatch import CLIPPED
from sevlab.plugins.xen.hypercalls.event_channel import valid
from sevlab.plugins.xen.hypercalls.table import TABLE
from sevlab.plugins.xen.numbers import HYPERV_FLAG, MEMOP_EXTENT_SHIFT, HvCall, Nr
from sevlab.plugins.xen.records import Hypercalled, HypercallStep
from sevlab.plugins.xen.state import ChannelState, Domain, xen

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.core.vocabulary import Outcome, Record


class RegisterClip:
    """After a hypercall from 32-bit code no clipped register has bits above 31. Source: Xen XSA-454."""

    name = "xen.register-clip"
    documentation = (
        "A hypercall from 16- or 32-bit code sees and leaves registers of 32 bits: upper halves that a guest prepared"
        " in 64-bit code reach neither handlers nor continuations. Source: XSA-454, hvm_sanitize_regs_fields."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        called = outcome.first(Hypercalled)
        vcpu = None if called is None else machine.vcpus.get(called.vcpu)
        if called is None or vcpu is None or vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
            return ()
        if code_mode(vcpu) is CodeMode.BITS_64:
            return ()
        judged = [name for name in CLIPPED if name != "rip"]  # which the end of the instruction moves
        wide = [name for name in judged if getattr(vcpu.regs, name) >> 32]
        if not wide:
            return ()
        message = f"hypercall {called.number}: {', '.join(wide)} wider than 32 bits"
        return (Finding(self.name, "wide", message, spec_of(step).kind),)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class ContinuationProgress:
    """A preempted call is the same call afterwards, and further on. Source: Xen xen/arch/x86/hypercall.c."""

    name = "xen.continuation"
    documentation = (
        "A continuation leaves RAX with the number of the call that was preempted, and a step that repeats a preempted"
        " call ends. Source: hypercall_create_continuation."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        calls = [record for record in outcome.records if isinstance(record, Hypercalled)]
        if not calls or not isinstance(step, HypercallStep):
            return ()
        findings = []
        for before, after in pairwise(calls):
            if before.preempted and after.number != before.number:
                message = f"call {before.number} was preempted and came back as {after.number}"
                findings.append(Finding(self.name, "number", message, spec_of(step).kind))
        last = calls[-1]
        vcpu = machine.vcpus.get(last.vcpu)
        if last.preempted and vcpu is not None and last.number == Nr.MEMORY_OP:
            command = vcpu.regs.rdi if code_mode(vcpu) is CodeMode.BITS_64 else vcpu.regs.rbx
            if not vcpu.vmcb.encryption_control & CONTROL_SEV_ES and not command >> MEMOP_EXTENT_SHIFT:
                message = f"memory_op {command:#x} was preempted without progress"
                findings.append(Finding(self.name, "progress", message, spec_of(step).kind))
        return tuple(findings)

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class ChannelInvariants:
    """Both ends of every connection agree, and each VIRQ and PIRQ names its port."""

    name = "xen.channels"
    documentation = (
        "An interdomain channel's other end is an interdomain channel that points back; a port bound to a VIRQ or a"
        " PIRQ is the one recorded for it; every port is valid and notifies a vCPU that exists."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        if outcome.first(Hypercalled) is None:
            return ()
        return tuple(
            Finding(self.name, "inconsistent", message, spec_of(step).kind) for message in self._wrong(machine)
        )

    def _wrong(self, machine: Machine) -> list[str]:
        domains = xen(machine).domains
        wrong = []
        for domain in domains.values():
            for port, channel in domain.channels.items():
                where = f"port {port} of domain {domain.domid}"
                if not valid(domain, port) or channel.vcpu >= len(domain.vcpus):
                    wrong.append(f"{where} is past its table or its vCPU")
                if channel.state is ChannelState.INTERDOMAIN and not channel.backend:
                    far = domains[channel.remote_domid].channels.get(channel.remote_port)
                    if far is None or (far.state, far.remote_domid, far.remote_port) != (
                        ChannelState.INTERDOMAIN,
                        domain.domid,
                        port,
                    ):
                        wrong.append(f"{where} is connected to a port that does not point back")
                elif channel.state is ChannelState.PIRQ and domain.pirq_ports.get(channel.number) != port:
                    wrong.append(f"{where} is not the port of its PIRQ")
                elif channel.state is ChannelState.VIRQ and not any(
                    vcpu.virqs.get(channel.number) == port for vcpu in domain.vcpus
                ):
                    wrong.append(f"{where} is not the port of its VIRQ")
        return wrong

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


class GrantInvariants:
    """Uses of grants add up: every mapping is counted, and nothing else is."""

    name = "xen.grants"
    documentation = (
        "Between hypercalls a grant is in use exactly as often as it is mapped; every reference in use lies in its"
        " table; every mapping leads to a reference in use by the mapping's domain, and to the page it pins."
    )

    def step_end(self, machine: Machine, step: Record, outcome: Outcome) -> tuple[Finding, ...]:
        if outcome.first(Hypercalled) is None:
            return ()
        return tuple(Finding(self.name, "count", message, spec_of(step).kind) for message in self._wrong(machine))

    def _wrong(self, machine: Machine) -> list[str]:
        domains = xen(machine).domains
        uses: dict[tuple[int, int], int] = {}
        wrong = []
        for domain in domains.values():
            for handle, mapping in domain.grants.maptrack.items():
                uses[mapping.domid, mapping.ref] = uses.get((mapping.domid, mapping.ref), 0) + 1
                active = domains[mapping.domid].grants.active.get(mapping.ref)
                if active is None or active.domid != domain.domid or active.spa != mapping.spa:
                    wrong.append(f"handle {handle} of domain {domain.domid} maps a grant that is not in use")
        for domain in domains.values():
            for ref, active in domain.grants.active.items():
                count = active.readers + active.writers
                if count != uses.get((domain.domid, ref), 0) or ref >= grants.entries(domain.grants):
                    wrong.append(f"grant {ref} of domain {domain.domid} is used {count} times")
        return wrong

    def sequence_end(self, machine: Machine) -> tuple[Finding, ...]:
        return ()


PARAMETERS_GPA = 0x30000
"""Where a guest puts the parameters of a Hyper-V call."""


def _hyperv_seeds(_machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """An interrupt for two processors and a flush for them, by a sparse set of one bank; and a flush for all."""
    bank = (0b11).to_bytes(8, "little")
    calls = (
        (HvCall.SEND_IPI_EX, HvSendIpiEx.build(vector=0x40, valid_bank_mask=1) + bank),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, HvFlushEx.build(valid_bank_mask=1) + bank),
        (HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE, HvFlush.build(flags=1)),
    )
    return tuple(
        (
            MemoryWrite(Party.GUEST, 0, Space.GPA, PARAMETERS_GPA, False, parameters),
            SetRegisters(0, (("rax", HYPERV_FLAG), ("rcx", int(call)), ("rdx", PARAMETERS_GPA), ("r8", 0))),
            CpuExit(0, ExitCode.VMMCALL, 0, 0, b"\x0f\x01\xd9", 0),
        )
        for call, parameters in calls
    )


ORACLES: tuple[Oracle, ...] = (RegisterClip(), ContinuationProgress(), ChannelInvariants(), GrantInvariants())

TARGETS: tuple[Target, ...] = (
    Target(
        "hypercall",
        Party.GUEST,
        ("xen.call", "write", "registers", "exit", "race", "xen.backend", "xen.console", "advance"),
        tuple(oracle.name for oracle in ORACLES),
        ("io", "xen"),
        "Hypercalls of a hostile guest in every ABI: any registers, structures and array lengths.",
    ),
    Target(
        "hyperv",
        Party.GUEST,
        ("write", "registers", "exit", "race", "advance"),
        tuple(oracle.name for oracle in ORACLES),
        ("io", "xen"),
        "Hyper-V's hypercalls of a hostile guest, as Xen serves them: sets of processors, flushes, interrupts.",
        options={"xen": {"start": "long", "viridian": True}},
        seeds=_hyperv_seeds,
    ),
)


def _domain_state(domain: Domain) -> str:
    states = "".join(str(int(state in {c.state for c in domain.channels.values()})) for state in ChannelState)
    return f"{'fifo' if domain.fifo else '2l'}{states}"


def _channels(machine: Machine) -> tuple[str, ...]:
    return tuple(_domain_state(domain) for domain in xen(machine).domains.values())


def _grants(machine: Machine) -> tuple[str, ...]:
    return tuple(
        f"v{domain.grants.table_version}f{min(len(domain.grants.frames), 3)}m{min(len(domain.grants.maptrack), 3)}"
        for domain in xen(machine).domains.values()
    )


def _frames(machine: Machine) -> tuple[str, ...]:
    return tuple(
        "".join(sorted({kind.name[0] for kind in domain.special.values()})) for domain in xen(machine).domains.values()
    )


def _vcpus(machine: Machine) -> tuple[str, ...]:
    return tuple(
        f"{int(vcpu.info_registered)}{int(vcpu.down)}{int(vcpu.polling is not None)}{int(bool(vcpu.singleshot))}"
        for domain in xen(machine).domains.values()
        for vcpu in domain.vcpus
    )


COUNTERS: tuple[StateCounter, ...] = (
    StateCounter("xen.channels", _channels),
    StateCounter("xen.grants", _grants),
    StateCounter("xen.frames", _frames),
    StateCounter("xen.vcpus", _vcpus),
)

PAYLOADS: tuple[Payload, ...] = (
    Payload(
        "xen.call",
        "number",
        lambda record: int(record.number) if isinstance(record, HypercallStep) else None,
        tuple(
            Message(int(number), entry.name, record={"number": int(number)}) for number, entry in sorted(TABLE.items())
        ),
    ),
)
"""The message of a hypercall is its number; its structures lie in guest memory."""
