"""The `unicorn` engine: Unicorn's CPU in SVM guest mode, so that every intercept is reported and nothing else is.

The QEMU inside Unicorn still has SVM: with the guest bit set in its hidden flags, whatever the VMCB intercepts ends
with an exit code in the interrupt hook, RIP at the instruction and nothing done. The kernel answers there and the guest
goes on; no code is patched and nothing is asked while nothing exits. IN and OUT, whose SVM check is compiled out, end
in an I/O breakpoint instead.

Source: unicorn 2.1.4, qemu/target/i386 (svm_helper.c, misc_helper.c, bpt_helper.c) and qemu/accel/tcg/cputlb.c.
"""

from __future__ import annotations

import ctypes
import mmap
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from sevlab.core.cpu import INTERRUPT_SHADOW
from sevlab.core.errors import ConfigError
from sevlab.core.svm import ExitCode, NpfError, Vector
from sevlab.core.units import MASK32, MASK64, PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.engines.block_clock import BlockClock
from sevlab.plugins.engines.nested_room import NestedRoom
from sevlab.plugins.engines.unicorn_state import CR0, EFER, HF_CPL, HFLAGS, TRAP, VERSION, Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.cpu import EngineSink, Vcpu

UNTIL = 0xFFFF_FFFF_FFFF_FFF0
UNTIL_PAGE = UNTIL & -PAGE_BYTES
"""Where no guest gets: Unicorn wants an address to stop at, and looks it up at every stop."""

PRIVATE_SPA = 0x7F_0000_0000
"""The engine's own pages in Unicorn's physical space, beyond every machine's memory: VMCB, then the MSR map."""
MSR_MAP = PRIVATE_SPA + 0x4000
PRIVATE_BYTES = 0x8000
NESTED_SPA = PRIVATE_SPA + (1 << 30)
"""Nested tables of the engine's own."""
FEW_TABLES = 64
VMCB_IOPM, VMCB_MSRPM, VMCB_EXIT_INFO_2 = 0x40, 0x48, 0x80

READ, WRITE, FETCH = 16, 17, 18
KINDS = {READ: 0, WRITE: 1, FETCH: 2}
"""Unicorn's access types as those of `core.access`."""

NATIVE_MSRS = (0x174, 0x175, 0x176, *range(0xC000_0081, 0xC000_0085), *range(0xC000_0100, 0xC000_0103))
"""Registers that Unicorn keeps: SYSENTER, SYSCALL, segment bases."""

FIRST = 0x60
ALWAYS = (
    ExitCode.RDTSC,
    ExitCode.RDPMC,
    ExitCode.CPUID,
    ExitCode.SWINT,
    ExitCode.INVD,
    ExitCode.HLT,
    ExitCode.INVLPG,
    ExitCode.INVLPGA,
    ExitCode.MSR,
    ExitCode.TASK_SWITCH,
    ExitCode.SHUTDOWN,
    ExitCode.VMRUN,
    ExitCode.VMMCALL,
    ExitCode.VMLOAD,
    ExitCode.VMSAVE,
    ExitCode.STGI,
    ExitCode.CLGI,
    ExitCode.SKINIT,
    ExitCode.WBINVD,
    ExitCode.MONITOR,
    ExitCode.MWAIT,
    ExitCode.XSETBV,
)
"""Reported whatever the VMCB says: what Unicorn cannot do alone (events, time) or may not (its own SVM)."""
NATIVE_WORD = sum(1 << code - FIRST for code in ALWAYS)
OPTIONAL_WORD = sum(1 << code - FIRST for code in (ExitCode.PAUSE, ExitCode.IRET, ExitCode.PUSHF, ExitCode.POPF))
INVLPG_BIT = 1 << ExitCode.INVLPG - FIRST
CONTROL_WRITES = 1 << 0 | 1 << 4 | 1 << 8
CONTROL_READS = 1 << 4 | 1 << 8
CR3_BIT = 1 << 3
"""CR4 and CR8 are the kernel's; CR2 is Unicorn's business, and so is CR3 where it needs no C-bit."""

RIP = 16
"""Index among the window's words."""
DEBUG_EXIT = ExitCode.EXCEPTION_0 + 1
NPF_WRITE = int(NpfError.W)

MSRPM_BITS = ((0x0000_0000, 0x0000), (0xC000_0000, 0x4000), (0xC001_0000, 0x8000))
"""First register, and the bit of its RDMSR. Source: spec 24593, 15.11."""

SYSTEM_STATE = attrgetter(
    "es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr", "gdtr", "idtr",
    "cpl", "cr0", "cr2", "cr3", "cr4", "efer",
)  # fmt: skip

STAR, LSTAR, CSTAR, SFMASK = range(0xC000_0081, 0xC000_0085)
SYSCALL_BYTES, EFER_SCE = 2, 1 << 0
NO_PLACE = -1
CS_LONG, RFLAGS_RF = 1 << 9, 1 << 16
KERNEL_CODE, KERNEL_DATA = (0xA9B, 0xFFFF_FFFF, 0), (0xC93, 0xFFFF_FFFF, 0)


class MsrValue(ctypes.Structure):
    """What Unicorn wants to read a register into."""

    _fields_ = (("rid", ctypes.c_uint32), ("value", ctypes.c_uint64))


STATE_MSRS = {
    0xC000_0081: "star",
    0xC000_0082: "lstar",
    0xC000_0083: "cstar",
    0xC000_0084: "sfmask",
    0xC000_0102: "kernel_gs_base",
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
}


class NestedPaging(NamedTuple):
    """What an engine must know to walk a guest's tables itself.

    The processor's walks are private whatever CR3 says. Unicorn's go where the address says, so CR3 gets the C-bit,
    out of the guest's sight. Entries of upper tables need it of themselves; Linux and our own guests set it.
    """

    c_bit_mask: int


class UnicornCpu:
    """One vCPU on Unicorn; `memory` is the machine's DRAM, lent to the engine page by page.

    With `nested`, Unicorn walks the guest's tables itself, through nested tables that are made as they are missed: a
    miss of its TLB then costs no call, and the C-bit must lie below bit 40. Raises `ConfigError` when Unicorn is
    missing, or not the version whose state this module knows.
    """

    name = "unicorn"

    def __init__(self, vcpu: Vcpu, memory: mmap.mmap, sink: EngineSink, *, nested: NestedPaging | None = None) -> None:
        try:
            unicorn: Any = import_module("unicorn")
            unicorn_const: Any = import_module("unicorn.unicorn_const")
            x86_const: Any = import_module("unicorn.x86_const")
            binding: Any = import_module("unicorn.unicorn_py3.unicorn")
            intel: Any = import_module("unicorn.unicorn_py3.arch.intel")
        except ImportError as error:
            raise ConfigError("the engine unicorn is not installed: pip install 'sevlab[emu]'") from error
        if unicorn.__version__ != VERSION:
            raise ConfigError(f"unicorn {unicorn.__version__}: expected {VERSION}, whose processor state is known")
        self._vcpu, self._sink = vcpu, sink
        self._library = binding.uclib
        self._msr_register = x86_const.UC_X86_REG_MSR
        # An Opteron G5 has no RDRAND: it ends in #UD, and the kernel gives numbers that are the same every time.
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64, x86_const.UC_CPU_X86_OPTERON_G5)
        self._uc, self._handle = uc, uc._uch  # noqa: SLF001
        uc.ctl_set_tlb_mode(unicorn_const.UC_TLB_VIRTUAL if nested is None else unicorn_const.UC_TLB_CPU)
        uc.mem_map_ptr(0, len(memory), 7, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        self._private = mmap.mmap(-1, PRIVATE_BYTES)
        uc.mem_map_ptr(PRIVATE_SPA, PRIVATE_BYTES, 7, ctypes.addressof(ctypes.c_char.from_buffer(self._private)))
        self._nested = None if nested is None else self._nested_room(len(memory))
        self._controls = (CONTROL_READS, CONTROL_WRITES)
        self._write_maps()
        uc.reg_write(x86_const.UC_X86_REG_MSR, (0xC000_0080, 0x1D01))  # SVME on, while writing it still does that
        for number, value in enumerate(vcpu.system.xmm):
            uc.reg_write(x86_const.UC_X86_REG_XMM0 + number, value)
        self._window = Window(uc)
        if nested is not None and nested.c_bit_mask:
            self._controls = (CONTROL_READS | CR3_BIT, CONTROL_WRITES | CR3_BIT)
            self._window.table_bits = nested.c_bit_mask
        self._words = self._window.bytes[self._window.base :][: EFER + 8].cast("Q")
        self._failure: BaseException | None = None
        self._stopped = False
        self._own_place = NO_PLACE
        self._port: tuple[int, ...] | None = None
        self._stepping = False
        self._msr_value = MsrValue()
        self._hooks: list[Any] = []
        self._flush_type = unicorn_const.UC_CTL_TLB_FLUSH
        self._flush_direction = unicorn_const.UC_CTL_IO_WRITE
        self._clock = BlockClock()
        self.elapsed, self.limit, self.charge = self._clock.elapsed, self._clock.limit, self._clock.charge
        self.hook_blocks(self._clock.place)
        self._hook(unicorn_const.UC_HOOK_INTR, binding.HOOK_INTR_CFUNC(self._on_exit))
        self._hook(unicorn_const.UC_HOOK_INSN, intel.HOOK_INSN_IN_CFUNC(self._on_in), x86_const.UC_X86_INS_IN)
        self._hook(unicorn_const.UC_HOOK_INSN, intel.HOOK_INSN_OUT_CFUNC(self._on_out), x86_const.UC_X86_INS_OUT)
        for function, insn in (
            (self._on_syscall, x86_const.UC_X86_INS_SYSCALL),
            (self._on_sysenter, x86_const.UC_X86_INS_SYSENTER),
        ):
            self._hook(unicorn_const.UC_HOOK_INSN, intel.HOOK_INSN_SYSCALL_CFUNC(function), insn)
        if nested is None:
            self._hook(unicorn_const.UC_HOOK_TLB_FILL, binding.HOOK_TLB_FILL_CFUNC(self._on_fill))

    def _nested_room(self, memory_bytes: int) -> NestedRoom:
        """Room for the tables of all memory with and without the C-bit."""
        self._room = mmap.mmap(-1, (2 * (memory_bytes // PAGE_2M_BYTES + 1) + FEW_TABLES) * PAGE_BYTES)
        place = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        self._uc.mem_map_ptr(NESTED_SPA, len(self._room), 7, place)
        return NestedRoom(self._room, NESTED_SPA)

    def _hook(self, kind: int, function: Any, *instruction: int, argument: int = 0) -> None:
        handle = ctypes.c_size_t()
        given = ctypes.c_void_p(argument)
        span = (ctypes.c_uint64(1), ctypes.c_uint64(0))
        extra = tuple(ctypes.c_int(number) for number in instruction)
        status = self._library.uc_hook_add(self._handle, ctypes.byref(handle), kind, function, given, *span, *extra)
        if status:
            raise ConfigError(f"unicorn refuses a hook of kind {kind}: status {status}")
        self._hooks.append(function)

    def _write_maps(self) -> None:
        """The VMCB that Unicorn looks into, and which MSRs it may read and write by itself."""
        self._private[VMCB_IOPM : VMCB_IOPM + 8] = PRIVATE_SPA.to_bytes(8, "little")
        self._private[VMCB_MSRPM : VMCB_MSRPM + 8] = MSR_MAP.to_bytes(8, "little")
        bits = bytearray(b"\xff" * 0x2000)
        for msr in NATIVE_MSRS:
            first, start = next(pair for pair in reversed(MSRPM_BITS) if msr >= pair[0])
            bit = start + (msr - first) * 2
            bits[bit >> 3] &= ~(3 << (bit & 7))
        self._private[MSR_MAP - PRIVATE_SPA : MSR_MAP - PRIVATE_SPA + 0x2000] = bits

    # The engine's interface -------------------------------------------------------------------------------------

    def run(self, ticks: int) -> bool:
        """See `CpuEngine.run`. Raises what the sink raised."""
        self._stopped, self._port, self._stepping = False, None, False
        self._push(everything=True)
        self._window.begin(self._vcpu)
        self._clock.start(ticks)
        self._window.load()
        status = self._library.uc_emu_start(self._handle, self._vcpu.regs.rip, UNTIL, 0, 0)
        window = self._window
        window.save()
        window.pull(self._vcpu)
        self._clock.leave(self._linear())
        if self._stepping:  # time ran out before the step was taken
            self._vcpu.regs.rflags &= ~TRAP
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return not status

    def stop(self) -> None:
        self._stopped = True

    def flush(self) -> None:
        self._uc.ctl(self._flush_type, self._flush_direction)

    def withdraw(self, spa: int) -> None:
        if self._nested is None or self._nested.withdraw(spa):
            self.flush()

    def forget(self) -> None:
        if self._nested is not None:
            self._nested.clear()
        self.flush()

    def drop_page(self) -> bool:
        """Only the instruction itself drops one page: it is executed, and a single step behind it takes over again."""
        self._stepping = not self._vcpu.regs.rflags & TRAP
        return self._stepping

    def spoiled(self, spa: int) -> None:
        # Unicorn takes a linear address here. While it asks, the page's physical address leads to the page.
        self._own_place = spa
        self.flush()
        try:
            self._uc.ctl_remove_cache(spa, spa + PAGE_BYTES)
        finally:
            self._own_place = NO_PLACE
            self.flush()

    def synchronise(self) -> None:
        x86_const: Any = import_module("unicorn.x86_const")
        system = self._vcpu.system
        for msr, name in STATE_MSRS.items():
            setattr(system, name, self._uc.reg_read(self._msr_register, msr))
        system.xmm = tuple(self._uc.reg_read(x86_const.UC_X86_REG_XMM0 + n) for n in range(16))

    @property
    def fault_address(self) -> int:
        """EXITINFO2 of the last exception or nested fault."""
        return int.from_bytes(self._private[VMCB_EXIT_INFO_2 : VMCB_EXIT_INFO_2 + 8], "little")

    # Snapshots --------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Between two runs: the processor's state beside the vCPU's, for `restore` of an engine of this build."""
        return bytes(self._window.bytes) + bytes((self._clock.remainder,))

    def restore(self, state: bytes) -> None:
        """Go on from `state`, with the registers that are in the vCPU."""
        self._window.bytes[:] = state[:-1]
        self._clock.remainder = state[-1]

    def hook_blocks(self, make: Callable[[int], tuple[int, int]]) -> None:
        """Call native code at each block: `make` gets the address of uc_emu_stop and gives those of the code and of its
        argument.
        """
        import unicorn.unicorn_const as const

        callback, argument = make(ctypes.cast(self._library.uc_emu_stop, ctypes.c_void_p).value or 0)
        self._hook(const.UC_HOOK_BLOCK, ctypes.c_void_p(callback), argument=argument)

    # Reports ----------------------------------------------------------------------------------------------------

    def _word(self) -> int:
        """Which exits from 60h on are reported now."""
        optional = self._vcpu.vmcb.intercepts >> FIRST
        if self._nested is not None:
            return NATIVE_WORD & ~INVLPG_BIT | optional & (OPTIONAL_WORD | INVLPG_BIT)
        return NATIVE_WORD | optional & OPTIONAL_WORD

    def _push(self, *, everything: bool) -> None:
        window = self._window
        window.push(self._vcpu, everything=everything)
        if everything:
            root = 0 if self._nested is None else self._nested.root
            window.set_intercepts(PRIVATE_SPA, self._word(), self._controls, root)
        if self._stepping:
            window.set_trap_flag()
            window.set_word(self._word() & ~INVLPG_BIT)
        window.load()

    def _guarded(self, report: Callable[[], None]) -> None:
        """Run a report; what it raises waits for the end of `run`: nothing may unwind through Unicorn."""
        try:
            report()
        except BaseException as error:  # noqa: BLE001
            self._failure = error
            self._stopped = True
        if self._stopped:
            self._library.uc_emu_stop(self._handle)

    def _on_exit(self, _uc: object, number: int, _data: object) -> None:
        self._guarded(lambda: self._report(number - 0x100))

    def _report(self, code: int) -> None:
        window, vcpu = self._window, self._vcpu
        window.save()
        info = window.error_code()
        if code == ExitCode.NPF and self._fill_nested(info):
            return
        window.pull(vcpu)
        if self._stepping:
            self._stepping = False
            window.set_word(self._word())
            vcpu.regs.rflags &= ~TRAP
            if code == DEBUG_EXIT:
                self._push(everything=False)
                return
        if code == DEBUG_EXIT and self._port is not None:
            regs = vcpu.regs
            regs.rip, regs.rax, regs.rcx, regs.rsi, regs.rdi, info = self._port
            self._port = None
            code = ExitCode.IOIO
        self._clock.leave(self._linear())
        before = SYSTEM_STATE(vcpu.system)
        shadow = vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW
        optional = vcpu.vmcb.intercepts
        self._sink.exit(code, info)
        changed = (
            SYSTEM_STATE(vcpu.system) != before
            or vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW != shadow
            or vcpu.vmcb.intercepts != optional
        )
        self._push(everything=changed)

    def _linear(self) -> int:
        """Where the instruction at RIP is."""
        rip, code = self._vcpu.regs.rip, self._vcpu.system.cs
        return rip if code[1] & CS_LONG else rip + code[3] & MASK32

    def _fill_nested(self, error_code: int) -> bool:
        """A leaf that Unicorn lacks; nothing else has changed."""
        assert self._nested is not None  # without nested tables there is no nested fault
        self._clock.leave(self._words[RIP])
        gpa = self.fault_address
        found = self._sink.nested_fill(gpa, KINDS[WRITE] if error_code & NPF_WRITE else KINDS[READ])
        if found is None:
            return False
        self._nested.map(gpa, found[0], writable=bool(found[1] & 2))
        return True

    def _on_in(self, _uc: object, port: int, size: int, _data: object) -> int:
        self._guarded(lambda: self._abort_port(port, size, 1))
        return 0

    def _on_out(self, _uc: object, port: int, size: int, _value: int, _data: object) -> None:
        self._guarded(lambda: self._abort_port(port, size, 0))

    def _abort_port(self, port: int, size: int, is_in: int) -> None:
        """Let the I/O breakpoint end the instruction; what it changed is put back when that is reported."""
        window, words = self._window, self._words
        window.save()
        self._port = (words[RIP], words[0], words[1], words[6], words[7], port << 16 | size << 4 | is_in)
        window.set_io_breakpoint(port)
        window.load()

    def _on_syscall(self, _uc: object, _data: object) -> None:
        self._guarded(self._system_call)

    def _on_sysenter(self, _uc: object, _data: object) -> None:
        self._guarded(self._undefined)

    def _undefined(self) -> None:
        """SYSENTER in long mode, or SYSCALL that EFER does not allow: #UD. Unicorn steps over two bytes afterwards."""
        window, vcpu = self._window, self._vcpu
        window.save()
        window.pull(vcpu)
        self._clock.leave(self._linear())
        self._sink.exit(ExitCode.EXCEPTION_0 + Vector.UD, 0)
        vcpu.regs.rip = vcpu.regs.rip - SYSCALL_BYTES & MASK64
        self._push(everything=True)

    def _system_call(self) -> None:
        """SYSCALL, which Unicorn leaves to its hooks: it only steps over the two bytes afterwards.

        Source: spec 24594 (APM volume 3), SYSCALL.
        """
        window, vcpu = self._window, self._vcpu
        window.save()
        window.pull(vcpu)
        regs, system = vcpu.regs, vcpu.system
        if not system.efer & EFER_SCE:
            self._undefined()
            return
        star, target, mask = (self._msr(number) for number in (STAR, LSTAR, SFMASK))
        if not system.cs[1] & CS_LONG:
            target = self._msr(CSTAR)
        selector = star >> 32 & 0xFFFC
        regs.rcx, regs.r11 = regs.rip + SYSCALL_BYTES, regs.rflags & ~RFLAGS_RF
        regs.rflags = regs.rflags & ~mask & ~RFLAGS_RF | 2
        regs.rip = target - SYSCALL_BYTES & MASK64
        system.cs, system.ss = (selector, *KERNEL_CODE), (selector + 8, *KERNEL_DATA)
        system.cpl = 0
        self._push(everything=True)

    def _msr(self, number: int) -> int:
        """A register that Unicorn keeps."""
        self._msr_value.rid = number
        self._library.uc_reg_read(self._handle, self._msr_register, ctypes.byref(self._msr_value))
        return int(self._msr_value.value)

    def _on_fill(self, _uc: object, gva: int, access: int, entry: Any, _data: object) -> bool:
        place = entry.contents
        if gva & -PAGE_BYTES == UNTIL_PAGE:
            place.paddr, place.perms = PRIVATE_SPA, 5
            return True
        if gva & -PAGE_BYTES == self._own_place:
            place.paddr, place.perms = self._own_place, 5
            return True
        try:
            self._window.save()
            words, system = self._words, self._vcpu.system
            cr3 = words[CR0 // 8 + 3]
            if system.cr3 != cr3:
                system.cr3 = cr3
            cpl = words[HFLAGS // 8] & HF_CPL
            found = self._sink.fill(gva, KINDS[access], cpl)
        except BaseException as error:  # noqa: BLE001  # raised again by `run`
            self._failure = error
            return False
        if found is None:
            return False
        place.paddr, place.perms = found
        return True
