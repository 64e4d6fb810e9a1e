"""hvm_op, xen_version, console_io, physdev_op, and what guests may not do."""

from __future__ import annotations

import pytest
from sevlab.core.events import AdvanceClock
from sevlab.plugins.xen import BackendEvent, Errno, Evtchnop, Hvmop, Hypercalled, HypercallStep, Nr, xen
from sevlab.plugins.xen.arguments import ControlHead, DmOpBuf, PlatformStatus, Xentrace
from sevlab.plugins.xen.numbers import Domid, MapSpace, Param, Physdevop, Version
from sevlab.plugins.xen.records import Traced

from tests.plugins.xen.world import BOUNCE, INFO, PAGE, call, guest_of, machine_of


@pytest.fixture
def machine():
    return machine_of()


def param(guest, index, value=None, domid=Domid.SELF):
    command = Hvmop.GET_PARAM if value is None else Hvmop.SET_PARAM
    fields = {"domid": domid, "index": index} | ({} if value is None else {"value": value})
    answer = guest.invoke(Nr.HVM_OP, command, **fields)
    return answer.fields["value"] if value is None and answer.result == 0 else answer.result


GUEST_SETS = {0, 2, 15, 18, 19, 34, 36, 37}
DEPRECATED = {4, 13, 20, 21, 22, 23, 24, 25, 26, 30}


@pytest.mark.parametrize("index", range(40))
def test_who_may_set_and_read_each_parameter(machine, index):
    guest = guest_of(machine)
    value = {37: 104 << 32, 19: 1, 36: 8}.get(index, 1)
    expected = (
        -Errno.EINVAL
        if index == 39 or index in DEPRECATED
        else -Errno.EEXIST
        if index == 35
        else 0
        if index in GUEST_SETS
        else -Errno.EPERM
    )
    assert param(guest, index, value) == expected
    read = param(guest, index)
    if index == 39 or index in DEPRECATED:
        assert read == -Errno.EINVAL
    elif index in GUEST_SETS | {1, 17, 35}:
        assert read >= 0
    else:
        assert read == -Errno.EPERM


@pytest.mark.parametrize(
    ("index", "value", "result"),
    [
        (36, 4, 0),
        (36, 5, -Errno.EINVAL),
        (19, 2, -Errno.EINVAL),
        (15, 1 << 32, -Errno.EINVAL),
        (37, 103 << 32, -Errno.EINVAL),
    ],
)
def test_values_of_parameters(machine, index, value, result):
    assert param(guest_of(machine), index, value) == result
    assert bool(machine.hypervisor.vms[0].stopped) == (index in (15, 37) and result != 0)


def test_the_old_tss_parameter_is_the_new_one(machine):
    guest = guest_of(machine)
    assert param(guest, Param.VM86_TSS, 0x5000) == 0
    assert param(guest, Param.VM86_TSS_SIZED) == 0x5000 | 128 << 32
    assert param(guest, Param.VM86_TSS) == 0x5000


def test_parameters_of_other_domains(machine):
    guest = guest_of(machine)
    assert param(guest, Param.CALLBACK_IRQ, 5, domid=2) == -Errno.EPERM
    assert param(guest, Param.CALLBACK_IRQ, 5, domid=9) == -Errno.ESRCH


def test_the_control_domain_sets_once_what_may_be_set_once():
    machine = machine_of(control_domain=True)
    guest = guest_of(machine)
    assert param(guest, Param.IOREQ_PFN, 5, domid=1) == 0
    assert param(guest, Param.IOREQ_PFN, 5, domid=1) == 0
    assert param(guest, Param.IOREQ_PFN, 6, domid=1) == -Errno.EEXIST
    assert param(guest, Param.TIMER_MODE, 4, domid=1) == -Errno.EINVAL


def test_other_operations_of_hvm_op(machine):
    guest = guest_of(machine)
    assert call(machine, Nr.HVM_OP, Hvmop.FLUSH_TLBS, 0) == 0
    assert call(machine, Nr.HVM_OP, Hvmop.FLUSH_TLBS, 8) == -Errno.EINVAL
    machine.apply(AdvanceClock(4_000_000))
    assert guest.invoke(Nr.HVM_OP, Hvmop.GET_TIME).fields["now"] == 2_000_000
    assert guest.invoke(Nr.HVM_OP, Hvmop.GET_MEM_TYPE, domid=Domid.SELF, pfn=5).fields["mem_type"] == 0
    assert guest.invoke(Nr.HVM_OP, Hvmop.GET_MEM_TYPE, domid=Domid.SELF, pfn=1 << 30).fields["mem_type"] == 2
    assert guest.invoke(Nr.HVM_OP, Hvmop.PAGETABLE_DYING, domid=2).result == -Errno.EOPNOTSUPP
    assert call(machine, Nr.HVM_OP, Hvmop.GUEST_REQUEST_VM_EVENT, 0) == 0
    assert call(machine, Nr.HVM_OP, 26, 0) == -Errno.ENOSYS


@pytest.mark.parametrize(
    ("command", "length"),
    [(Version.EXTRAVERSION, 16), (Version.COMPILE_INFO, 144), (Version.CAPABILITIES, 1024), (Version.CHANGESET, 64)],
)
def test_texts_of_fixed_length(machine, command, length):
    guest = guest_of(machine)
    guest.write(PAGE, b"\xff" * 2048)
    assert call(machine, Nr.XEN_VERSION, command, PAGE) == 0
    assert guest.read(PAGE + length, 1) == b"\xff"
    assert guest.read(PAGE + length - 1, 1) == b"\0"


def test_texts_of_variable_length(machine):
    guest = guest_of(machine)
    length = call(machine, Nr.XEN_VERSION, Version.CAPABILITIES2, 0)
    guest.write(PAGE, (length - 1).to_bytes(4, "little"))
    assert call(machine, Nr.XEN_VERSION, Version.CAPABILITIES2, PAGE) == -Errno.ENOBUFS
    guest.write(PAGE, length.to_bytes(4, "little"))
    assert call(machine, Nr.XEN_VERSION, Version.CAPABILITIES2, PAGE) == length
    assert guest.read(PAGE + 4, 7) == b"xen-3.0"
    assert call(machine, Nr.XEN_VERSION, Version.BUILD_ID, 0) == -Errno.ENODATA
    assert call(machine, Nr.XEN_VERSION, Version.PAGESIZE, 0) == 4096
    assert call(machine, Nr.XEN_VERSION, Version.PAGESIZE, PAGE) == -Errno.EINVAL
    assert call(machine, Nr.XEN_VERSION, 15, PAGE) == -Errno.ENOSYS
    assert guest.invoke(Nr.XEN_VERSION, Version.GET_FEATURES, submap_idx=1).result == -Errno.EINVAL


@pytest.mark.parametrize(
    ("options", "write", "read"),
    [
        ({}, -Errno.EPERM, -Errno.EPERM),
        ({"debug_build": True}, 0, -Errno.EPERM),
        ({"control_domain": True}, 0, 0),
    ],
)
def test_who_may_use_the_console(options, write, read):
    machine = machine_of(**options)
    guest = guest_of(machine)
    guest.write(PAGE, b"hello\x01\n" + b"x" * 300)
    assert call(machine, Nr.CONSOLE_IO, 0, 307, PAGE) == write
    assert call(machine, Nr.CONSOLE_IO, 1, 5, PAGE) == read
    if not write:
        expected = b"hello\x01\n" if options == {"control_domain": True} else b"hello\n"
        domid = 0 if "control_domain" in options else 1
        assert xen(machine).domains[domid].console == expected + b"x" * 300


def test_limits_of_the_console():
    machine = machine_of(control_domain=True)
    assert call(machine, Nr.CONSOLE_IO, 1, 1 << 31, PAGE) == -Errno.E2BIG
    assert call(machine, Nr.CONSOLE_IO, 2, 1, PAGE) == -Errno.ENOSYS
    assert call(machine, Nr.CONSOLE_IO, 0, 1, 1 << 40) == -Errno.EFAULT


def test_a_pirq_stands_for_an_emulated_line(machine):
    guest = guest_of(machine)
    from sevlab.plugins.xen.arguments import MapPirq

    def map_pirq(**fields):
        guest.write(
            BOUNCE, MapPirq.build(**({"domid": Domid.SELF, "type": 1, "index": 9, "pirq": 0xFFFF_FFFF} | fields))
        )
        return guest.call(Nr.PHYSDEV_OP, Physdevop.MAP_PIRQ, BOUNCE), guest.number(BOUNCE + 12)

    assert map_pirq()[0] == -Errno.EINVAL
    guest.set_callback_vector(0xF3)
    result, pirq = map_pirq()
    assert result == 0
    assert map_pirq(index=48)[0] == -Errno.EINVAL
    assert map_pirq(type=0)[0] == -Errno.EINVAL
    assert map_pirq(domid=2)[0] == -Errno.EPERM
    port = guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_PIRQ, pirq=pirq).fields["port"]
    guest.map_page(MapSpace.SHARED_INFO, 0, INFO)
    machine.apply(BackendEvent(1, "gsi", 9, 0))
    assert guest.pending(INFO) == {port}
    guest.write(BOUNCE, pirq.to_bytes(8, "little"))
    assert guest.call(Nr.PHYSDEV_OP, Physdevop.IRQ_STATUS_QUERY, BOUNCE) == 0
    assert guest.number(BOUNCE + 4) == 1
    assert guest.call(Nr.PHYSDEV_OP, Physdevop.EOI, BOUNCE) == 0
    guest.write(BOUNCE, (0x7FF0 | pirq << 32).to_bytes(8, "little"))
    assert guest.call(Nr.PHYSDEV_OP, Physdevop.UNMAP_PIRQ, BOUNCE) == 0
    assert not xen(machine).domains[1].pirqs


def test_a_vector_of_vcpu_0s_own_is_enough_for_pirqs(machine):
    from sevlab.plugins.xen.arguments import MapPirq

    guest = guest_of(machine)
    guest.invoke(Nr.HVM_OP, Hvmop.SET_EVTCHN_UPCALL_VECTOR, vcpu=0, vector=0xF3)
    guest.write(BOUNCE, MapPirq.build(domid=Domid.SELF, type=1, index=9, pirq=0xFFFF_FFFF))
    assert guest.call(Nr.PHYSDEV_OP, Physdevop.MAP_PIRQ, BOUNCE) == 0


def test_operations_of_the_hardware_domain_do_not_exist(machine):
    for command in (0, 6, 17, 21, 24, 25, 26, 29, 32, 33):
        assert call(machine, Nr.PHYSDEV_OP, command, PAGE) == -Errno.ENOSYS


@pytest.mark.parametrize(("number", "version"), [(Nr.SYSCTL, 0x16), (Nr.DOMCTL, 0x18), (Nr.PLATFORM_OP, 0x03000001)])
def test_toolstack_calls_check_the_version_before_the_caller(machine, number, version):
    guest = guest_of(machine)
    guest.write(PAGE, ControlHead.build(cmd=1, interface_version=version - 1))
    assert call(machine, number, PAGE) == -Errno.EACCES
    guest.write(PAGE, ControlHead.build(cmd=1, interface_version=version))
    assert call(machine, number, PAGE) == -Errno.EPERM
    assert call(machine, number, 1 << 40) == -Errno.EFAULT


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1 << 31])
def test_dm_op_tests_the_count_of_buffers(count):
    machine = machine_of(control_domain=True)
    guest = guest_of(machine)
    guest.write(PAGE, DmOpBuf.build(handle=PAGE + 64, length=4) * 2)
    expected = {0: -Errno.EFAULT, 1: -Errno.EOPNOTSUPP, 2: -Errno.EOPNOTSUPP}.get(count, -Errno.E2BIG)
    assert call(machine, Nr.DM_OP, 1, count, PAGE) == expected
    assert call(machine, Nr.DM_OP, Domid.SELF, 0, PAGE) == -Errno.EPERM
    assert call(machine, Nr.DM_OP, 9, 0, PAGE) == -Errno.ESRCH


def test_the_rest_is_off_or_for_others(machine):
    assert call(machine, Nr.ARGO_OP, 1) == -Errno.EOPNOTSUPP
    assert call(machine, Nr.XENPMU_OP, 0, 0) == -Errno.EOPNOTSUPP
    assert call(machine, Nr.XSM_OP, 0) == -Errno.ENOSYS
    assert call(machine, Nr.HYPFS_OP, 0) == -Errno.EPERM
    assert call(machine, Nr.COCO_OP, 0, PAGE) == -Errno.EPERM
    assert call(machine, Nr.VM_ASSIST, 0, 5) == 0
    assert call(machine, Nr.VM_ASSIST, 0, 4) == -Errno.EINVAL
    assert call(machine, Nr.VM_ASSIST, 2, 5) == -Errno.ENOSYS


@pytest.mark.parametrize(
    ("plugins", "platform", "flags"), [((), 0, 0), (("sme", "sev"), 1, 0), (("sme", "sev", "sev_es"), 1, 1)]
)
def test_coco_op_says_what_the_host_can_encrypt(plugins, platform, flags):
    machine = machine_of(plugins=plugins, control_domain=True)
    guest = guest_of(machine)
    assert call(machine, Nr.COCO_OP, 0, PAGE) == 0
    status = PlatformStatus.from_bytes(guest.read(PAGE, 24))
    assert (status.platform, status.platform_flags, status.flags) == (platform, flags, platform)


def trace(guest, event, extra_bytes):
    guest.write(BOUNCE, Xentrace.build(event=event, extra_bytes=extra_bytes, extra=bytes(range(28))))
    return guest.machine.apply(HypercallStep(0, Nr.HVM_OP, Hvmop.XENTRACE, BOUNCE, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(("event", "extra_bytes"), [(0, 0), (0xFFF, 28), (5, 8)])
def test_a_guest_traces_events_of_its_own(machine, event, extra_bytes):
    traced = trace(guest_of(machine), event, extra_bytes).first(Traced)
    assert traced == (0, 0x0800_F000 | event, bytes(range(extra_bytes)))


@pytest.mark.parametrize(("event", "extra_bytes"), [(0x1000, 0), (1, 29), (1, 32), (1, 2)])
def test_an_event_of_another_class_or_size_is_refused(machine, event, extra_bytes):
    outcome = trace(guest_of(machine), event, extra_bytes)
    assert outcome.first(Traced) is None
    assert outcome.first(Hypercalled).result == -Errno.EINVAL & (1 << 64) - 1
