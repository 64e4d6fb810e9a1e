"""event_channel_op: what each operation on each state of a port gives, delivery in both formats, polling."""

from __future__ import annotations

import pytest
from sevlab.core.events import CpuExit, Injected
from sevlab.core.svm import EventType, ExitCode, event
from sevlab.plugins import io
from sevlab.plugins.xen import BackendEvent, Errno, Evtchnop, Hvmop, Nr, Schedop, Upcall, Vcpuop, xen
from sevlab.plugins.xen.arguments import Poll
from sevlab.plugins.xen.layout import FifoControlBlock
from sevlab.plugins.xen.numbers import Domid, MapSpace, Param, Virq
from sevlab.plugins.xen.state import CHANNEL, ChannelState

from tests.plugins.xen.world import INFO, PAGE, call, guest_of, machine_of

CONTROL, ARRAY = 0x40000, 0x41000


@pytest.fixture
def machine():
    return machine_of(vcpus=2)


def op(guest, command, **fields):
    return guest.invoke(Nr.EVENT_CHANNEL_OP, command, **fields)


def pair(machine):
    """A connection of domain 1 with domain 2: both guests and their ports."""
    one, two = guest_of(machine, 0), guest_of(machine, 1)
    far = op(two, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=1).fields["port"]
    near = op(one, Evtchnop.BIND_INTERDOMAIN, remote_dom=2, remote_port=far).fields["local_port"]
    return one, near, two, far


def port_in(guest, state):
    """A fresh port in this state."""
    if state is ChannelState.FREE:
        return 60
    if state is ChannelState.UNBOUND:
        return op(guest, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=Domid.SELF).fields["port"]
    if state is ChannelState.INTERDOMAIN:
        far = op(guest, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=Domid.SELF).fields["port"]
        return op(guest, Evtchnop.BIND_INTERDOMAIN, remote_dom=Domid.SELF, remote_port=far).fields["local_port"]
    if state is ChannelState.VIRQ:
        return op(guest, Evtchnop.BIND_VIRQ, virq=Virq.ARGO, vcpu=0).fields["port"]
    if state is ChannelState.PIRQ:
        return op(guest, Evtchnop.BIND_PIRQ, pirq=20).fields["port"]
    return op(guest, Evtchnop.BIND_IPI, vcpu=1).fields["port"]


@pytest.mark.parametrize("state", ChannelState)
@pytest.mark.parametrize("command", [Evtchnop.SEND, Evtchnop.CLOSE, Evtchnop.BIND_VCPU])
def test_every_operation_on_every_state_is_as_the_table_says(machine, state, command):
    guest = guest_of(machine)
    port = port_in(guest, state)
    fields = {"port": port} | ({"vcpu": 1} if command is Evtchnop.BIND_VCPU else {})
    before = xen(machine).domains[1].channels.get(port)
    result = op(guest, command, **fields).result
    target = CHANNEL.next(state, command)
    assert result == (0 if target is not None else -Errno.EINVAL)
    after = op(guest, Evtchnop.STATUS, dom=Domid.SELF, port=port).fields["status"]
    assert after == (state if target is None else target)
    assert (before is None) == (state is ChannelState.FREE)


def test_status_tells_what_a_port_is(machine):
    one, near, _, far = pair(machine)
    fields = op(one, Evtchnop.STATUS, dom=Domid.SELF, port=near).fields
    assert (fields["status"], fields["u"], fields["u_port"], fields["vcpu"]) == (2, 2, far, 0)
    virq = op(one, Evtchnop.BIND_VIRQ, virq=Virq.TIMER, vcpu=1).fields["port"]
    fields = op(one, Evtchnop.STATUS, dom=Domid.SELF, port=virq).fields
    assert (fields["status"], fields["u"], fields["vcpu"]) == (4, Virq.TIMER, 1)
    assert op(one, Evtchnop.STATUS, dom=Domid.SELF, port=64).result == -Errno.EINVAL
    assert op(one, Evtchnop.STATUS, dom=2, port=far).result == -Errno.EPERM
    assert op(one, Evtchnop.STATUS, dom=9, port=far).result == -Errno.ESRCH


def test_a_bind_needs_a_port_that_was_left_for_this_domain(machine):
    one, two = guest_of(machine, 0), guest_of(machine, 1)
    port = op(two, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=5).fields["port"]
    assert op(one, Evtchnop.BIND_INTERDOMAIN, remote_dom=2, remote_port=port).result == -Errno.EINVAL
    assert op(one, Evtchnop.BIND_INTERDOMAIN, remote_dom=9, remote_port=port).result == -Errno.ESRCH
    assert op(one, Evtchnop.BIND_INTERDOMAIN, remote_dom=2, remote_port=1 << 31).result == -Errno.EINVAL
    assert op(one, Evtchnop.ALLOC_UNBOUND, dom=2, remote_dom=1).result == -Errno.EPERM
    assert op(one, Evtchnop.ALLOC_UNBOUND, dom=9, remote_dom=1).result == -Errno.ESRCH


def test_the_control_domain_may_allocate_for_others():
    machine = machine_of(control_domain=True)
    answer = op(guest_of(machine, 0), Evtchnop.ALLOC_UNBOUND, dom=1, remote_dom=0)
    assert answer.result == 0
    assert xen(machine).domains[1].channels[answer.fields["port"]].remote_domid == 0


@pytest.mark.parametrize(
    ("virq", "vcpu", "result"),
    [
        (0, 0, 0),
        (0, 1, 0),
        (0, 2, -Errno.ENOENT),
        (1, 1, 0),
        (11, 0, 0),
        (11, 1, -Errno.EINVAL),
        (2, 0, -Errno.EBUSY),
        (23, 0, -Errno.EBUSY),
        (24, 0, -Errno.EINVAL),
        (1 << 31, 0, -Errno.EINVAL),
    ],
)
def test_virqs_by_kind(machine, virq, vcpu, result):
    guest = guest_of(machine)
    assert op(guest, Evtchnop.BIND_VIRQ, virq=virq, vcpu=vcpu).result == result
    if result == 0:
        assert op(guest, Evtchnop.BIND_VIRQ, virq=virq, vcpu=vcpu).result == -Errno.EEXIST


def test_a_per_vcpu_virq_stays_on_its_vcpu(machine):
    guest = guest_of(machine)
    port = op(guest, Evtchnop.BIND_VIRQ, virq=Virq.TIMER, vcpu=0).fields["port"]
    assert op(guest, Evtchnop.BIND_VCPU, port=port, vcpu=1).result == -Errno.EINVAL
    assert op(guest, Evtchnop.BIND_VCPU, port=port, vcpu=2).result == -Errno.ENOENT


def test_ports_run_out_at_the_domains_limit(machine):
    guest = guest_of(machine)
    domain = xen(machine).domains[1]
    domain.max_port = 5
    for expected in (3, 4, 5):
        assert op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"] == expected
    assert op(guest, Evtchnop.BIND_IPI, vcpu=0).result == -Errno.ENOSPC


# Two levels -------------------------------------------------------------------------------------------------------


def test_an_event_sets_pending_selector_and_upcall_once(machine):
    one, near, two, far = pair(machine)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    assert op(one, Evtchnop.SEND, port=near).result == 0
    assert two.pending(INFO) == {far}
    assert two.number(INFO, 1) == 1
    assert two.number(INFO + 8, 8) == 1
    two.write(INFO, b"\0")
    op(one, Evtchnop.SEND, port=near)
    assert two.number(INFO, 1) == 0  # already pending: no second edge
    two.acknowledge(INFO)
    op(one, Evtchnop.SEND, port=near)
    assert two.number(INFO, 1) == 1


def test_a_masked_event_waits_for_unmask(machine):
    one, near, two, far = pair(machine)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    two.acknowledge(INFO)
    two.write(INFO + 2560 + far // 8, bytes((1 << far % 8,)))
    op(one, Evtchnop.SEND, port=near)
    assert (two.pending(INFO), two.number(INFO, 1)) == ({far}, 0)
    assert op(two, Evtchnop.UNMASK, port=far).result == 0
    assert (two.number(INFO, 1), two.number(INFO + 8, 8)) == (1, 1)
    assert two.number(INFO + 2560, 8) == 0
    assert op(two, Evtchnop.UNMASK, port=64).result == -Errno.EINVAL
    assert op(two, Evtchnop.UNMASK, port=50).result == 0


def test_a_32_bit_guest_has_words_of_32_bits():
    machine = machine_of(start="protected")
    one = xen(machine).domains[1]
    one.narrow = True
    from sevlab.plugins.xen import events
    from sevlab.plugins.xen.state import EventChannel

    channel = one.channels[40] = EventChannel(port=40, state=ChannelState.IPI)
    events.set_pending(machine, one, channel)
    page = machine.memory.read(one.shared_info_spa, 3136, None)
    assert page[4:8] == (1 << 1).to_bytes(4, "little")
    assert page[2048 + 5] == 1
    assert events.max_ports(one) == 1024


def test_closing_takes_a_pending_event_back_and_frees_the_other_end(machine):
    one, near, two, far = pair(machine)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    op(one, Evtchnop.SEND, port=near)
    assert op(two, Evtchnop.CLOSE, port=far).result == 0
    assert two.pending(INFO) == set()
    fields = op(one, Evtchnop.STATUS, dom=Domid.SELF, port=near).fields
    assert (fields["status"], fields["u"] & 0xFFFF) == (1, 2)
    assert op(one, Evtchnop.SEND, port=near).result == 0  # dropped silently


def test_reset_closes_everything_and_goes_on_when_preempted():
    machine = machine_of(preempt_after=2)
    guest = guest_of(machine)
    xen(machine).domains[1].max_port = 300
    for _ in range(200):
        op(guest, Evtchnop.BIND_IPI, vcpu=0)
    assert op(guest, Evtchnop.RESET, dom=Domid.SELF).result == 0
    assert not xen(machine).domains[1].channels
    assert xen(machine).domains[1].next_reset == 0
    assert op(guest, Evtchnop.RESET, dom=2).result == -Errno.EPERM


# Delivery ---------------------------------------------------------------------------------------------------------


def cpuid_exit(machine, vcpu=0):
    return machine.apply(CpuExit(vcpu, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0))


def test_the_callback_vector_is_injected_while_the_flag_is_set(machine):
    one, near, two, _ = pair(machine)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    two.acknowledge(INFO)
    two.set_callback_vector(0xF3)
    two_vcpu = machine.vcpus[two.vcpu_id]
    two_vcpu.regs.rflags |= 1 << 9
    assert cpuid_exit(machine, two.vcpu_id).first(Injected) is None
    outcome = one.machine.apply
    assert outcome
    op(one, Evtchnop.SEND, port=near)
    expected = Injected(two.vcpu_id, event(0xF3, EventType.INTERRUPT))
    assert cpuid_exit(machine, two.vcpu_id).first(Injected) == expected
    assert cpuid_exit(machine, two.vcpu_id).first(Injected) == expected
    two.acknowledge(INFO)
    assert cpuid_exit(machine, two.vcpu_id).first(Injected) is None


def test_the_vector_waits_for_interrupts_to_be_enabled(machine):
    one, near, two, _ = pair(machine)
    two.set_callback_vector(0xF3)
    op(one, Evtchnop.SEND, port=near)
    vcpu = machine.vcpus[two.vcpu_id]
    vcpu.regs.rflags &= ~(1 << 9)
    assert cpuid_exit(machine, two.vcpu_id).first(Injected) is None
    assert vcpu.vmcb.intercepts >> ExitCode.VINTR & 1
    vcpu.regs.rflags |= 1 << 9
    assert cpuid_exit(machine, two.vcpu_id).first(Injected).event & 0xFF == 0xF3


def test_a_vcpus_own_vector_goes_through_its_apic(machine):
    one, near, two, _ = pair(machine)
    board = io.devices(machine, machine.vcpus[two.vcpu_id])
    board.lapics[two.vcpu_id].registers[0xF0] = 0x1FF
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    two.acknowledge(INFO)
    assert two.invoke(Nr.HVM_OP, Hvmop.SET_EVTCHN_UPCALL_VECTOR, vcpu=0, vector=0x55).result == 0
    board.lapics[two.vcpu_id].irr = 0
    op(one, Evtchnop.SEND, port=near)
    assert board.lapics[two.vcpu_id].irr == 1 << 0x55
    assert two.invoke(Nr.HVM_OP, Hvmop.SET_EVTCHN_UPCALL_VECTOR, vcpu=0, vector=0xF).result == -Errno.EINVAL
    assert two.invoke(Nr.HVM_OP, Hvmop.SET_EVTCHN_UPCALL_VECTOR, vcpu=2, vector=0x10).result == -Errno.ENOENT


def test_a_line_callback_follows_the_flag_of_vcpu_0(machine):
    one, near, two, _ = pair(machine)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    two.acknowledge(INFO)
    two.invoke(Nr.HVM_OP, Hvmop.SET_PARAM, domid=Domid.SELF, index=Param.CALLBACK_IRQ, value=5)
    board = io.devices(machine, machine.vcpus[two.vcpu_id])
    assert not board.ioapic.lines >> 5 & 1
    op(one, Evtchnop.SEND, port=near)
    assert board.ioapic.lines >> 5 & 1
    two.acknowledge(INFO)
    cpuid_exit(machine, two.vcpu_id)
    assert not board.ioapic.lines >> 5 & 1


def test_a_pci_line_callback_is_swizzled(machine):
    one, near, two, _ = pair(machine)
    value = 1 << 56 | 1 << 11 | 2  # device 1, INTC
    two.invoke(Nr.HVM_OP, Hvmop.SET_PARAM, domid=Domid.SELF, index=Param.CALLBACK_IRQ, value=value)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    two.acknowledge(INFO)
    op(one, Evtchnop.SEND, port=near)
    assert io.devices(machine, machine.vcpus[two.vcpu_id]).ioapic.lines == 1 << 16 + 6


def test_an_upcall_is_recorded_and_ends_a_block(machine):
    one, near, two, _ = pair(machine)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    two.acknowledge(INFO)
    two.set_callback_vector(0xF3)
    vcpu = machine.vcpus[two.vcpu_id]
    vcpu.regs.rflags |= 1 << 9
    two.call(Nr.SCHED_OP, Schedop.BLOCK, 0)
    assert vcpu.halted
    machine.vcpus[0].regs.rax = 0
    one.write(one.bounce_gpa, near.to_bytes(4, "little"))
    from sevlab.plugins.xen import HypercallStep

    outcome = machine.apply(HypercallStep(0, Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, one.bounce_gpa, 0, 0, 0, 0, 0))
    assert outcome.first(Upcall) == Upcall(two.vcpu_id)
    assert not vcpu.halted


def test_a_backend_raises_what_is_bound(machine):
    guest = guest_of(machine)
    guest.map_page(MapSpace.SHARED_INFO, 0, INFO)
    port = op(guest, Evtchnop.BIND_VIRQ, virq=Virq.ARGO, vcpu=0).fields["port"]
    pirq = op(guest, Evtchnop.BIND_PIRQ, pirq=20).fields["port"]
    machine.apply(BackendEvent(1, "virq", Virq.ARGO, 0))
    machine.apply(BackendEvent(1, "pirq", 20, 0))
    assert guest.pending(INFO) == {port, pirq}


# Polling ----------------------------------------------------------------------------------------------------------


def poll(guest, *ports, timeout=0):
    guest.write(PAGE, b"".join(port.to_bytes(4, "little") for port in ports))
    guest.write(guest.bounce_gpa, Poll.build(ports=PAGE, nr_ports=len(ports), timeout=timeout))
    return guest.call(Nr.SCHED_OP, Schedop.POLL, guest.bounce_gpa)


def test_a_poll_sleeps_until_its_port_is_pending(machine):
    one, near, two, far = pair(machine)
    two.map_page(MapSpace.SHARED_INFO, 0, INFO)
    two.acknowledge(INFO)
    two.write(INFO + 2560, b"\xff" * 8)
    vcpu = machine.vcpus[two.vcpu_id]
    assert poll(two, far) == 0
    assert vcpu.halted
    op(one, Evtchnop.SEND, port=near)
    assert not vcpu.halted
    assert poll(two, far) == 0
    assert not vcpu.halted  # it is pending already


def test_a_poll_has_limits(machine):
    guest = guest_of(machine)
    assert poll(guest, 60) == -Errno.EINVAL
    assert poll(guest, *[3] * 129) == -Errno.EINVAL
    guest.write(guest.bounce_gpa, Poll.build(ports=1 << 40, nr_ports=1))
    assert guest.call(Nr.SCHED_OP, Schedop.POLL, guest.bounce_gpa) == -Errno.EFAULT


# FIFO -------------------------------------------------------------------------------------------------------------


def fifo(machine, guest):
    guest.share(CONTROL)
    guest.share(ARRAY)
    answer = op(guest, Evtchnop.INIT_CONTROL, control_gfn=CONTROL >> 12, page_offset=64, vcpu=0)
    assert (answer.result, answer.fields["link_bits"]) == (0, 17)
    assert op(guest, Evtchnop.EXPAND_ARRAY, array_gfn=ARRAY >> 12).result == 0


def word(guest, port):
    return guest.number(ARRAY + port * 4)


def block(guest):
    return FifoControlBlock.from_bytes(guest.read(CONTROL + 64, 72))


def test_fifo_links_events_by_priority(machine):
    guest = guest_of(machine)
    guest.map_page(MapSpace.SHARED_INFO, 0, INFO)
    guest.acknowledge(INFO)
    fifo(machine, guest)
    ports = [op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"] for _ in range(3)]
    assert op(guest, Evtchnop.SET_PRIORITY, port=ports[2], priority=3).result == 0
    for port in ports:
        assert op(guest, Evtchnop.SEND, port=port).result == 0
    assert block(guest).ready == 1 << 7 | 1 << 3
    assert (block(guest).head[7], block(guest).head[3]) == (ports[0], ports[2])
    assert word(guest, ports[0]) == 1 << 31 | 1 << 29 | ports[1]
    assert word(guest, ports[1]) == 1 << 31 | 1 << 29
    assert guest.number(INFO, 1) == 1


def test_fifo_masked_events_wait_and_are_linked_by_unmask(machine):
    guest = guest_of(machine)
    fifo(machine, guest)
    port = op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"]
    guest.write(ARRAY + port * 4, (1 << 30).to_bytes(4, "little"))
    op(guest, Evtchnop.SEND, port=port)
    assert (word(guest, port), block(guest).ready) == (1 << 31 | 1 << 30, 0)
    op(guest, Evtchnop.UNMASK, port=port)
    assert (word(guest, port), block(guest).ready) == (1 << 31 | 1 << 29, 1 << 7)


def test_fifo_raises_again_what_came_before_its_page(machine):
    guest = guest_of(machine)
    guest.share(CONTROL)
    guest.share(ARRAY)
    op(guest, Evtchnop.INIT_CONTROL, control_gfn=CONTROL >> 12, page_offset=64, vcpu=0)
    port = op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"]
    op(guest, Evtchnop.SEND, port=port)
    assert block(guest).ready == 0
    op(guest, Evtchnop.EXPAND_ARRAY, array_gfn=ARRAY >> 12)
    assert (word(guest, port), block(guest).head[7]) == (1 << 31 | 1 << 29, port)


def test_a_port_that_is_still_linked_is_not_given_out_again(machine):
    guest = guest_of(machine)
    fifo(machine, guest)
    port = op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"]
    op(guest, Evtchnop.SEND, port=port)
    op(guest, Evtchnop.CLOSE, port=port)
    assert word(guest, port) == 1 << 29
    assert op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"] == port + 1
    guest.write(ARRAY + port * 4, bytes(4))
    assert op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"] == port


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"vcpu": 2}, -Errno.ENOENT),
        ({"page_offset": 4096 - 72}, 0),
        ({"page_offset": 4096 - 64}, -Errno.EINVAL),
        ({"page_offset": 4}, -Errno.EINVAL),
        ({"control_gfn": 1 << 40}, -Errno.EINVAL),
    ],
)
def test_a_control_block_must_fit_its_page(machine, fields, result):
    guest = guest_of(machine)
    answer = op(guest, Evtchnop.INIT_CONTROL, **{"control_gfn": CONTROL >> 12, "vcpu": 0, **fields})
    assert answer.result == result
    assert xen(machine).domains[1].fifo == (result == 0)
    if result == 0:
        again = op(guest, Evtchnop.INIT_CONTROL, **{"control_gfn": CONTROL >> 12, "vcpu": 0, **fields})
        assert again.result == -Errno.EINVAL


def test_without_fifo_there_is_no_array_and_no_priority(machine):
    guest = guest_of(machine)
    port = op(guest, Evtchnop.BIND_IPI, vcpu=0).fields["port"]
    assert op(guest, Evtchnop.EXPAND_ARRAY, array_gfn=ARRAY >> 12).result == -Errno.EOPNOTSUPP
    assert op(guest, Evtchnop.SET_PRIORITY, port=port, priority=0).result == -Errno.ENOSYS
    fifo(machine, guest)
    assert op(guest, Evtchnop.SET_PRIORITY, port=port, priority=15).result == 0
    assert op(guest, Evtchnop.SET_PRIORITY, port=port, priority=16).result == -Errno.EINVAL


def test_reset_returns_to_two_levels(machine):
    guest = guest_of(machine)
    fifo(machine, guest)
    assert op(guest, Evtchnop.RESET, dom=Domid.SELF).result == 0
    assert not xen(machine).domains[1].fifo
    assert xen(machine).domains[1].vcpus[0].control_spa == 0


def test_unknown_operations_and_vcpus(machine):
    assert call(machine, Nr.EVENT_CHANNEL_OP, 15, PAGE) == -Errno.ENOSYS
    assert op(guest_of(machine), Evtchnop.BIND_IPI, vcpu=2).result == -Errno.ENOENT
    assert guest_of(machine).invoke(Nr.VCPU_OP, Vcpuop.IS_UP, on=2).result == -Errno.ENOENT
