"""A vCPU's registers inside Unicorn: a window on its saved context, checked before it is trusted.

Unicorn's context is the processor state of its QEMU as it lies in memory. The offsets belong to one version, so the
engine is pinned to it, and `Window` refuses when what it finds is not what Unicorn says through its own interface.
Source: unicorn 2.1.4, qemu/target/i386/cpu.h (CPUX86State) and qemu/target/i386/svm.h.
"""

from __future__ import annotations

import ctypes
from struct import Struct
from typing import TYPE_CHECKING, Any

from sevlab.core.cpu import INTERRUPT_SHADOW
from sevlab.core.errors import ConfigError

if TYPE_CHECKING:
    from sevlab.core.cpu import Segment, Vcpu

VERSION = "2.1.4"

# From the general registers on, in bytes.
CC_OP, HFLAGS, HFLAGS2, SEGMENTS, CR0, EFER = 168, 176, 180, 184, 424, 592
GENERAL, ERROR = Struct("<17Q"), Struct("<I")
FLAGS = Struct("<QQQQIiII")
"""At 136: eflags, cc_dst, cc_src, cc_src2, cc_op, df, hflags, hflags2."""
FLAGS_AT = 136
SEGMENT = Struct("<I4xQII")
SEGMENT_ORDER = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr", "gdtr", "idtr")
CONTROLS = Struct("<5Q")
SYSTEM_BYTES = CR0 - SEGMENTS + CONTROLS.size

# From the end of the context backwards: old_exception is 72 bytes before it.
OLD_EXCEPTION = 72
ERROR_CODE, DEBUG, VMCB, INTERCEPT = 72 + 112, 72 + 96, 64, 48
INTERCEPTS = Struct("<QHHHHI4xQI")
"""Intercepts 60h on, control registers read and written, debug registers, exceptions, nested CR3, nested mode."""

HF_CPL = 3
HF_INHIBIT_IRQ, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
HF_MP, HF_LMA, HF_CS64, HF_SVME, HF_GUEST, HF_OSFXSR = 1 << 9, 1 << 14, 1 << 15, 1 << 20, 1 << 21, 1 << 22
HF_IOBPT = 1 << 24
HF_ALWAYS = HF_SVME | HF_GUEST | HF_IOBPT
HF2_GIF, HF2_NESTED = 1 << 0, 1 << 6
CC_EFLAGS = 1
"""cc_op: the arithmetic flags are in cc_src."""
ARITHMETIC, TRAP, DIRECTION = 0x8D5, 0x100, 0x400
IO_BREAKPOINT = 0x400 | 3 | 2 << 16
"""DR7: slot 0 is an I/O breakpoint of one byte."""

CR0_PE, CR0_MP_EM_TS, CR4_OSFXSR = 1, 0xE, 1 << 9
EFER_LMA, EFER_SVME = 1 << 10, 1 << 12
CS_LONG, SEG_BIG = 1 << 9, 1 << 10
RFLAGS_VM = 1 << 17


def attributes_of(flags: int) -> int:
    """The VMCB's 12 bits from a descriptor's upper word."""
    return flags >> 8 & 0xFF | flags >> 12 & 0xF00


def flags_of(attributes: int) -> int:
    """A descriptor's upper word, without base and limit, from the VMCB's 12 bits."""
    return (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12


class Window:
    """The saved context of one `Uc` as numbers; `save` and `load` move it from and to the processor."""

    def __init__(self, uc: Any) -> None:
        from unicorn import UC_HOOK_INTR, x86_const  # noqa: F401  # the package is there
        from unicorn.unicorn_py3.unicorn import uclib

        self._uc = uc
        self._context = uc.context_save()
        self._pointer = self._context.context
        self._handle = uc._uch  # noqa: SLF001  # the calls below, without the binding's copies
        self._save, self._restore = uclib.uc_context_save, uclib.uc_context_restore
        self._read = uclib.uc_context_reg_read
        self._number = ctypes.c_uint64(0)
        self._number_at = ctypes.byref(self._number)
        self._eflags = x86_const.UC_X86_REG_EFLAGS
        size = self._context.size
        address = ctypes.cast(self._pointer, ctypes.c_void_p).value
        assert address is not None  # a context has an address
        self.bytes = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        self._find(x86_const)
        self.base = self._base
        self._system: bytes = b""
        self.pulled_flags = 0
        self.table_bits = 0
        """Set in the CR3 that Unicorn uses and not in the guest's, which then only the kernel changes."""
        self._check(x86_const)

    def _find(self, const: Any) -> None:
        magic = 0x1122_3344_5566_7788
        self._uc.reg_write(const.UC_X86_REG_RBX, magic)
        self.save()
        raw = bytes(self.bytes)
        self._base = raw.find(magic.to_bytes(8, "little")) - 24
        self._uc.reg_write(const.UC_X86_REG_RBX, 0)
        found = raw.rfind(b"\xff\xff\xff\xff")
        self.end = found + OLD_EXCEPTION
        if self._base < 0 or found < 0 or self.end > len(raw):
            raise _changed("the general registers")

    def _check(self, const: Any) -> None:
        """Every field that the window uses, against what Unicorn itself says."""
        uc = self._uc
        known = {const.UC_X86_REG_R15: 0x15, const.UC_X86_REG_CR3: 0x1234_5000, const.UC_X86_REG_CR2: 0xABC}
        for register, value in known.items():
            uc.reg_write(register, value)
        uc.reg_write(const.UC_X86_REG_FS_BASE, 0x1111_2222_3333)
        uc.reg_write(const.UC_X86_REG_IDTR, (0, 0x7_8000, 0x123, 0))
        self.save()
        general = GENERAL.unpack_from(self.bytes, self.base)
        controls = CONTROLS.unpack_from(self.bytes, self.base + CR0)
        seen = {
            "R15": (general[15], 0x15),
            "CR0": (controls[0], uc.reg_read(const.UC_X86_REG_CR0)),
            "CR2": (controls[2], 0xABC),
            "CR3": (controls[3], 0x1234_5000),
            "CR4": (controls[4], uc.reg_read(const.UC_X86_REG_CR4)),
            "EFER": (self.word(EFER), uc.reg_read(const.UC_X86_REG_MSR, 0xC000_0080)),
            "FS base": (SEGMENT.unpack_from(self.bytes, self.base + SEGMENTS + 4 * 24)[1], 0x1111_2222_3333),
            "IDTR": (SEGMENT.unpack_from(self.bytes, self.base + SEGMENTS + 9 * 24)[1:3], (0x7_8000, 0x123)),
            "DR6": (int.from_bytes(self.bytes[self._tail(DEBUG) + 48 :][:8], "little"), 0xFFFF_0FF0),
            "DR7": (int.from_bytes(self.bytes[self._tail(DEBUG) + 56 :][:8], "little"), 0x400),
            "hidden flags": (FLAGS.unpack_from(self.bytes, self.base + FLAGS_AT)[6] & HF_CS64, HF_CS64),
            "old exception": (self.bytes[self._tail(OLD_EXCEPTION) :][:4].hex(), "ffffffff"),
            "VMCB": (int.from_bytes(self.bytes[self._tail(VMCB) :][:8], "little"), 0),
            "intercepts": (INTERCEPTS.unpack_from(self.bytes, self._tail(INTERCEPT)), (0,) * 8),
        }
        for name, (found, expected) in seen.items():
            if found != expected:
                raise _changed(f"{name}: {found!r} where Unicorn says {expected!r}")
        uc.reg_write(const.UC_X86_REG_FS_BASE, 0)

    def _tail(self, distance: int) -> int:
        return self.end - distance

    def save(self) -> None:
        """Processor -> window."""
        self._save(self._handle, self._pointer)

    def load(self) -> None:
        """Window -> processor."""
        self._restore(self._handle, self._pointer)

    def word(self, offset: int) -> int:
        """Eight bytes, counted from the general registers."""
        start = self.base + offset
        return int.from_bytes(self.bytes[start : start + 8], "little")

    def put(self, offset: int, value: int, width: int = 8) -> None:
        """Store bytes, counted from the general registers."""
        start = self.base + offset
        self.bytes[start : start + width] = value.to_bytes(width, "little")

    @property
    def hidden(self) -> int:
        """hflags: CPL, modes, interrupt shadow."""
        found: int = ERROR.unpack_from(self.bytes, self.base + HFLAGS)[0]
        return found

    def error_code(self) -> int:
        """Of the exception or MSR exit that was just reported."""
        found: int = ERROR.unpack_from(self.bytes, self.end - ERROR_CODE)[0]
        return found

    def set_io_breakpoint(self, port: int) -> None:
        """Let the access to `port` that is under way end in #DB."""
        start = self._tail(DEBUG)
        self.bytes[start : start + 8] = port.to_bytes(8, "little")
        self.bytes[start + 56 : start + 64] = IO_BREAKPOINT.to_bytes(8, "little")

    def set_intercepts(self, vmcb: int, word: int, control: tuple[int, int], nested_cr3: int = 0) -> None:
        """What leaves the guest: exits from 60h on, control registers read and written; all debug registers and
        exceptions.
        """
        start = self._tail(VMCB)
        self.bytes[start : start + 8] = vmcb.to_bytes(8, "little")
        INTERCEPTS.pack_into(
            self.bytes,
            self._tail(INTERCEPT),
            word,
            *control,
            0xFFFF,
            0xFFFF,
            0xFFFF_FFFF,
            nested_cr3,
            7 if nested_cr3 else 0,
        )
        self.put(HFLAGS2, HF2_GIF | (HF2_NESTED if nested_cr3 else 0), 4)
        self.set_io_breakpoint(0)

    # Registers --------------------------------------------------------------------------------------------------

    def pull(self, vcpu: Vcpu) -> None:
        """The window's registers into the vCPU."""
        base, data = self.base, self.bytes
        regs, system = vcpu.regs, vcpu.system
        (
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15, regs.rip,
        ) = GENERAL.unpack_from(data, base)  # fmt: skip
        self._read(self._pointer, self._eflags, self._number_at)
        regs.rflags = self.pulled_flags = self._number.value & 0xFFFF_FFFF
        hidden = self.hidden
        if system.cpl != hidden & HF_CPL:
            system.cpl = hidden & HF_CPL
        shadow = hidden >> 3 & 1
        if vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW != shadow:
            vcpu.vmcb.interrupt_state = vcpu.vmcb.interrupt_state & ~INTERRUPT_SHADOW | shadow
        raw = bytes(data[base + SEGMENTS : base + SEGMENTS + SYSTEM_BYTES])
        if raw != self._system:
            self._system = raw
            for index, name in enumerate(SEGMENT_ORDER):
                selector, segment_base, limit, flags = SEGMENT.unpack_from(raw, index * SEGMENT.size)
                segment = (selector, attributes_of(flags), limit, segment_base)
                if getattr(system, name) != segment:
                    setattr(system, name, segment)
            cr0, _, cr2, cr3, _ = CONTROLS.unpack_from(raw, CR0 - SEGMENTS)
            system.cr0, system.cr2 = cr0, cr2
            if not self.table_bits:
                system.cr3 = cr3

    def push(self, vcpu: Vcpu, *, everything: bool) -> None:
        """The vCPU's general registers into the window, and `everything` else on request."""
        regs = vcpu.regs
        base = self.base
        GENERAL.pack_into(
            self.bytes, base,
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15, regs.rip,
        )  # fmt: skip
        if regs.rflags != self.pulled_flags or everything:
            self._push_flags(regs.rflags)
        if everything:
            self._push_system(vcpu)

    def begin(self, vcpu: Vcpu) -> None:
        """Before a run: the loop of QEMU takes all flags from one place when it begins (x86_cpu_exec_enter)."""
        self.put(FLAGS_AT, vcpu.regs.rflags | 2)

    def set_word(self, word: int) -> None:
        """Change which exits from 60h on leave the guest."""
        start = self._tail(INTERCEPT)
        self.bytes[start : start + 8] = word.to_bytes(8, "little")

    def set_trap_flag(self) -> None:
        """A single step: #DB after the next instruction."""
        self.put(FLAGS_AT, self.word(FLAGS_AT) | TRAP)

    def _push_flags(self, rflags: int) -> None:
        self.put(FLAGS_AT, rflags & ~(ARITHMETIC | DIRECTION) | 2)
        self.put(152, rflags & ARITHMETIC)
        self.put(CC_OP, CC_EFLAGS, 4)
        self.put(172, 0xFFFF_FFFF if rflags & DIRECTION else 1, 4)

    def _push_system(self, vcpu: Vcpu) -> None:
        system = vcpu.system
        for index, name in enumerate(SEGMENT_ORDER):
            segment: Segment = getattr(system, name)
            place = self.base + SEGMENTS + index * SEGMENT.size
            SEGMENT.pack_into(self.bytes, place, segment[0], segment[3], segment[2], flags_of(segment[1]))
        self.put(CR0, system.cr0)
        self.put(CR0 + 16, system.cr2)
        self.put(CR0 + 24, system.cr3 | self.table_bits)
        self.put(CR0 + 32, system.cr4)
        self.put(EFER, system.efer | EFER_SVME)
        self.put(HFLAGS, self._hidden_of(vcpu), 4)
        start = self.base + SEGMENTS
        self._system = bytes(self.bytes[start : start + SYSTEM_BYTES])

    def _hidden_of(self, vcpu: Vcpu) -> int:
        """Hflags of this state. Source: unicorn 2.1.4, qemu/target/i386/cpu.h (HF_*_MASK)."""
        system = vcpu.system
        hidden = HF_ALWAYS | system.cpl & HF_CPL
        hidden |= HF_INHIBIT_IRQ if vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW else 0
        hidden |= HF_PE if system.cr0 & CR0_PE else 0
        hidden |= (system.cr0 & CR0_MP_EM_TS) * HF_MP >> 1
        hidden |= HF_OSFXSR if system.cr4 & CR4_OSFXSR else 0
        long = system.efer & EFER_LMA
        hidden |= HF_LMA if long else 0
        if long and system.cs[1] & CS_LONG:
            return hidden | HF_CS64 | HF_CS32 | HF_SS32
        wide = system.cs[1] & SEG_BIG
        hidden |= HF_CS32 if wide else 0
        hidden |= HF_SS32 if system.ss[1] & SEG_BIG else 0
        flat = not (system.ds[3] or system.es[3] or system.ss[3])
        real = not system.cr0 & CR0_PE or vcpu.regs.rflags & RFLAGS_VM
        return hidden | (0 if flat and wide and not real else HF_ADDSEG)


def _changed(what: str) -> ConfigError:
    return ConfigError(f"unicorn: its processor state is not laid out as in version {VERSION}: {what}")
