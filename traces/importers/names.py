"""Names that hypervisors print for numbers.

Source: Linux arch/x86/include/uapi/asm/svm.h and arch/x86/kvm/trace.h, 6.12; the names of trace-cmd's kvm plugin are
those of the SVM_EXIT_ constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sevlab.core.svm import EXIT_NAMES, ExitCode

_CRS = (0, 2, 3, 4, 8)
EXCEPTIONS = {
    0: "DE", 1: "DB", 3: "BP", 4: "OF", 5: "BR", 6: "UD", 7: "NM", 8: "DF", 10: "TS", 11: "NP", 12: "SS", 13: "GP",
    14: "PF", 16: "MF", 17: "AC", 18: "MC", 19: "XF",
}  # fmt: skip
"""Exception vectors as KVM abbreviates them."""

_PLAIN = (
    "interrupt", "nmi", "smi", "init", "vintr", "cr0_sel_write", "read_idtr", "read_gdtr", "read_ldtr", "read_rt",
    "write_idtr", "write_gdtr", "write_ldtr", "write_rt", "rdtsc", "rdpmc", "pushf", "popf", "cpuid", "rsm", "iret",
    "swint", "invd", "pause", "hlt", "invlpg", "invlpga", "io", "msr", "task_switch", "ferr_freeze", "shutdown",
    "vmrun", "hypercall", "vmload", "vmsave", "stgi", "clgi", "skinit", "rdtscp", "icebp", "wbinvd", "monitor",
    "mwait",
)  # fmt: skip

EXIT_REASONS: dict[str, int] = {
    **{f"read_cr{n}": n for n in _CRS},
    **{f"write_cr{n}": 0x10 + n for n in _CRS},
    **{f"read_dr{n}": 0x20 + n for n in range(8)},
    **{f"write_dr{n}": 0x30 + n for n in range(8)},
    **{f"{name} excp": 0x40 + vector for vector, name in EXCEPTIONS.items()},
    **{name: ExitCode.INTR + n for n, name in enumerate(_PLAIN)},
    "xsetbv": 0x8D,
    "write_efer_trap": 0x8F,
    "write_cr0_trap": 0x90,
    "write_cr4_trap": 0x94,
    "write_cr8_trap": 0x98,
    "invpcid": 0xA2,
    "buslock": 0xA5,
    "idle-halt": 0xA6,
    "npf": 0x400,
    "avic_incomplete_ipi": 0x401,
    "avic_unaccelerated_access": 0x402,
    "vmgexit": 0x403,
    "vmgexit_mmio_read": 0x8000_0001,
    "vmgexit_mmio_write": 0x8000_0002,
    "vmgexit_nmi_complete": 0x8000_0003,
    "vmgexit_ap_hlt_loop": 0x8000_0004,
    "vmgexit_ap_jump_table": 0x8000_0005,
    "vmgexit_page_state_change": 0x8000_0010,
    "vmgexit_guest_request": 0x8000_0011,
    "vmgexit_ext_guest_request": 0x8000_0012,
    "vmgexit_ap_creation": 0x8000_0013,
    "vmgexit_hypervisor_feature": 0x8000_FFFD,
    "invalid_guest_state": int(ExitCode.INVALID),
}
"""Exit codes by the name that kvm_exit prints on SVM."""

REASON_NAMES = {code: name for name, code in EXIT_REASONS.items()}

PLUGIN_EXIT_NAMES: dict[str, int] = {
    **{name: code for code, name in EXIT_NAMES.items()},
    **{f"READ_CR{n}": n for n in range(16)},
    **{f"WRITE_CR{n}": 0x10 + n for n in range(16)},
    **{f"READ_DR{n}": 0x20 + n for n in range(16)},
    **{f"WRITE_DR{n}": 0x30 + n for n in range(16)},
    **{f"EXCP_{name}": 0x40 + vector for vector, name in EXCEPTIONS.items()},
    "READ_IDTR": 0x66, "READ_GDTR": 0x67, "READ_LDTR": 0x68, "READ_TR": 0x69,
    "WRITE_IDTR": 0x6A, "WRITE_GDTR": 0x6B, "WRITE_LDTR": 0x6C, "WRITE_TR": 0x6D,
    "MWAIT_COND": 0x8C, "EFER_WRITE_TRAP": 0x8F, "ERR": int(ExitCode.INVALID),
}  # fmt: skip
"""Exit codes by the name behind EXIT_ that trace-cmd's kvm plugin prints."""


def exit_code(text: str) -> int:
    """The exit code of a reason as printed: a name, EXIT_ and a name, or a hexadecimal number."""
    code = EXIT_REASONS.get(text)
    if code is not None:
        return code
    if text.startswith("EXIT_") and text[5:] in PLUGIN_EXIT_NAMES:
        return PLUGIN_EXIT_NAMES[text[5:]]
    return int(text, 16)


DELIVERY_MODES = ("Fixed", "LowPrio", "SMI", "Res3", "NMI", "INIT", "SIPI", "ExtINT")
SHORTHANDS = ("dst", "self", "all", "all-but-self")

APIC_REGISTERS = {
    "ID": 0x20, "LVR": 0x30, "TASKPRI": 0x80, "ARBPRI": 0x90, "PROCPRI": 0xA0, "EOI": 0xB0, "RRR": 0xC0, "LDR": 0xD0,
    "DFR": 0xE0, "SPIV": 0xF0, "ISR": 0x100, "TMR": 0x180, "IRR": 0x200, "ESR": 0x280, "CMCI": 0x2F0, "ICR": 0x300,
    "ICR2": 0x310, "LVTT": 0x320, "LVTTHMR": 0x330, "LVTPC": 0x340, "LVT0": 0x350, "LVT1": 0x360, "LVTERR": 0x370,
    "TMICT": 0x380, "TMCCT": 0x390, "TDCR": 0x3E0, "SELF_IPI": 0x3F0, "EFEAT": 0x400, "ECTRL": 0x410,
}  # fmt: skip
"""Offsets of the local APIC's registers by the name behind APIC_."""


def apic_register(text: str) -> int:
    """Offset of an APIC register as printed: APIC_ and a name, or the offset."""
    return APIC_REGISTERS[text[5:]] if text.startswith("APIC_") else int(text, 16)


VECTORS = {name: vector for vector, name in EXCEPTIONS.items()}


def _vector(text: str) -> int:
    return VECTORS[text] if text in VECTORS else int(text, 16)


CLOCKS = ("none", "tsc", "pvclock", "hvclock")
"""Host clock sources as kvm prints them. Source: Linux arch/x86/include/asm/clocksource.h, order of the VDSO modes."""


def _clock(text: str) -> int:
    return CLOCKS.index(text) if text in CLOCKS else int(text, 16)


def _apic_bus(text: str) -> int:
    return DELIVERY_MODES.index(text) if text in DELIVERY_MODES else int(text, 16)


CONVERTERS: Mapping[str, Callable[[str], int]] = {
    "reason": exit_code,
    "apicreg": apic_register,
    "vector": _vector,
    "clock": _clock,
    "delivery": _apic_bus,
    "shorthand": SHORTHANDS.index,
}
"""Forms of a template that a table decides."""
