"""The reference guest's #VC handler, without a machine: what it asks the hypervisor, and what it makes of the answer.

A handler is a generator. It yields a `PageExit` or an `MsrExit` and gets a `GuestReply` or the MSR's new value; it
ends by returning a `VcResult`. Nothing here touches memory or a CPU but through the `VcContext`: the machine runs
handlers on its vCPUs, and a trace runs the same ones on recorded registers and replies.

```python
handler = handle(VcContext(code=0x72, insn=bytes.fromhex("0fa2"), regs=Registers(rax=1), system=SystemRegisters()))
request = next(handler)                        # PageExit(code=0x72, info_1=0, ..., fields={"rax": 1, "rcx": 0, ...})
handler.send(GuestReply(0, 0, {"rax": ...}))   # StopIteration: VcResult
```
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from enum import Enum
from typing import NamedTuple

from sevlab.core.cpu import Registers, SystemRegisters
from sevlab.core.events import Fault
from sevlab.core.hypercall import CS_BIG, CS_LONG
from sevlab.core.paging import EFER_LME
from sevlab.core.svm import EVENT_ERROR_VALID, EVENT_VALID, EventType, ExitCode, Vector
from sevlab.plugins.sev_es.ghcb import SHARED_BUFFER_OFFSET
from sevlab.plugins.sev_es.insn import VcInsn, decode, may_raise

CPL_USER = 3
DR7_RESET = 0x400
CR4_OSXSAVE = 1 << 18
INSN_BYTES = 15


class Outcome(Enum):
    """How a #VC ended."""

    DONE = "the instruction is done"
    RETRY = "the instruction is executed again"
    EXCEPTION = "the code that raised it gets an exception"
    FORWARD = "the handler of another exception takes it"
    VMM_ERROR = "the hypervisor's answer makes no sense"
    UNSUPPORTED = "the handler cannot serve it"
    TERMINATE = "the guest ends itself"


class VcResult(NamedTuple):
    """The end of a #VC: `length` to advance RIP by, `fault` to raise, `reason` in the words of the model."""

    outcome: Outcome
    length: int = 0
    fault: Fault | None = None
    reason: str = ""


class PageExit(NamedTuple):
    """A request by the page: `fields` are the registers to mark valid, `data` goes into the shared buffer.

    `scratch`: the shared buffer's GPA goes into sw_scratch; `buffer_bytes` of it come back with the reply, and
    `returns` besides the registers of the protocol.
    """

    code: int
    info_1: int = 0
    info_2: int = 0
    fields: Mapping[str, int] = {}
    data: bytes = b""
    scratch: bool = False
    buffer_bytes: int = 0
    returns: tuple[str, ...] = ()


class MsrExit(NamedTuple):
    """A request by the GHCB MSR."""

    value: int


class GuestReply(NamedTuple):
    """What the guest reads back: infos, the registers that are marked valid, and the shared buffer it asked for."""

    info_1: int
    info_2: int
    registers: Mapping[str, int] = {}
    data: bytes = b""


Conversation = Generator["PageExit | MsrExit", "GuestReply | int", "GuestReply"]
VcHandler = Generator[PageExit | MsrExit, "GuestReply | int", VcResult]


class VcEnd(Exception):  # the way out of the middle of a handler, caught in `handle`
    """Carries the result of a #VC that ends early."""

    def __init__(self, result: VcResult) -> None:
        super().__init__(result.reason)
        self.result = result


def _no_memory(_linear: int, _count: int) -> bytes:
    raise VcEnd(VcResult(Outcome.UNSUPPORTED, reason="the operand in memory is not known"))


def _no_store(_linear: int, _data: bytes) -> None:
    raise VcEnd(VcResult(Outcome.UNSUPPORTED, reason="the operand in memory is not known"))


def _no_translation(_linear: int, _write: bool) -> tuple[int, bool]:  # noqa: FBT001  # a callback
    raise VcEnd(VcResult(Outcome.UNSUPPORTED, reason="the operand's address is not known"))


class VcContext:
    """One #VC: its error code, the bytes at RIP, the registers (which the handler changes), and ways into memory.

    `translate(linear, write)` gives (GPA, whether the page is private); `read` and `write` are the interrupted code's
    memory; `io_allowed(port, size)` is user space's I/O permission. `ghcb` False: no GHCB is set up yet. `dr7` is the
    handler's copy of the register. `handlers` maps codes to handlers: how another event handler takes a place.
    `cpuid_page` is an SNP guest's copy of its CPUID page, empty where it has none; `vmpl` the level it runs at.
    """

    __slots__ = (
        "code", "cpuid_page", "dr7", "ghcb", "handlers", "hypercall_registers", "insn", "io_allowed", "profile",
        "read", "regs", "system", "translate", "vmpl", "write",
    )  # fmt: skip

    def __init__(
        self,
        *,
        code: int,
        insn: bytes,
        regs: Registers,
        system: SystemRegisters,
        profile: str = "linux",
        ghcb: bool = True,
        dr7: int = DR7_RESET,
        read: Callable[[int, int], bytes] = _no_memory,
        write: Callable[[int, bytes], None] = _no_store,
        translate: Callable[[int, bool], tuple[int, bool]] = _no_translation,
        io_allowed: Callable[[int, int], bool] = lambda _port, _size: False,
        hypercall_registers: tuple[str, ...] = (),
        handlers: Mapping[int, Callable[[VcContext, VcInsn], VcHandler]] | None = None,
        cpuid_page: bytes = b"",
        vmpl: int = 0,
    ) -> None:
        self.code = code
        self.insn = insn
        self.regs = regs
        self.system = system
        self.profile = profile
        self.ghcb = ghcb
        self.dr7 = dr7
        self.read = read
        self.write = write
        self.translate = translate
        self.io_allowed = io_allowed
        self.hypercall_registers = hypercall_registers
        self.handlers = handlers
        self.cpuid_page = cpuid_page
        self.vmpl = vmpl

    @property
    def user(self) -> bool:
        """Whether user space raised it."""
        return self.system.cpl == CPL_USER

    @property
    def bits(self) -> int:
        """16, 32 or 64: how the interrupted code runs."""
        attributes = self.system.cs[1]
        if attributes & CS_LONG and self.system.efer & EFER_LME:
            return 64
        return 32 if attributes & CS_BIG else 16


def shared_buffer(ghcb_gpa: int) -> int:
    """The GPA of a page's shared buffer."""
    return ghcb_gpa + SHARED_BUFFER_OFFSET


# Talking to the hypervisor ----------------------------------------------------------------------------------------

ACCEPTED_VECTORS = (Vector.GP, Vector.UD)
GENERAL_PROTECTION = Fault(Vector.GP, 0, 0)


def call(
    context: VcContext, request: PageExit, *needed: str
) -> Generator[PageExit | MsrExit, GuestReply | int, GuestReply]:
    """One request by the page, with its result judged; `needed` registers must come back valid.

    Only #GP and #UD are taken as exceptions. edk2 makes #GP of everything that it does not understand.
    Source: Linux arch/x86/coco/sev/vc-shared.c (verify_exception_info); edk2 OvmfPkg/Library/CcExitLib/CcExitLib.c.
    """
    reply = yield request
    assert isinstance(reply, GuestReply)
    result = reply.info_1 & 0xFFFF_FFFF
    if result:
        fault = _exception(reply.info_2) if result == 1 else None
        if fault is None and context.profile == "edk2":
            fault = GENERAL_PROTECTION
        if fault is not None:
            raise VcEnd(VcResult(Outcome.EXCEPTION, fault=fault))
        raise VcEnd(VcResult(Outcome.VMM_ERROR, reason=f"result {reply.info_1:#x}, {reply.info_2:#x}"))
    missing = [name for name in needed if name not in reply.registers]
    if missing:
        if context.profile == "edk2":
            raise VcEnd(VcResult(Outcome.EXCEPTION, fault=GENERAL_PROTECTION))
        raise VcEnd(VcResult(Outcome.VMM_ERROR, reason=f"{', '.join(missing)} came back not valid"))
    return reply


def _exception(info_2: int) -> Fault | None:
    legal = info_2 & EVENT_VALID and info_2 >> 8 & 7 == EventType.EXCEPTION and info_2 & 0xFF in ACCEPTED_VECTORS
    if not legal:
        return None
    return Fault(info_2 & 0xFF, info_2 >> 32 if info_2 & EVENT_ERROR_VALID else 0, 0)


def handle(context: VcContext) -> VcHandler:
    """Serve one #VC: is the claimed code possible for these bytes, then the event's handler.

    Without a GHCB there is only CPUID, and a guest that has a CPUID page need not ask for that.
    Source: Linux arch/x86/coco/sev/vc-handle.c (vc_raw_handle_exception, vc_handle_exitcode).
    """
    from sevlab.plugins.sev_es.guest_events import HANDLERS, before_ghcb, unsupported

    try:
        if not context.ghcb and not (context.cpuid_page and context.code == ExitCode.CPUID):
            return (yield from before_ghcb(context))
        handlers = HANDLERS if context.handlers is None else context.handlers
        handler = handlers.get(context.code)
        if handler is None:
            return (yield from unsupported(context))
        insn = decode(context.insn[:INSN_BYTES], context.bits)
        if insn is None or not may_raise(insn, context.code):
            found = "no instruction" if insn is None else insn.mnemonic
            return VcResult(Outcome.UNSUPPORTED, reason=f"#VC {context.code:#x} at {found}")
        return (yield from handler(context, insn))
    except VcEnd as end:
        return end.result
