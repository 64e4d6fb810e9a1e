"""How a guest finds Xen: CPUID leaves, and the MSR that fills a hypercall page.

A page that Xen fills is code of Xen's in the guest: in a private page it is garbage when the guest fetches it, since
fetches are always private under SEV. Such a guest uses VMMCALL itself - the vendor decides which instruction.
Source: Xen xen/arch/x86/cpuid.c, xen/arch/x86/msr.c (guest_wrmsr_xen), xen/arch/x86/hvm/svm/svm.c and vmx/vmx.c
(init_hypercall_page), xen/arch/x86/hvm/viridian/viridian.c; features of leaf 4 EAX bit 7: Vates's series.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.builder import Msr
from sevlab.core.cpu import CONTROL_SEV_ES
from sevlab.core.determinism import TSC_HZ
from sevlab.core.events import Fault
from sevlab.core.hypercall import CodeMode, code_mode
from sevlab.core.svm import Vector
from sevlab.core.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins.xen import hyperv_msrs
from sevlab.plugins.xen.adapted import is_encrypted
from sevlab.plugins.xen.clock import MULTIPLIER, SHIFT, latch_width
from sevlab.plugins.xen.frames import page_of, store
from sevlab.plugins.xen.numbers import STUBS, Nr
from sevlab.plugins.xen.records import Adapted, HypercallPage
from sevlab.plugins.xen.settings import XEN_MAJOR, XEN_MINOR, AltAbi, Settings
from sevlab.plugins.xen.state import domain_of

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder, Registers4
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

LEAVES, VIRIDIAN_SHIFT = 0x4000_0000, 0x100
MAX_LEAF = 5
SIGNATURE = (0x566E_6558, 0x6558_4D4D, 0x4D4D_566E)
"""XenVMMXenVMM in EBX, ECX, EDX."""
HYPERV_SIGNATURE = (0x7263_694D, 0x666F_736F, 0x7648_2074)
"""Microsoft Hv."""
HYPERV_INTERFACE = 0x3123_7648
"""Hv#1."""
HYPERV_MAX_LEAF = 6
MSR_HYPERCALL_PAGE, MSR_HYPERCALL_PAGE_VIRIDIAN = 0x4000_0000, 0x4000_0200
IOMMU_MAPPINGS, VCPU_ID, DOMID, UPCALL_VECTOR, ALT_ABI = 1 << 2, 1 << 3, 1 << 4, 1 << 6, 1 << 7
HOST_TSC_SAFE, HAS_RDTSCP = 1 << 1, 1 << 2
HYPERV_BUILD, HYPERV_VERSION = 0x1772, 6 << 16
"""Those of Windows Server 2008, as Xen has chosen."""
PRIVILEGES = sum(1 << bit for bit in (1, 4, 5, 6, 9, 11))
"""Reference counter, APIC, hypercall, VP index, reference TSC, frequencies."""
CPU_HOTPLUG, CRASH_MSRS = 1 << 3, 1 << 10
NO_VP_LIMIT = 0xFFFF_FFFF
RECOMMEND_TLB_FLUSH, RECOMMEND_APIC_MSRS, RELAX_TIMER = 1 << 2, 1 << 3, 1 << 5
RECOMMEND_IPI, RECOMMEND_EX_MASKS = 1 << 10, 1 << 11
SPINLOCK_RETRIES = 0x7FF
GP = Fault(Vector.GP, 0, 0)
STUB_BYTES = 32
NO_STUB = b"\x0f\x0b"
"""UD2, in the place of iret."""
CALL_INSTRUCTION = {"AMD": b"\x0f\x01\xd9", "Intel": b"\x0f\x01\xc1"}
"""VMMCALL and VMCALL."""


def hypercall_page(vendor: str = "AMD") -> bytes:
    """The page as Xen builds it: for each number `mov eax, number`, the vendor's instruction, `ret`; all else INT3."""
    page = bytearray(b"\xcc" * PAGE_BYTES)
    for number in range(STUBS):
        stub = (
            NO_STUB
            if number == Nr.IRET
            else b"\xb8" + number.to_bytes(4, "little") + CALL_INSTRUCTION[vendor] + b"\xc3"
        )
        page[number * STUB_BYTES : number * STUB_BYTES + len(stub)] = stub
    return bytes(page)


AMD_PAGE = hypercall_page("AMD")


class Discovery:
    """CPUID leaves and MSRs of a machine with these settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.base = LEAVES + (VIRIDIAN_SHIFT if settings.viridian else 0)
        self.msr = MSR_HYPERCALL_PAGE_VIRIDIAN if settings.viridian else MSR_HYPERCALL_PAGE

    def register(self, builder: PluginBuilder) -> None:
        """Register leaves and MSRs."""
        for leaf in range(MAX_LEAF + 1):
            builder.cpuid.add(self.base + leaf, self.xen_leaf)
        if self._settings.viridian:
            for leaf in range(HYPERV_MAX_LEAF + 1):
                builder.cpuid.add(LEAVES + leaf, self.hyperv_leaf)
            hyperv_msrs.register(builder)
        builder.guest_msrs.add(self.msr, Msr(lambda _m, _v, _n: 0, self.write_page))

    def xen_leaf(self, machine: Machine, vcpu: Vcpu | None, leaf: int, subleaf: int) -> Registers4:
        """A leaf of Xen's; the host itself, and a VM that is no domain, see nothing."""
        domain = None if vcpu is None else domain_of(machine, vcpu)
        if domain is None or vcpu is None:
            return 0, 0, 0, 0
        index = leaf - self.base
        if index == 0:
            return self.base + MAX_LEAF, *SIGNATURE
        if index == 1:
            return XEN_MAJOR << 16 | XEN_MINOR, 0, 0, 0
        if index == 2:
            return 1, self.msr, 0, 0
        if index == 3:
            return self._time_leaf(subleaf)
        if index == 4 and subleaf == 0:
            features = IOMMU_MAPPINGS | VCPU_ID | DOMID | UPCALL_VECTOR
            if self._settings.alt_abi is not AltAbi.NONE:
                features |= ALT_ABI
            return features, vcpu.vcpu_id - domain.vcpus[0].vcpu_id, domain.domid, 0
        return 0, 0, 0, 0

    @staticmethod
    def _time_leaf(subleaf: int) -> Registers4:
        if subleaf == 0:
            return HOST_TSC_SAFE | HAS_RDTSCP, 2, TSC_HZ // 1000, 0
        if subleaf == 1:
            return 0, 0, MULTIPLIER, SHIFT
        return (TSC_HZ // 1000, 0, 0, 0) if subleaf == 2 else (0, 0, 0, 0)

    def hyperv_leaf(self, machine: Machine, vcpu: Vcpu | None, leaf: int, _subleaf: int) -> Registers4:
        """A leaf of Hyper-V's: what libxl offers by default, reference TSC, TLB flushes, IPIs, sparse sets."""
        domain = None if vcpu is None else domain_of(machine, vcpu)
        if domain is None:
            return 0, 0, 0, 0
        index = leaf - LEAVES
        if index == 0:
            return LEAVES + HYPERV_MAX_LEAF, *HYPERV_SIGNATURE
        if index == 1:
            return HYPERV_INTERFACE, 0, 0, 0
        if index == 2 and domain.hyperv_os_id:
            return HYPERV_BUILD, HYPERV_VERSION, 0, 0
        if index == 3:
            return PRIVILEGES, 0, 0, CPU_HOTPLUG | CRASH_MSRS
        if index == 4 and domain.hyperv_os_id >> 40 & 0xFF >= 4:
            hints = RECOMMEND_TLB_FLUSH | RECOMMEND_APIC_MSRS | RELAX_TIMER | RECOMMEND_IPI | RECOMMEND_EX_MASKS
            return hints, SPINLOCK_RETRIES, 0, 0
        if index == 5:
            return NO_VP_LIMIT, 0, 0, 0
        if index == 6:
            return 1 << 1 | 1 << 3, 0, 0, 0
        return 0, 0, 0, 0

    def write_page(self, machine: Machine, vcpu: Vcpu | None, _number: int, value: int) -> Fault | None:
        """Fill the page at bits 63:12; bits 11:0 are its index, and there is one. Latches the layout of shared_info,
        where the mode of the caller can be seen.
        """
        domain = None if vcpu is None else domain_of(machine, vcpu)
        if domain is None or vcpu is None or value & PAGE_MASK:
            return GP
        spa = page_of(machine, domain, value >> PAGE_SHIFT)
        if spa is None or not store(machine, spa, AMD_PAGE):
            return GP
        gpa = value & -PAGE_BYTES
        machine.emit(HypercallPage(vcpu.vcpu_id, gpa))
        if self._settings.adapt and is_encrypted(vcpu):
            machine.access.guest_physical_write(vcpu, gpa, AMD_PAGE, c_bit=True)
            machine.emit(Adapted(vcpu.vcpu_id, "hypercall page", gpa))
        if not vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
            latch_width(machine, domain, narrow=code_mode(vcpu) is not CodeMode.BITS_64)
        return None
