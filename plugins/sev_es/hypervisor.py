"""The hypervisor at a VMGEXIT: which protocol, the checks of a request in their order, dispatch, and the reply.

The GHCB is read once; everything is decided on that copy. What each event needs comes from its declaration, turned
into masks and decoders when the machine is made.
Source: 56421, sections 2 and 4; Linux arch/x86/kvm/svm/sev.c (sev_handle_vmgexit, sev_es_validate_vmgexit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from struct import Struct
from typing import TYPE_CHECKING, Any

from sevlab.core.buffers import SharedBuffer, Words
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.state import StateDict
from sevlab.core.units import PAGE_BYTES, PAGE_MASK
from sevlab.plugins.sev_es import hyperv
from sevlab.plugins.sev_es.declare import (
    INVALID_EVENT,
    INVALID_SCRATCH,
    MISSING_INPUT,
    MsrRequest,
    NaeEvent,
    NaeHandler,
    Reply,
    malformed,
)
from sevlab.plugins.sev_es.ghcb import VALID_BITS, Ghcb, Reason, Usage, valid_mask
from sevlab.plugins.sev_es.msr_layout import INFO_MASK
from sevlab.plugins.sev_es.order import Exchange, check
from sevlab.plugins.sev_es.records import GhcbReply, MsrReply, OrderWarning, VmgexitIgnored
from sevlab.plugins.sev_es.scratch import Scratch, find_scratch
from sevlab.plugins.sev_es.states import VmProtocol, sev_es_state, vcpu_protocol, vm_protocol

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine

ALWAYS = ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2")
ALWAYS_MASK = valid_mask(*ALWAYS)
HYPERV_USAGES = (Usage.HYPERV_HYPERCALL, Usage.HYPERV_VTL_RETURN)

# The words that the checks look at before the event is known, at the offsets that the layout declares.
_AT = {name: info.offset for name, info in Ghcb.FIELDS.items()}
_U64 = Struct("<Q")
CODE_AT = _AT["sw_exit_code"]
_HEAD = Struct(
    f"<Q{_AT['valid_bitmap'] - CODE_AT - 8}xQQ{_AT['protocol_version'] - _AT['valid_bitmap'] - 16}xHI"
).unpack_from
"""The exit code, the halves of the bitmap, the protocol version and the usage."""
_record = tuple.__new__
"""Makes a NamedTuple from its values without the keyword machinery: half the time, at every reply."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One event as the dispatcher uses it: the declaration as masks and a decoder.

    `plain`: neither for SNP guests only nor of a version that is not offered.
    """

    event: NaeEvent
    handler: NaeHandler
    required: int
    decode: Callable[[bytes], Ghcb]
    needs: tuple[tuple[int, Callable[[Ghcb], bool]], ...]
    scratch: Callable[[Ghcb], int] | None
    plain: bool


def compile_event(event: NaeEvent, version_max: int) -> Compiled:
    """Make the masks and the decoder of a declaration. Raises `KeyError` or `LayoutError` for an unknown field."""
    conditional = {name for need in event.needs for name in need.fields}
    maybe = {*event.optional, *conditional} | ({"sw_scratch"} if event.scratch is not None else set())
    sure = {"sw_exit_info_1", "sw_exit_info_2", *event.required}
    required = ALWAYS_MASK | valid_mask(*event.required)
    decode = Ghcb.decoder(*event.context, or_zero=maybe - sure, checked=sure)
    needs = tuple((valid_mask(*need.fields), need.test) for need in event.needs)
    plain = not event.snp_only and event.since <= version_max
    return Compiled(event, event.handler, required, decode, needs, event.scratch, plain)


RETURNABLE = ("rax", "rcx", "rdx", "rbx")


@cache
def _answer(given: tuple[bool, ...], more: tuple[str, ...]) -> tuple[Words, bytes]:
    """Where a reply puts those of `RETURNABLE` that are given, `more` and SW_EXITINFO1 and 2, and the bitmap that it
    leaves; the bitmap.
    """
    slots = [*((name, yes) for name, yes in zip(RETURNABLE, given, strict=True)), *((name, True) for name in more)]
    slots += [("sw_exit_info_1", True), ("sw_exit_info_2", True)]
    valid = valid_mask(*(name for name, yes in slots if yes)).to_bytes(16, "little")
    return Words(tuple(_AT[name] if yes else None for name, yes in slots), ((_AT["valid_bitmap"], valid),)), valid


ANSWERS = {given: _answer(given, ()) for given in product((False, True), repeat=len(RETURNABLE))}
"""By which of `RETURNABLE` a reply gives."""


def write_reply(machine: Machine, vcpu: Vcpu, window: SharedBuffer, code: int, reply: Reply, data: bytes) -> None:
    """Put a reply into the GHCB and mark valid what it says; the guest's bits are gone.

    Source: 56421, section 4; Linux arch/x86/kvm/svm/sev.c (sev_es_sync_to_ghcb).
    """
    info_1, info_2, rax, rbx, rcx, rdx, more = reply
    given = rax is not None, rcx is not None, rdx is not None, rbx is not None
    if more:
        words, valid = _answer(given, tuple(name for name, _ in more))
        window.write_words(words, (rax, rcx, rdx, rbx, *(value for _, value in more), info_1, info_2))
    else:
        words, valid = ANSWERS[given]
        window.write_words(words, (rax, rcx, rdx, rbx, info_1, info_2))
    machine.emit(
        _record(GhcbReply, (vcpu.vcpu_id, code, info_1, info_2, rax or 0, rbx or 0, rcx or 0, rdx or 0, valid, data))
    )


class Dispatcher:
    """Both protocols of one machine; the policy switches are fixed when it is composed."""

    __slots__ = (
        "_events",
        "_hyperv",
        "_newest",
        "_order",
        "_reply_all",
        "_requests",
        "_version_max",
        "_vms",
        "_window",
    )

    def __init__(self, builder: PluginBuilder) -> None:
        self._newest = builder.options["checks"] == "kvm-2026"
        self._reply_all = builder.options["reply"] == "all"
        self._order = bool(builder.options["order"])
        self._hyperv = builder.options["usage"] == "hyperv"
        self._version_max = int(builder.options["protocol_max"])
        self._events: dict[int, Compiled] = {}
        self._requests: dict[int, MsrRequest] = {}
        self._vms: StateDict[int, VmProtocol] = StateDict()
        self._window: SharedBuffer | None = None
        """On the GHCB of the last request: most come through the same page."""

    def compile(self, machine: Machine) -> None:
        """Turn the frozen tables into what the dispatch uses."""
        self._events = {
            code: compile_event(event, self._version_max) for code, event in machine.tables.nae_events.items()
        }
        offered = machine.tables.msr_protocol.items()
        self._requests = {info: request for info, request in offered if request.since <= self._version_max}
        self._vms = sev_es_state(machine).vms

    def vmgexit(self, machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        """The exit handler of VMGEXIT. Source: 56421, 2.1; Linux arch/x86/kvm/svm/sev.c (sev_handle_vmgexit)."""
        msr = vcpu.vmcb.ghcb_gpa
        if self._order:
            warn(machine, vcpu, msr)
        if msr & INFO_MASK:
            self._msr(machine, vcpu, msr)
        else:
            self._page(machine, vcpu, msr)

    # MSR protocol -----------------------------------------------------------------------------------------------

    def _msr(self, machine: Machine, vcpu: Vcpu, msr: int) -> None:
        """A request by the MSR; one that is unknown leaves it unchanged.

        Source: 56421, 2.3; Linux arch/x86/kvm/svm/sev.c (sev_handle_vmgexit_msr_protocol).
        """
        request = self._requests.get(msr & INFO_MASK)
        value: int | None = msr
        if request is not None:
            if request.snp_only and not vm_protocol(machine, vcpu).snp:
                machine.hypervisor.stop(machine, vcpu.vm_id, f"{request.name} from a guest that is not SNP")
                return
            value = request.handler(machine, vcpu, msr)
        if value is None:
            return
        vcpu.vmcb.ghcb_gpa = value
        machine.emit(_record(MsrReply, (vcpu.vcpu_id, msr, value)))

    # Page protocol ----------------------------------------------------------------------------------------------

    def _page(self, machine: Machine, vcpu: Vcpu, ghcb_gpa: int) -> None:
        """A request by the page: the checks in their order, then the event.

        Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (sev_es_validate_vmgexit).
        """
        spa = machine.access.translate_gpa(vcpu, ghcb_gpa) if ghcb_gpa else None
        if spa is None or spa + PAGE_BYTES > machine.memory.size_bytes:
            reason = "the GHCB page cannot be mapped" if ghcb_gpa else "the GHCB GPA is not set"
            machine.emit(VmgexitIgnored(vcpu.vcpu_id, reason))
            return
        window = self._window
        if window is None or window.spa != spa:
            window = self._window = SharedBuffer(machine.fetches, spa & ~PAGE_MASK, PAGE_BYTES, None, TAG_HYPERVISOR)
        vm = self._vms.get(vcpu.vm_id)
        snp = vm.snp if vm is not None else vm_protocol(machine, vcpu).snp
        if snp and vcpu_protocol(machine, vcpu).registered_gpa != ghcb_gpa:
            if self._newest:
                write_reply(machine, vcpu, window, 0, malformed(Reason.NOT_REGISTERED), b"")
            else:
                machine.hypervisor.stop(machine, vcpu.vm_id, "VMGEXIT with a GHCB that is not registered")
            return
        page = window.read(0, PAGE_BYTES)
        code, valid_low, valid_high, version, usage = _HEAD(page, CODE_AT)
        valid = valid_high << 64 | valid_low
        if usage and self._hyperv and usage in HYPERV_USAGES:
            hyperv.serve(machine, vcpu, window, page, usage)
            return
        found = self._events.get(code)
        passes = not usage and found is not None and found.plain and valid & found.required == found.required
        reply = None if passes else self._refusal(found, valid, usage, snp=snp)
        scratch: Scratch | None = None
        if reply is None and found is not None:
            ghcb = found.decode(page)
            for mask, test in found.needs:
                if valid & mask != mask and test(ghcb):
                    reply = MISSING_INPUT
            if reply is None and found.scratch is not None:
                length_bytes = found.scratch(ghcb)
                if length_bytes:
                    inside = self._newest and version >= 2
                    gpa = ghcb.sw_scratch
                    scratch = find_scratch(machine, vcpu, window, page, ghcb_gpa, gpa, length_bytes, inside=inside)
                    if scratch is None:
                        reply = INVALID_SCRATCH
            if reply is None:
                reply = found.handler(machine, vcpu, ghcb, scratch)
                if reply is None:
                    return
        assert reply is not None  # a code that is not found has been refused
        if self._reply_all:
            reply = _with_all_registers(reply, page, valid)
        write_reply(machine, vcpu, window, code, reply, scratch.written if scratch is not None else b"")

    def _refusal(self, found: Compiled | None, valid: int, usage: int, *, snp: bool) -> Reply | None:
        """The checks before the event's own arguments; None when the request passes.

        Source: Linux arch/x86/kvm/svm/sev.c, v6.12 and after the changes of 2026.
        """
        if usage:
            return malformed(Reason.INVALID_USAGE)
        wrong_vm = found is not None and found.event.snp_only and not snp
        if wrong_vm and self._newest:
            return INVALID_EVENT
        if valid & ALWAYS_MASK != ALWAYS_MASK:
            return MISSING_INPUT
        if found is None or found.event.since > self._version_max:
            return INVALID_EVENT
        if valid & found.required != found.required or wrong_vm:
            return MISSING_INPUT
        return None


def _with_all_registers(reply: Reply, page: bytes, valid: int) -> Reply:
    """KVM's habit: RAX, RBX, RCX, RDX as the request had them (0 where not valid) if the event does not set them."""
    before: Any = {
        name: _U64.unpack_from(page, _AT[name])[0] if valid & VALID_BITS[name] else 0
        for name in ("rax", "rbx", "rcx", "rdx")
        if getattr(reply, name) is None
    }
    return reply._replace(**before)


def warn(machine: Machine, vcpu: Vcpu, msr: int) -> None:
    """Let the order checker look at a VMGEXIT, without a counted fetch: it is no part of the hypervisor."""
    page, shared = None, True
    if msr and not msr & INFO_MASK:
        spa = machine.access.translate_gpa(vcpu, msr)
        if spa is None:
            return
        page = Ghcb.from_bytes(machine.memory.read(spa, PAGE_BYTES, None))
        owner = machine.memory.pages.get(spa // PAGE_BYTES)
        shared = owner is None or owner.key is None
    state = sev_es_state(machine)
    exchange = Exchange(
        vcpu.vcpu_id,
        msr,
        page,
        boot=vcpu.vcpu_id == machine.vm_of(vcpu).vcpu_ids[0],
        snp=vm_protocol(machine, vcpu).snp,
        shared=shared,
        features=state.features,
        apic_id=machine.vm_of(vcpu).vcpu_ids.index(vcpu.vcpu_id),
    )
    declared = (
        machine.tables.msr_protocol.get(msr & INFO_MASK)
        if page is None
        else machine.tables.nae_events.get(page.value_or_zero("sw_exit_code"))
    )
    own = (
        ()
        if declared is None or declared.order is None
        else declared.order(machine, vcpu, msr if page is None else page)
    )
    for broken in (*check(state.order, exchange), *own):
        machine.emit(OrderWarning(vcpu.vcpu_id, broken.rule, broken.message))


def ghcb_window(machine: Machine, vcpu: Vcpu) -> SharedBuffer | None:
    """The hypervisor's window on the GHCB that the vCPU's MSR names; None when it names none that is mapped."""
    gpa = vcpu.vmcb.ghcb_gpa
    return None if not gpa or gpa & INFO_MASK else machine.access.shared_window(vcpu, gpa, PAGE_BYTES)


def register(builder: PluginBuilder) -> Dispatcher:
    """Put the dispatcher of both protocols into the machine."""
    from sevlab.core.svm import ExitCode

    dispatcher = Dispatcher(builder)
    builder.exits.add(ExitCode.VMGEXIT, dispatcher.vmgexit)
    builder.at_boot(dispatcher.compile)
    return dispatcher
