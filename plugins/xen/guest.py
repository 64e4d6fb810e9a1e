"""A guest that talks to Xen as a paravirtualised kernel does, one step at a time.

It keeps a bounce area of shared pages: arguments go through it whatever the ABI, since a buffer must not be private.
Source: the wrappers of Vates's Linux branches (hypercall bounce); Linux arch/x86/xen/enlighten_hvm.c,
drivers/tty/hvc/hvc_xen.c, drivers/xen/grant-table.c for the order of things.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.core.events import Data, MemoryRead, MemoryWrite, Party, Space
from sevlab.core.units import MASK32, PAGE_BYTES, PAGE_SHIFT
from sevlab.plugins.xen.arguments import AddToPhysmap, GrantCopy, Shape
from sevlab.plugins.xen.call import Abi
from sevlab.plugins.xen.discovery import ALT_ABI, LEAVES, SIGNATURE, VIRIDIAN_SHIFT
from sevlab.plugins.xen.hypercalls import event_channel, grant_table, hvm, memory, sched, vcpu, version
from sevlab.plugins.xen.layout import GrantEntryV1, SharedInfo, XenconsInterface
from sevlab.plugins.xen.numbers import (
    ABI_FLAG,
    Domid,
    Evtchnop,
    Gnttabop,
    Gtf,
    Hvmop,
    MapSpace,
    Memop,
    Nr,
    Param,
    Version,
)
from sevlab.plugins.xen.operations import FAST_REGISTERS, Operation, signed
from sevlab.plugins.xen.records import HypercallStep

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.layout import Layout
    from sevlab.core.machine import Machine

Tables = Mapping[int, Mapping[int, Operation]]
LEGACY_TABLES: Tables = {
    Nr.EVENT_CHANNEL_OP: event_channel.OPERATIONS,
    Nr.GRANT_TABLE_OP: grant_table.OPERATIONS,
    Nr.HVM_OP: hvm.OPERATIONS,
    Nr.MEMORY_OP: memory.OPERATIONS,
    Nr.SCHED_OP: sched.OPERATIONS,
    Nr.VCPU_OP: vcpu.OPERATIONS,
    Nr.XEN_VERSION: version.OPERATIONS,
}
FAST_TABLES: Tables = {
    **LEGACY_TABLES,
    Nr.GRANT_TABLE_OP: grant_table.FAST_OPERATIONS,
    Nr.SCHED_OP: sched.FAST_OPERATIONS,
    Nr.VCPU_OP: vcpu.FAST_OPERATIONS,
}

LEAF_BASES = (LEAVES, LEAVES + VIRIDIAN_SHIFT)
"""Where Xen's leaves begin: Linux looks every 100h up to 40010000h."""

Transport = Callable[[int, Mapping[str, int]], Mapping[str, int]]
"""Executes VMMCALL with RAX and these registers; returns the registers afterwards."""


class Answer(NamedTuple):
    """What a call gave: its result (negative is an error) and the structure's fields afterwards."""

    result: int
    fields: Mapping[str, int]


class XenGuest:
    """A 64-bit guest on vCPU `vcpu_id`. `bounce_gpa` is a shared page for arguments; `convert(gpa)` makes a page
    shared where that takes more than a mapping without C-bit; `linear` maps a guest-physical to a linear address.
    """

    def __init__(
        self,
        machine: Machine,
        vcpu_id: int = 0,
        *,
        abi: Abi = Abi.LEGACY,
        bounce_gpa: int,
        convert: Callable[[int], None] | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.machine = machine
        self.vcpu_id = vcpu_id
        self.abi = abi
        self.bounce_gpa = bounce_gpa
        self._convert = convert
        self._transport = transport or self._vmmcall
        self.share(bounce_gpa)

    # Memory ---------------------------------------------------------------------------------------------------------

    def share(self, gpa: int) -> None:
        """Make a page shared and empty it."""
        if self._convert is not None:
            self._convert(gpa & -PAGE_BYTES)
        self.write(gpa & -PAGE_BYTES, bytes(PAGE_BYTES))

    def write(self, gpa: int, data: bytes, *, private: bool = False) -> None:
        """Write as the guest, without C-bit unless `private`."""
        self.machine.apply(MemoryWrite(Party.GUEST, self.vcpu_id, Space.GPA, gpa, private, data))

    def read(self, gpa: int, length_bytes: int, *, private: bool = False) -> bytes:
        """Read as the guest."""
        outcome = self.machine.apply(MemoryRead(Party.GUEST, self.vcpu_id, Space.GPA, gpa, private, length_bytes))
        data = outcome.first(Data)
        return b"" if data is None else data.data

    def number(self, gpa: int, width_bytes: int = 4) -> int:
        """Read a number from shared memory."""
        return int.from_bytes(self.read(gpa, width_bytes), "little")

    # Calls ----------------------------------------------------------------------------------------------------------

    def _vmmcall(self, rax: int, registers: Mapping[str, int]) -> Mapping[str, int]:
        names = FAST_REGISTERS[1:] if self.abi is Abi.FAST and rax & ABI_FLAG else ("rdi", "rsi", "rdx", "r10", "r8")
        values = [registers.get(name, 0) for name in names] + [0] * (7 - len(names))
        self.machine.apply(HypercallStep(self.vcpu_id, rax, *values))
        regs = self.machine.vcpus[self.vcpu_id].regs
        return {name: getattr(regs, name) for name in FAST_REGISTERS}

    def call(self, number: int, *args: int) -> int:
        """A hypercall with these numbers in the registers of the legacy and physical ABI."""
        flag = ABI_FLAG if self.abi is Abi.PHYSICAL else 0
        registers = dict(zip(("rdi", "rsi", "rdx", "r10", "r8"), args, strict=False))
        return signed(self._transport(number | flag, registers)["rax"], 64)

    def invoke(self, number: int, command: int, *, on: int | None = None, **fields: int) -> Answer:
        """A sub-operation with its structure, in the guest's ABI; those of vcpu_op work `on` a vCPU of the domain."""
        tables = FAST_TABLES if self.abi is Abi.FAST else LEGACY_TABLES
        operation = tables[number][command]
        if self.abi is Abi.FAST and operation.fast is not None:
            return self._fast(number, command, operation, on, fields)
        layout = _wide(operation.shape)
        handle = 0
        if layout is not None:
            self.write(self.bounce_gpa, layout.build(**fields))
            handle = self.bounce_gpa
        args = (command, handle) if on is None else (command, on, handle)
        if number == Nr.GRANT_TABLE_OP:
            args = (command, handle, 1)
        result = self.call(number, *args)
        if layout is None:
            return Answer(result, {})
        after: Any = layout.from_bytes(self.read(self.bounce_gpa, layout.SIZE))
        return Answer(result, {name: getattr(after, name) for name in layout.FIELDS})

    def _fast(
        self, number: int, command: int, operation: Operation, on: int | None, fields: Mapping[str, int]
    ) -> Answer:
        registers = {"rdi": command}
        if on is not None:
            registers["rsi"] = on
        for name, index in operation.fast or ():
            registers[FAST_REGISTERS[index]] = fields.get(name, 0)
        after = self._transport(number | ABI_FLAG, registers)
        outputs = {name: after[FAST_REGISTERS[index]] for name, index in operation.fast_outputs}
        return Answer(signed(after["rax"], 64), outputs)

    def batch(self, command: int, layout: type[Layout], elements: Sequence[Mapping[str, int]]) -> tuple[int, list[int]]:
        """A grant operation on an array; returns the result and the signed status of each element."""
        self.write(self.bounce_gpa, b"".join(layout.build(**element) for element in elements))
        result = self.call(Nr.GRANT_TABLE_OP, command, self.bounce_gpa, len(elements))
        data = self.read(self.bounce_gpa, layout.SIZE * len(elements))
        chunks = [data[start : start + layout.SIZE] for start in range(0, len(data), layout.SIZE)]
        after: list[Any] = [layout.from_bytes(chunk) for chunk in chunks]
        return result, [signed(item.status, 16) for item in after]

    def offered_abi(self) -> Abi:
        """Which ABI the host has beside the legacy one. CPUID has one bit for both; a call without memory tells them
        apart: the page size is a number in the physical-address ABI, and not among FastABI's calls.
        """
        base = next((leaf for leaf in LEAF_BASES if self.machine.cpuid(self._vcpu, leaf, 0)[1:] == SIGNATURE), None)
        if base is None or not self.machine.cpuid(self._vcpu, base + 4, 0)[0] & ALT_ABI:
            return Abi.LEGACY
        result = self._transport(Nr.XEN_VERSION | ABI_FLAG, {"rdi": Version.PAGESIZE, "rsi": 0})["rax"]
        return Abi.PHYSICAL if result == PAGE_BYTES else Abi.FAST

    @property
    def _vcpu(self) -> Vcpu:
        return self.machine.vcpus[self.vcpu_id]

    # What a kernel does -----------------------------------------------------------------------------------------------

    def map_page(self, space: MapSpace, index: int, gpa: int) -> int:
        """Let Xen map one of its pages at `gpa`; FastABI has no such call, so the buffer is passed in the other ABI."""
        self.write(
            self.bounce_gpa, AddToPhysmap.build(domid=Domid.SELF, space=space, idx=index, gpfn=gpa >> PAGE_SHIFT)
        )
        return self.call(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP, self.bounce_gpa)

    def set_callback_vector(self, vector: int) -> int:
        """Have events delivered by `vector`."""
        value = 2 << 56 | vector
        return self.invoke(Nr.HVM_OP, Hvmop.SET_PARAM, domid=Domid.SELF, index=Param.CALLBACK_IRQ, value=value).result

    def param(self, index: Param) -> int:
        """A parameter's value, or a negative error."""
        answer = self.invoke(Nr.HVM_OP, Hvmop.GET_PARAM, domid=Domid.SELF, index=index)
        return answer.fields["value"] if answer.result == 0 else answer.result

    def console_write(self, text: bytes) -> int:
        """Put text into the console ring and notify the backend; returns the result of the notification."""
        ring = self.param(Param.CONSOLE_PFN) << PAGE_SHIFT
        fields = XenconsInterface.FIELDS
        produced = self.number(ring + fields["out_prod"].offset)
        for index, byte in enumerate(text):
            self.write(ring + fields["output"].offset + (produced + index & 2047), bytes((byte,)))
        self.write(ring + fields["out_prod"].offset, (produced + len(text) & MASK32).to_bytes(4, "little"))
        return self.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, port=self.param(Param.CONSOLE_EVTCHN)).result

    def pending(self, shared_info_gpa: int) -> set[int]:
        """Ports that are pending in a mapped shared_info (two levels)."""
        info = SharedInfo.FIELDS["evtchn_pending"]
        bits = int.from_bytes(self.read(shared_info_gpa + info.offset, info.length_bytes), "little")
        return {port for port in range(bits.bit_length()) if bits >> port & 1}

    def acknowledge(self, shared_info_gpa: int) -> None:
        """Clear the upcall flag, the selector and all pending bits, as an upcall handler does."""
        info = SharedInfo.FIELDS["evtchn_pending"]
        self.write(shared_info_gpa, b"\0")
        self.write(shared_info_gpa + 8, bytes(8))
        self.write(shared_info_gpa + info.offset, bytes(info.length_bytes))

    def grant(self, frames_gpa: int, ref: int, domid: int, gpa: int, *, readonly: bool = False) -> None:
        """Grant the page at `gpa` to a domain, in a mapped grant frame of version 1."""
        flags = Gtf.PERMIT_ACCESS | (Gtf.READONLY if readonly else 0)
        entry = GrantEntryV1.build(flags=flags, domid=domid, frame=gpa >> PAGE_SHIFT)
        self.write(frames_gpa + ref * GrantEntryV1.SIZE, entry)

    def grant_copy(self, **fields: int) -> tuple[int, list[int]]:
        """One grant copy."""
        return self.batch(Gnttabop.COPY, GrantCopy, [fields])


def _wide(shape: type[Layout] | Shape | None) -> type[Layout] | None:
    return shape.wide if isinstance(shape, Shape) else shape
