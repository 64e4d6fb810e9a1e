"""KVM: what the guest did, and what the hypervisor did for it.

Source: as in `events`.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived
from sevlab.traces.importers.events import Absent, event

_EXIT = "<vcpu {vcpu:d} >reason {reason:reason} rip {rip:x}"
_EXIT_NOW = f"{_EXIT} info1 {{info1:x}} info2 {{info2:x}}< intr_info {{intr_info:x32}} error_code {{error_code:x32}}>"
_EXIT_OLD = (
    "rip<:> {rip:x} reason: {reason:reason} ext_inf1: {info1:x} ext_inf2: {info2:x}"
    "< ext_int: {intr_info:x32} ext_int_err: {error_code:x32}>"
)


@event(
    "kvm_entry",
    "vcpu {vcpu:d}, rip {rip:x}< intr_info {intr_info:x32} error_code {error_code:x32}>{immediate:is:[immediate exit]}",
    "vcpu {vcpu:d} rip {rip:x}{immediate:is:[immediate exit]}",
)
class KvmEntry(NamedTuple):
    """The vCPU is entered."""

    vcpu: Derived[int]
    rip: Checked[int]
    immediate: Derived[bool]
    intr_info: Derived[Absent]
    error_code: Derived[Absent]


@event("kvm_exit", f"{_EXIT_NOW}< requests {{requests:x}}>", f"{_EXIT} info {{info1:x}} {{info2:x}}")
class KvmExit(NamedTuple):
    """The vCPU left the guest; `intr_info` and `error_code` are EXITINTINFO."""

    vcpu: Derived[Absent]
    reason: Derived[int]
    rip: Derived[int]
    info1: Derived[int]
    info2: Derived[int]
    intr_info: Derived[Absent]
    error_code: Derived[Absent]
    requests: Derived[Absent]


@event(
    "kvm_nested_vmexit",
    f"{_EXIT_NOW}< requests {{requests:x}}>",
    _EXIT_OLD,
)
class KvmNestedVmexit(NamedTuple):
    """A nested guest left."""

    vcpu: Derived[Absent]
    reason: Derived[int]
    rip: Derived[int]
    info1: Derived[int]
    info2: Derived[int]
    intr_info: Derived[Absent]
    error_code: Derived[Absent]
    requests: Derived[Absent]


@event(
    "kvm_nested_vmexit_inject",
    f"{_EXIT_NOW}< requests {{requests:x}}>",
    (
        "reason: {reason:reason} ext_inf1: {info1:x} ext_inf2: {info2:x}< ext_int: {intr_info:x32} ext_int_err:"
        " {error_code:x32}>"
    ),
)
class KvmNestedVmexitInject(NamedTuple):
    """An exit is passed on to the guest's own hypervisor."""

    vcpu: Derived[Absent]
    reason: Derived[int]
    rip: Derived[Absent]
    info1: Derived[int]
    info2: Derived[int]
    intr_info: Derived[Absent]
    error_code: Derived[Absent]
    requests: Derived[Absent]


@event(
    "kvm_pio",
    "pio_{is_in:one:write|read} at {port:x} size {size:d} count {elements:d} val {value:x}< >{more:is:(...)}",
    boundary=Boundary.DEVICE,
)
class KvmPio(NamedTuple):
    """A port access; of a string, `value` is the first element."""

    is_in: Derived[bool]
    port: Checked[int]
    size: Checked[int]
    elements: Checked[int]
    value: Checked[int]
    more: Derived[bool]


@event("kvm_mmio", "mmio {access:w} len {length:d} gpa {gpa:x} val {value:x}", boundary=Boundary.DEVICE)
class KvmMmio(NamedTuple):
    """An access to a device's memory; `access` is unsatisfied-read, read or write."""

    access: Derived[str]
    length: Checked[int]
    gpa: Checked[int]
    value: Checked[int]


@event("kvm_fast_mmio", "fast mmio at gpa {gpa:x}", boundary=Boundary.DEVICE)
class KvmFastMmio(NamedTuple):
    """A doorbell that needs no emulation."""

    gpa: Derived[int]


@event("kvm_msr", "msr_{write:one:read|write} {number:x} = {value:x}{refused:is: (#GP)}")
class KvmMsr(NamedTuple):
    """RDMSR or WRMSR; `refused`: it ends in #GP."""

    write: Derived[bool]
    number: Derived[int]
    value: Checked[int]
    refused: Checked[bool]


@event(
    "kvm_cpuid",
    (
        "func {leaf:x}< idx {subleaf:x}> rax {eax:x} rbx {ebx:x} rcx {ecx:x} rdx {edx:x}, cpuid entry"
        " {found:one:not found|found}< >{clamped:is:, used max basic}"
    ),
)
class KvmCpuid(NamedTuple):
    """CPUID."""

    leaf: Derived[int]
    subleaf: Derived[Absent]
    eax: Checked[int]
    ebx: Checked[int]
    ecx: Checked[int]
    edx: Checked[int]
    found: Derived[bool]
    clamped: Derived[bool]


@event("kvm_hypercall", "nr {number:x} a0 {a0:x} a1 {a1:x} a2 {a2:x} a3 {a3:x}", boundary=Boundary.HYPERCALL)
class KvmHypercall(NamedTuple):
    """A hypercall with KVM's own numbers."""

    number: Derived[int]
    a0: Derived[int]
    a1: Derived[int]
    a2: Derived[int]
    a3: Derived[int]


@event(
    "kvm_xen_hypercall",
    "cpl {cpl:d} nr {number:x} a0 {a0:x} a1 {a1:x} a2 {a2:x} a3 {a3:x} a4 {a4:x} a5 {a5:x}",
    boundary=Boundary.HYPERCALL,
)
class KvmXenHypercall(NamedTuple):
    """A hypercall with Xen's numbers."""

    cpl: Derived[int]
    number: Derived[int]
    a0: Derived[int]
    a1: Derived[int]
    a2: Derived[int]
    a3: Derived[int]
    a4: Derived[int]
    a5: Derived[int]


@event(
    "kvm_hv_hypercall",
    (
        "code {code:x} {fast:one:slow|fast} var_cnt {variable_count:x} rep_cnt {repeat_count:x} idx {start:x} in"
        " {input:x} out {output:x}"
    ),
    boundary=Boundary.HYPERCALL,
)
class KvmHvHypercall(NamedTuple):
    """A hypercall with Hyper-V's numbers."""

    code: Derived[int]
    fast: Derived[bool]
    variable_count: Derived[int]
    repeat_count: Derived[int]
    start: Derived[int]
    input: Derived[int]
    output: Derived[int]


@event("kvm_hv_hypercall_done", "result {result:x}", boundary=Boundary.HYPERCALL)
class KvmHvHypercallDone(NamedTuple):
    """The answer to a Hyper-V hypercall."""

    result: Derived[int]


@event(
    "kvm_emulate_insn",
    "{cs_base:x}:{rip:x}:{insn:bytes} ({mode:w}){failed:is: failed}",
    "{cs_base:x}:{rip:x}: {insn:bytes}{failed:is: failed}< >",
)
class KvmEmulateInsn(NamedTuple):
    """The hypervisor emulates an instruction; `mode` is empty where it is not printed."""

    cs_base: Derived[int]
    rip: Derived[int]
    insn: Derived[bytes]
    mode: Derived[str]
    failed: Derived[bool]


@event(
    "kvm_page_fault",
    "<vcpu {vcpu:d} ><rip {rip:x} >address {address:x} error_code {error_code:x}",
    boundary=Boundary.MEMORY,
)
class KvmPageFault(NamedTuple):
    """A nested page fault is looked at."""

    vcpu: Derived[Absent]
    rip: Derived[Absent]
    address: Derived[int]
    error_code: Derived[int]


@event("kvm_cr", "cr_{write:one:read|write} {number:x} = {value:x}")
class KvmCr(NamedTuple):
    """A control register."""

    write: Derived[bool]
    number: Derived[int]
    value: Derived[int]


@event(
    "vcpu_match_mmio",
    "gva {gva:x} gpa {gpa:x} {write:one:Read|Write} {is_gpa:one:GVA|GPA}",
    boundary=Boundary.MEMORY,
)
class KvmVcpuMatchMmio(NamedTuple):
    """The address of a fault is known to be a device's."""

    gva: Derived[int]
    gpa: Derived[int]
    write: Derived[bool]
    is_gpa: Derived[bool]


@event(
    "kvm_vmgexit_enter",
    "vcpu {vcpu:d}, exit_reason {exit_code:x}, exit_info1 {exit_info_1:x}, exit_info2 {exit_info_2:x}",
    boundary=Boundary.GHCB,
)
class KvmVmgexitEnter(NamedTuple):
    """A GHCB request, before it is looked at."""

    vcpu: Derived[int]
    exit_code: Derived[int]
    exit_info_1: Derived[int]
    exit_info_2: Derived[int]


@event(
    "kvm_vmgexit_exit",
    "vcpu {vcpu:d}, exit_reason {exit_code:x}, exit_info1 {exit_info_1:x}, exit_info2 {exit_info_2:x}",
    boundary=Boundary.GHCB,
)
class KvmVmgexitExit(NamedTuple):
    """A GHCB reply."""

    vcpu: Derived[int]
    exit_code: Derived[int]
    exit_info_1: Derived[int]
    exit_info_2: Derived[int]


@event("kvm_vmgexit_msr_protocol_enter", "vcpu {vcpu:d}, ghcb_gpa {request:x}", boundary=Boundary.GHCB)
class KvmVmgexitMsrProtocolEnter(NamedTuple):
    """A request through the GHCB MSR."""

    vcpu: Derived[int]
    request: Derived[int]


@event(
    "kvm_vmgexit_msr_protocol_exit",
    "vcpu {vcpu:d}, ghcb_gpa {reply:x}, result {result:d}",
    boundary=Boundary.GHCB,
)
class KvmVmgexitMsrProtocolExit(NamedTuple):
    """The reply through the GHCB MSR."""

    vcpu: Derived[int]
    reply: Derived[int]
    result: Derived[int]


@event(
    "kvm_rmp_fault",
    "vcpu {vcpu:d} gpa {gpa:x} pfn {pfn:x} error_code {error_code:x} rmp_level {level:d} psmash_ret {psmash:d}",
    boundary=Boundary.MEMORY,
)
class KvmRmpFault(NamedTuple):
    """A nested page fault with the RMP bit."""

    vcpu: Derived[int]
    gpa: Derived[int]
    pfn: Derived[int]
    error_code: Derived[int]
    level: Derived[int]
    psmash: Derived[int]
