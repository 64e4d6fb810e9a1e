"""Never run, only type-checked: the types that users see."""

from __future__ import annotations

from typing import assert_type

from sevlab.core.buffers import CheckedBuffer
from sevlab.core.cpu import Vcpu, VmcbControl
from sevlab.core.events import Data, HostMsr
from sevlab.core.layout import Layout, array, flag, raw_bytes, u16, u32, u64
from sevlab.core.machine import Machine
from sevlab.core.vocabulary import Outcome


class Sample(Layout, size=64):
    number = u64(0)
    absent = u32(8, since=2)
    bit = flag(12, u16, 3)
    name = raw_bytes(16, 4)
    many = array(24, 2, u16)


window = Sample(CheckedBuffer(64))
assert_type(window.number, int)
assert_type(window.absent, int | None)
assert_type(window.bit, int)
assert_type(window.name, bytes)
assert_type(window.many, tuple[int, ...])
assert_type(Sample.from_bytes(b""), Sample)
assert_type(Sample.build(number=1), bytes)
assert_type(VmcbControl.from_bytes(b"").guest_asid, int)

machine = Machine()
assert_type(machine.apply(HostMsr(1, False, 0)), Outcome)
assert_type(machine.apply(HostMsr(1, False, 0)).first(Data), Data | None)
assert_type(machine.vcpus[0], Vcpu)
assert_type(machine.vcpus[0].regs.rax, int)
