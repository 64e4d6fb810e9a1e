"""Sub-operations as data: which structure an operation takes, what it writes back, which registers FastABI uses.

An operation is a function of the call and its arguments, an object with the structure's fields; it returns 0 or
more, or a negated `Errno`, and sets the fields that are outputs, and no others. Where the arguments come from is the
ABI's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.core.units import MASK64
from sevlab.plugins.xen.arguments import Shape
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.numbers import Domid, Errno

if TYPE_CHECKING:
    from sevlab.core.layout import Layout

FAST = Abi.FAST
FAST_REGISTERS = ("rax", "rdi", "rsi", "r8", "r9", "r10", "r11", "r12")
"""FastABI register n. Source: Vates docs/guest-guide/x86/fastabi.pandoc."""


class Operation(NamedTuple):
    """One sub-operation.

    `shape`: its structure, None when it takes only the handle or nothing. `outputs`: fields written back on success.
    `fast`: field and FastABI register number of each input; `fast_outputs` likewise; None: no FastABI form.
    """

    run: Callable[[Call, Any], int]
    shape: type[Layout] | Shape | None = None
    outputs: tuple[str, ...] = ()
    fast: tuple[tuple[str, int], ...] | None = None
    fast_outputs: tuple[tuple[str, int], ...] = ()
    always: bool = False
    """The outputs are written back whatever the result."""


def run_operation(call: Call, operations: Mapping[int, Operation], command: int, handle: int) -> int:
    """Carry out `command` with the structure at `handle` (or in FastABI's registers).

    An unknown command is ENOSYS, a structure that cannot be read or written EFAULT. When writing back fails the effect
    stays, as in Xen, whose code says that cleaning up would be a mess.
    """
    operation = operations.get(command)
    if operation is None:
        return -Errno.ENOSYS
    if call.abi is FAST:
        return _run_fast(call, operation)
    if operation.shape is None:
        return operation.run(call, handle)
    snapshot = call.read(handle, operation.shape)
    if snapshot is None:
        return -Errno.EFAULT
    if not operation.outputs:
        return operation.run(call, snapshot)
    arguments = SimpleNamespace(**{name: getattr(snapshot, name) for name in snapshot.FIELDS})
    result = operation.run(call, arguments)
    if result == 0 or operation.always:
        out = snapshot.replace(**{name: getattr(arguments, name) for name in operation.outputs})
        if not call.copy_out(handle, out.to_bytes()):
            return -Errno.EFAULT
    return result


def _run_fast(call: Call, operation: Operation) -> int:
    if operation.fast is None:
        return -Errno.ENOSYS
    registers = call.frame.registers
    values = {} if operation.shape is None else dict.fromkeys(call.layout(operation.shape).FIELDS, 0)
    for name in ("dom", "domid"):
        if name in values:
            values[name] = Domid.SELF  # where the description has no register for it
    for name, number in operation.fast:
        value = getattr(registers, FAST_REGISTERS[number])
        values[name] = value & _maximum(operation, name)
    arguments = SimpleNamespace(**values)
    result = operation.run(call, arguments if values else 0)
    if result == 0:
        for name, number in operation.fast_outputs:
            register = FAST_REGISTERS[number]
            setattr(registers, register, getattr(arguments, name) & MASK64)
            call.frame.written.add(register)
    return result


def _maximum(operation: Operation, name: str) -> int:
    """A register is cut to its field's width."""
    if operation.shape is None:
        return MASK64
    layout = operation.shape.wide if isinstance(operation.shape, Shape) else operation.shape
    info = layout.FIELDS.get(name)
    return MASK64 if info is None else info.maximum


def signed(value: int, bits: int) -> int:
    """`value` of `bits` bits as a two's-complement number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
