"""Pending, masked, delivered: what happens when an event is raised, in both formats.

Two levels: bits in shared_info, and a selector word in vcpu_info. FIFO: a word for each port in pages that the guest
gave, linked into a queue for each vCPU and priority. Either way the upcall flag of vcpu_info tells the vCPU, by the
callback vector, an interrupt line, or a vector of its own at the local APIC.
Source: Xen xen/common/event_2l.c, xen/common/event_fifo.c, xen/arch/x86/hvm/irq.c, xen/arch/x86/domain.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_BYTES
from sevlab.plugins import io
from sevlab.plugins.xen.frames import fetch, store, test_and_clear_bit, test_and_set_bit, test_bit
from sevlab.plugins.xen.layout import SharedInfo, SharedInfo32
from sevlab.plugins.xen.numbers import Param, Virq
from sevlab.plugins.xen.records import Upcall
from sevlab.plugins.xen.state import ChannelState, Domain, EventChannel, XenVcpu, domain_of

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

PENDING_OFFSET = SharedInfo.FIELDS["evtchn_pending"].offset
MASK_OFFSET = SharedInfo.FIELDS["evtchn_mask"].offset
MASK_OFFSET_32 = SharedInfo32.FIELDS["evtchn_mask"].offset

FIFO_PENDING, FIFO_MASKED, FIFO_LINKED, FIFO_BUSY = 31, 30, 29, 28
FIFO_LINK_BITS = 17
FIFO_LINK_MASK = (1 << FIFO_LINK_BITS) - 1
FIFO_CHANNELS = 1 << FIFO_LINK_BITS
WORDS_PER_PAGE = PAGE_BYTES // 4
MAX_ARRAY_PAGES = FIFO_CHANNELS // WORDS_PER_PAGE
PRIORITY_DEFAULT, PRIORITY_LOWEST = 7, 15

CALLBACK_GSI, CALLBACK_PCI, CALLBACK_VECTOR = 0, 1, 2
CALLBACK_IRQ = int(Param.CALLBACK_IRQ)
ISA_IRQS, IOAPIC_PINS = 16, 24


# The upcall -------------------------------------------------------------------------------------------------------


def callback(domain: Domain) -> tuple[int | None, int]:
    """(type, value) of the domain's callback: how its vCPUs are told; type None when not set."""
    via = domain.params.get(Param.CALLBACK_IRQ, 0)
    kind = via >> 56
    if not via or kind > CALLBACK_VECTOR:
        return None, 0
    return kind, via


def mark_events_pending(machine: Machine, domain: Domain, vcpu: XenVcpu) -> None:
    """Set the upcall flag; when it was clear, tell the vCPU."""
    if not vcpu.info_spa or test_and_set_bit(machine, vcpu.info_spa, 0):
        return
    machine.emit(Upcall(vcpu.vcpu_id))
    assert_upcall(machine, domain, vcpu)


def assert_upcall(machine: Machine, domain: Domain, vcpu: XenVcpu) -> None:
    """Tell the vCPU: at its own vector, or by the domain's callback; a sleeping vCPU wakes up."""
    real = machine.vcpus[vcpu.vcpu_id]
    if vcpu.upcall_vector:
        io.devices(machine, real).lapics[vcpu.vcpu_id].accept(vcpu.upcall_vector)
    elif callback(domain)[0] in (CALLBACK_GSI, CALLBACK_PCI) and vcpu.index == 0:
        update_line(machine, domain)
    if vcpu.polling is None:
        io.wake(machine, real)


def update_line(machine: Machine, domain: Domain) -> None:
    """An interrupt-line callback follows the upcall flag of vCPU 0."""
    vcpu = domain.vcpus[0]
    level = bool(vcpu.info_spa) and test_bit(machine, vcpu.info_spa, 0)
    if callback(domain)[0] in (CALLBACK_GSI, CALLBACK_PCI) and level != domain.callback_asserted:
        _set_line(machine, domain, level=level)


def release_line(machine: Machine, domain: Domain) -> None:
    """Lower the line, before another callback takes its place."""
    if domain.callback_asserted:
        _set_line(machine, domain, level=False)


def _set_line(machine: Machine, domain: Domain, *, level: bool) -> None:
    """Drive the callback's line. INTx pin p of PCI device d is GSI 16 + (4 d + d / 8 + p) mod 32; the I/O APIC has 24
    pins, and a line past them reaches nobody. Source: xen/arch/x86/include/asm/hvm/irq.h, hvm_pci_intx_gsi.
    """
    kind, via = callback(domain)
    board = io.devices(machine, machine.vcpus[domain.vcpus[0].vcpu_id])
    domain.callback_asserted = level
    gsi = via & 0xFF
    if kind == CALLBACK_PCI:
        device = via >> 11 & 31
        gsi = 16 + ((device << 2) + (device >> 3) + (via & 3) & 31)
    if 0 < gsi < ISA_IRQS:
        board.set_irq(machine, gsi, level=level)
    elif gsi < IOAPIC_PINS:
        board.ioapic.set_line(gsi, level=level, deliver=board.router(machine))


def direct_interrupt(machine: Machine, vcpu: Vcpu) -> int | None:
    """The slot of that name: the callback vector, while the vCPU's upcall flag is set; the guest clears it itself."""
    domain = domain_of(machine, vcpu)
    if domain is None:
        return None
    via = domain.params.get(CALLBACK_IRQ, 0)
    if via >> 56 != CALLBACK_VECTOR:
        return None
    vcpus = domain.vcpus
    spa = vcpus[vcpu.vcpu_id - vcpus[0].vcpu_id].info_spa
    return via & 0xFF if spa and machine.memory.read(spa, 1, None)[0] else None


def check_pollers(machine: Machine, domain: Domain, port: int) -> None:
    """Wake the vCPUs that wait for this port."""
    for vcpu in domain.vcpus:
        if vcpu.polling is not None and (not vcpu.polling or port in vcpu.polling):
            end_poll(machine, vcpu)


def end_poll(machine: Machine, vcpu: XenVcpu) -> None:
    """The vCPU runs again."""
    vcpu.polling, vcpu.poll_until = None, 0
    machine.vcpus[vcpu.vcpu_id].halted = False


# Two levels -------------------------------------------------------------------------------------------------------


def _mask_spa(domain: Domain) -> int:
    return domain.shared_info_spa + (MASK_OFFSET_32 if domain.narrow else MASK_OFFSET)


def _select(machine: Machine, domain: Domain, vcpu: XenVcpu, port: int) -> None:
    """Set the port's word in the selector; the first one in it makes an upcall."""
    offset, shift = (4, 5) if domain.narrow else (8, 6)
    if vcpu.info_spa and not test_and_set_bit(machine, vcpu.info_spa + offset, port >> shift):
        mark_events_pending(machine, domain, vcpu)


def max_ports(domain: Domain) -> int:
    """Ports that the domain's format can hold."""
    if domain.fifo:
        return FIFO_CHANNELS
    return 1024 if domain.narrow else 4096


# Both formats -----------------------------------------------------------------------------------------------------


def set_pending(machine: Machine, domain: Domain, channel: EventChannel) -> None:
    """Raise the event."""
    vcpu = domain.vcpus[channel.vcpu]
    if domain.fifo:
        _fifo_set_pending(machine, domain, channel, vcpu)
        return
    port = channel.port
    if port >= max_ports(domain) or test_and_set_bit(machine, domain.shared_info_spa + PENDING_OFFSET, port):
        return
    if not test_bit(machine, _mask_spa(domain), port):
        _select(machine, domain, vcpu, port)
    check_pollers(machine, domain, port)


def clear_pending(machine: Machine, domain: Domain, port: int) -> None:
    """Take the event back, as when its port closes."""
    if domain.fifo:
        word = word_spa(domain, port)
        if word is not None:
            test_and_clear_bit(machine, word, FIFO_PENDING)
    elif port < max_ports(domain):
        test_and_clear_bit(machine, domain.shared_info_spa + PENDING_OFFSET, port)


def unmask(machine: Machine, domain: Domain, channel: EventChannel) -> None:
    """Clear the mask, and deliver what waited behind it."""
    port, vcpu = channel.port, domain.vcpus[channel.vcpu]
    if domain.fifo:
        word = word_spa(domain, port)
        if word is not None:
            test_and_clear_bit(machine, word, FIFO_MASKED)
            if test_bit(machine, word, FIFO_PENDING):
                _fifo_set_pending(machine, domain, channel, vcpu)
    elif (
        port < max_ports(domain)
        and test_and_clear_bit(machine, _mask_spa(domain), port)
        and test_bit(machine, domain.shared_info_spa + PENDING_OFFSET, port)
    ):
        _select(machine, domain, vcpu, port)


def is_pending(machine: Machine, domain: Domain, port: int) -> bool:
    """Whether the event is raised."""
    if domain.fifo:
        word = word_spa(domain, port)
        return word is not None and test_bit(machine, word, FIFO_PENDING)
    return port < max_ports(domain) and test_bit(machine, domain.shared_info_spa + PENDING_OFFSET, port)


def is_busy(machine: Machine, domain: Domain, port: int) -> bool:
    """Whether a free port is still in a queue of the guest's, so that it may not be used again."""
    word = word_spa(domain, port) if domain.fifo else None
    return word is not None and test_bit(machine, word, FIFO_LINKED)


# FIFO -------------------------------------------------------------------------------------------------------------


def word_spa(domain: Domain, port: int) -> int | None:
    """SPA of the port's event word; None while the array does not reach it."""
    page, word = divmod(port, WORDS_PER_PAGE)
    return domain.event_array[page] + word * 4 if page < len(domain.event_array) else None


def _fifo_set_pending(machine: Machine, domain: Domain, channel: EventChannel, vcpu: XenVcpu) -> None:
    port = channel.port
    word = word_spa(domain, port)
    if word is None:
        channel.pending = True
        return
    if not vcpu.control_spa:
        return  # dropped: the guest must not unmask before it has a control block
    newly_pending = not test_and_set_bit(machine, word, FIFO_PENDING)
    priority = channel.priority
    linked = True
    if not test_bit(machine, word, FIFO_MASKED) and not test_and_set_bit(machine, word, FIFO_LINKED):
        old_vcpu, old_priority = domain.last_queue.get(port, (0, 0))
        old = domain.vcpus[old_vcpu]
        if old.tails.get(old_priority, 0) == port:
            old.tails[old_priority] = 0
        if (old_vcpu, old_priority) != (vcpu.index, priority):
            domain.last_queue[port] = (vcpu.index, priority)
        tail = vcpu.tails.get(priority, 0)
        linked = bool(tail) and _set_link(machine, domain, tail, port)
        if not linked:
            store(machine, vcpu.control_spa + 8 + priority * 4, port.to_bytes(4, "little"))
        vcpu.tails[priority] = port
    if not linked and not test_and_set_bit(machine, vcpu.control_spa, priority):
        mark_events_pending(machine, domain, vcpu)
    if newly_pending:
        check_pollers(machine, domain, port)


def _set_link(machine: Machine, domain: Domain, tail: int, port: int) -> bool:
    """Let the tail point to `port` if it is linked; False when its queue is empty."""
    spa = word_spa(domain, tail)
    if spa is None:
        return False
    word = int.from_bytes(fetch(machine, spa, 4), "little")
    if not word >> FIFO_LINKED & 1:
        return False
    word = word & ~(1 << FIFO_BUSY | FIFO_LINK_MASK) | port
    store(machine, spa, word.to_bytes(4, "little"))
    return True


# VIRQs ------------------------------------------------------------------------------------------------------------


def raise_virq(machine: Machine, domain: Domain, vcpu: XenVcpu, virq: int) -> bool:
    """Raise a VIRQ where the domain has bound it."""
    port = vcpu.virqs.get(virq)
    channel = None if port is None else domain.channels.get(port)
    if channel is None or channel.state is not ChannelState.VIRQ:
        return False
    set_pending(machine, domain, channel)
    return True


def raise_timer(machine: Machine, domain: Domain, vcpu: XenVcpu) -> None:
    """The vCPU's timer fired."""
    raise_virq(machine, domain, vcpu, Virq.TIMER)
