"""The register ABI: mode, privilege, widths, results, continuations, multicall, debug builds."""

from __future__ import annotations

import pytest
from sevlab.core.cpu import GPR_NAMES, Registers
from sevlab.core.events import CpuExit
from sevlab.core.hypercall import CodeMode, HypercallEnd, HypercallFrame
from sevlab.core.svm import ExitCode
from sevlab.core.testing import assert_changes_nothing
from sevlab.plugins.xen import Errno, Hypercalled, HypercallStep, Memop, Nr, Schedop
from sevlab.plugins.xen.arguments import AddToPhysmap, MemoryReservation, MemoryReservation32
from sevlab.plugins.xen.layout import MulticallEntry, MulticallEntry32
from sevlab.plugins.xen.numbers import Domid, MapSpace, Version

from tests.plugins.xen.world import (
    ARGUMENTS_32,
    BOUNCE,
    PAGE,
    VMMCALL,
    call,
    called,
    guest_of,
    machine_of,
    registers_of,
    vmmcall,
)

NEW_PAGE = 0x40000
XEN_4_17 = 4 << 16 | 17


def test_the_arguments_of_64_bit_code_are_in_rdi_rsi_rdx_r10_r8():
    machine = machine_of()
    guest = guest_of(machine)
    guest.write(PAGE, bytes(8))
    assert call(machine, Nr.XEN_VERSION, Version.GET_FEATURES, PAGE) == 0
    assert guest.number(PAGE + 4) & 1 << 8


def test_the_arguments_of_32_bit_code_are_in_ebx_ecx_edx_esi_edi():
    machine = machine_of(start="protected")
    guest = guest_of(machine)
    guest.write(PAGE, bytes(8))
    assert call(machine, Nr.XEN_VERSION, Version.GET_FEATURES, PAGE, names=ARGUMENTS_32) == 0
    assert guest.number(PAGE + 4) & 1 << 8


def test_real_mode_calls_without_a_privilege_check():
    machine = machine_of(start="reset")
    machine.vcpus[0].system.cpl = 3
    assert call(machine, Nr.XEN_VERSION, 0, names=ARGUMENTS_32) == XEN_4_17


@pytest.mark.parametrize("start", ["protected", "long"])
def test_user_mode_is_eperm_and_rip_advances(start):
    machine = machine_of(start=start)
    machine.vcpus[0].system.cpl = 3
    regs = registers_of(machine, rax=17, rip=0x1000)
    vmmcall(machine)
    assert (regs.rax, regs.rip) == (-1 & (0xFFFF_FFFF if start == "protected" else (1 << 64) - 1), 0x1003)
    machine.vcpus[0].system.cpl = 0
    assert call(machine, 17, 0, names=("rdi",) if start == "long" else ("rbx",)) == XEN_4_17


def test_virtual_8086_mode_is_always_eperm():
    machine = machine_of(start="protected")
    machine.vcpus[0].regs.rflags |= 1 << 17
    assert call(machine, 17, 0, names=ARGUMENTS_32) == 0xFFFF_FFFF


@pytest.mark.parametrize("number", [0, 1, 11, 23, 44, 48, 49, 63, 127, 200, 1 << 30 | 17, 1 << 31, 1 << 32 | 17])
def test_an_absent_number_is_enosys_and_leaves_the_arguments(number):
    machine = machine_of(debug_build=True)
    regs = registers_of(machine, rdi=1, rsi=2, rdx=3, r10=4, r8=5)
    assert call(machine, number) == -Errno.ENOSYS
    assert [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8] == [1, 2, 3, 4, 5]


def test_upper_halves_of_32_bit_code_are_cleared_before_the_call():
    machine = machine_of(start="protected")
    regs = registers_of(machine, rip=0x1000, **{name: 0xDEAD_0000_0000_0000 for name in GPR_NAMES if name != "rip"})
    registers_of(machine, rax=0xDEAD_0000_0000_0011)
    vmmcall(machine)
    assert regs.rax == XEN_4_17
    assert [name for name in GPR_NAMES if getattr(regs, name) >> 32] == [f"r{n}" for n in range(8, 16)]


def test_arguments_declared_as_int_are_cut_to_32_bits_and_longs_are_not():
    machine = machine_of()
    assert call(machine, Nr.XEN_VERSION, 1 << 32) == XEN_4_17
    assert call(machine, Nr.HVM_OP, 1 << 32 | 5, 0) == -Errno.ENOSYS


def test_a_debug_build_poisons_the_registers_of_the_arguments_only():
    machine = machine_of(debug_build=True)
    regs = registers_of(machine, rdx=3)
    call(machine, Nr.XEN_VERSION, 0, 0)
    assert (regs.rdi, regs.rsi, regs.rdx) == (0xDEAD_BEEF_DEAD_F00D, 0xDEAD_BEEF_DEAD_F00D, 3)


def test_the_record_says_number_abi_and_result():
    machine = machine_of(abi="physical")
    registers_of(machine, rax=17 | 1 << 30, rdi=0)
    assert called(vmmcall(machine)) == Hypercalled(0, 17, "physical", XEN_4_17, False)


def test_a_vm_that_is_made_later_is_no_domain():
    from sevlab.core.config import GuestConfig

    machine = machine_of()
    vm = machine.create_guest(GuestConfig(memory_bytes=1 << 20))
    vcpu = vm.vcpu_ids[0]
    machine.vcpus[vcpu].vmcb.intercept(ExitCode.VMMCALL)
    assert call(machine, 17, 0, vcpu=vcpu, names=ARGUMENTS_32) == 0x1_0000_0000 - Errno.ENOSYS


# Buffers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handle", [16 << 20, 1 << 40, (1 << 64) - 4, 1 << 63, (16 << 20) - 4])
def test_a_buffer_that_is_not_there_is_efault_and_nothing_changes(handle):
    machine = machine_of()
    registers_of(machine, rax=Nr.XEN_VERSION, rdi=Version.GET_FEATURES, rsi=handle)
    before = machine.memory.capture()
    vmmcall(machine)
    assert machine.vcpus[0].regs.rax == -Errno.EFAULT & (1 << 64) - 1
    assert machine.memory.capture() == before


def test_a_buffer_may_cross_a_page_where_both_are_there():
    machine = machine_of()
    guest = guest_of(machine)
    guest.write(PAGE + 4092, bytes(8))
    assert call(machine, Nr.XEN_VERSION, Version.GET_FEATURES, PAGE + 4092) == 0
    assert guest.number(PAGE + 4096)


def test_the_legacy_walk_honours_read_only_pages():
    machine = machine_of()
    guest = guest_of(machine)
    tables = (16 << 20) - 8 * 4096 + 2 * 4096
    entry = guest.number(tables, 8)
    guest.write(tables, (entry & ~2).to_bytes(8, "little"))
    assert call(machine, Nr.XEN_VERSION, Version.GET_FEATURES, PAGE) == -Errno.EFAULT
    assert call(machine, Nr.XEN_VERSION, Version.EXTRAVERSION2, 0) == 2


# Continuations ----------------------------------------------------------------------------------------------------

EXTENTS = 20


def reservation(machine, narrow=False):
    guest = guest_of(machine)
    layout, width = (MemoryReservation32, 4) if narrow else (MemoryReservation, 8)
    frames = b"".join((0x100 + index).to_bytes(width, "little") for index in range(EXTENTS))
    guest.write(PAGE, frames)
    guest.write(BOUNCE, layout.build(extent_start=PAGE, nr_extents=EXTENTS, domid=Domid.SELF))
    return guest


@pytest.mark.parametrize("start", ["long", "protected"])
def test_a_preempted_memory_op_keeps_its_start_extent_in_the_command(start):
    machine = machine_of(start=start, preempt_after=6)
    narrow = start == "protected"
    reservation(machine, narrow)
    names = ARGUMENTS_32 if narrow else ("rdi", "rsi")
    regs = registers_of(
        machine, rip=0x1000, rax=Nr.MEMORY_OP, **{names[0]: Memop.DECREASE_RESERVATION, names[1]: BOUNCE}
    )
    seen = []
    while True:
        outcome = vmmcall(machine)
        seen.append(getattr(regs, names[0]) >> 6 if called(outcome).preempted else regs.rax)
        if not called(outcome).preempted:
            break
        assert (regs.rip, regs.rax, getattr(regs, names[0]) & 0x3F) == (
            0x1000,
            Nr.MEMORY_OP,
            Memop.DECREASE_RESERVATION,
        )
        assert len(seen) < EXTENTS
    assert seen[-1] == EXTENTS
    assert seen[:-1] == sorted(set(seen[:-1]))
    assert regs.rip == 0x1003


def test_a_step_repeats_a_preempted_call_to_its_end():
    machine = machine_of(preempt_after=2)
    reservation(machine)
    outcome = machine.apply(HypercallStep(0, Nr.MEMORY_OP, Memop.DECREASE_RESERVATION, BOUNCE, 0, 0, 0, 0, 0))
    calls = [record for record in outcome.records if isinstance(record, Hypercalled)]
    assert len(calls) > 5
    assert (calls[-1].result, calls[-1].preempted) == (EXTENTS, False)
    assert all(record.preempted for record in calls[:-1])


def test_a_continuation_of_the_physical_abi_keeps_its_flag():
    machine = machine_of(abi="physical", preempt_after=4)
    reservation(machine)
    regs = registers_of(machine, rax=Nr.MEMORY_OP | 1 << 30, rdi=Memop.DECREASE_RESERVATION, rsi=BOUNCE)
    assert called(vmmcall(machine)).preempted
    assert regs.rax == Nr.MEMORY_OP | 1 << 30


# Multicall --------------------------------------------------------------------------------------------------------


def multicall(guest, *entries, layout=MulticallEntry):
    data = b"".join(layout.build(op=op, args=(*args, *(0,) * (6 - len(args))), result=0x55) for op, *args in entries)
    guest.write(PAGE, data)
    return [layout.from_bytes(guest.read(PAGE + index * layout.SIZE, layout.SIZE)) for index in range(len(entries))]


def results(guest, count, layout=MulticallEntry):
    return [layout.from_bytes(guest.read(PAGE + index * layout.SIZE, layout.SIZE)).result for index in range(count)]


def test_a_multicall_runs_its_entries_in_order():
    machine = machine_of()
    guest = guest_of(machine)
    multicall(guest, (Nr.XEN_VERSION, 0), (99,), (Nr.SCHED_OP, Schedop.YIELD), (Nr.XEN_VERSION, 7))
    assert call(machine, Nr.MULTICALL, PAGE, 4) == 0
    assert results(guest, 4) == [XEN_4_17, (1 << 64) - Errno.ENOSYS, 0, 4096]


def test_a_multicall_goes_on_in_the_page_that_an_entry_put_there():
    """A buffer's page is looked up once, and again after the physmap changed."""
    machine = machine_of()
    guest = guest_of(machine)
    multicall(guest, (99,), (Nr.XEN_VERSION, 0))
    guest.write(NEW_PAGE, guest.read(PAGE, 4096))
    guest.write(BOUNCE, AddToPhysmap.build(domid=Domid.SELF, space=MapSpace.GMFN, idx=NEW_PAGE >> 12, gpfn=PAGE >> 12))
    multicall(guest, (Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP, BOUNCE), (99,))
    assert call(machine, Nr.MULTICALL, PAGE, 2) == 0
    assert results(guest, 2) == [0, XEN_4_17]


def test_a_multicall_of_32_bit_code_has_32_byte_entries():
    machine = machine_of(start="protected")
    guest = guest_of(machine)
    multicall(guest, (Nr.XEN_VERSION, 0), (99,), layout=MulticallEntry32)
    assert call(machine, Nr.MULTICALL, PAGE, 2, names=ARGUMENTS_32) == 0
    assert results(guest, 2, MulticallEntry32) == [XEN_4_17, (1 << 32) - Errno.ENOSYS]


def test_a_multicall_in_a_multicall_is_einval():
    machine = machine_of()
    guest = guest_of(machine)
    multicall(guest, (Nr.MULTICALL, PAGE, 1), (Nr.XEN_VERSION, 0))
    assert call(machine, Nr.MULTICALL, PAGE, 2) == 0
    assert results(guest, 2) == [(1 << 64) - Errno.EINVAL, XEN_4_17]


def test_a_multicall_stops_at_an_entry_that_is_not_there():
    machine = machine_of()
    guest = guest_of(machine)
    end = (16 << 20) - 64
    guest.write(end, MulticallEntry.build(op=Nr.XEN_VERSION))
    assert call(machine, Nr.MULTICALL, end, 2) == -Errno.EFAULT
    assert guest.number(end + 8, 8) == XEN_4_17


def test_a_preempted_multicall_goes_on_with_the_entries_that_are_left():
    machine = machine_of(preempt_after=3)
    guest = guest_of(machine)
    multicall(guest, *[(Nr.XEN_VERSION, 0)] * 8)
    regs = registers_of(machine, rip=0x1000, rax=Nr.MULTICALL, rdi=PAGE, rsi=8)
    assert called(vmmcall(machine)).preempted
    done = (regs.rdi - PAGE) // 64
    assert (regs.rax, regs.rsi, regs.rip) == (Nr.MULTICALL, 8 - done, 0x1000)
    assert results(guest, 8) == [XEN_4_17] * done + [0x55] * (8 - done)
    machine.apply(HypercallStep(0, Nr.MULTICALL, regs.rdi, regs.rsi, 0, 0, 0, 0, 0))
    assert results(guest, 8) == [XEN_4_17] * 8


def test_a_preempted_entry_is_written_back_and_continued():
    machine = machine_of(preempt_after=4)
    guest = reservation(machine)
    guest.write(0x40000, MulticallEntry.build(op=Nr.MEMORY_OP, args=(Memop.DECREASE_RESERVATION, BOUNCE, 0, 0, 0, 0)))
    regs = registers_of(machine, rax=Nr.MULTICALL, rdi=0x40000, rsi=1)
    assert called(vmmcall(machine)).preempted
    entry = MulticallEntry.from_bytes(guest.read(0x40000, 64))
    assert entry.args[0] & 0x3F == Memop.DECREASE_RESERVATION
    assert 0 < entry.args[0] >> 6 < EXTENTS
    assert (regs.rax, regs.rdi, regs.rsi) == (Nr.MULTICALL, 0x40000, 1)
    for _ in range(EXTENTS):
        if not called(vmmcall(machine)).preempted:
            break
    assert MulticallEntry.from_bytes(guest.read(0x40000, 64)).result == EXTENTS


def test_a_debug_build_wipes_used_entries_except_the_result():
    machine = machine_of(debug_build=True)
    guest = guest_of(machine)
    multicall(guest, (Nr.XEN_VERSION, 0))
    call(machine, Nr.MULTICALL, PAGE, 1)
    data = guest.read(PAGE, 64)
    assert data[8:16] == XEN_4_17.to_bytes(8, "little")
    assert data[:8] + data[16:] == b"\xaa" * 56


# Through the GHCB -------------------------------------------------------------------------------------------------


def frame_of(given=None, cpl=0, **values):
    return HypercallFrame(
        Registers(**values),
        cpl=cpl,
        mode=CodeMode.BITS_64,
        given=None if given is None else frozenset(given),
    )


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ((), HypercallEnd.MISSING_INPUT),
        (("rax",), HypercallEnd.MISSING_INPUT),
        (("rax", "rdi"), HypercallEnd.MISSING_INPUT),
        (("rax", "rdi", "rsi"), HypercallEnd.COMPLETED),
    ],
)
def test_registers_that_the_call_needs_must_have_been_given(given, end):
    machine = machine_of()
    frame = frame_of(given, rax=Nr.XEN_VERSION)
    before = machine.snapshot()
    assert machine.slots.hypercall(machine, machine.vcpus[0], frame) is end
    if end is HypercallEnd.MISSING_INPUT:
        assert machine.snapshot() == before
        assert not frame.written
    else:
        assert frame.registers.rax == XEN_4_17
        assert frame.written == {"rax"}


def test_the_privilege_level_of_the_frame_decides():
    machine = machine_of()
    frame = frame_of(("rax",), cpl=3, rax=17)
    assert machine.slots.hypercall(machine, machine.vcpus[0], frame) is HypercallEnd.COMPLETED
    assert frame.registers.rax == (1 << 64) - Errno.EPERM


def test_an_unknown_vcpu_is_refused():
    machine = machine_of()
    assert_changes_nothing(machine, HypercallStep(99, 17, 0, 0, 0, 0, 0, 0, 0))
    assert machine.apply(CpuExit(0, ExitCode.VMMCALL, 0, 0, VMMCALL, 0)).records
