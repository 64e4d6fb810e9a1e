"""What a processor checks and the engine leaves out, in both ways of paging."""

from __future__ import annotations

import pytest
from sevlab.plugins.engines import Booted, Feature, Paging, boot, compose
from sevlab.plugins.engines.loaders.image import TABLES_GPA, GuestImage

MEMORY = 16 << 20
ENTRY, USER_PAGE = 0x10_0000, 0x40_0000
USER = 1 << 2
DISABLE_SYSCALL = "b9800000c0 0f32 83e0fe 0f30"
"""MOV ECX, C0000080h (EFER); RDMSR; AND EAX, FFFFFFFEh; WRMSR."""
ENABLE_SMEP = "0f20e0 0d00001000 0f22e0"
"""MOV RAX, CR4; OR EAX, 1 << 20; MOV CR4, RAX."""
CLI_HLT = "fa f4"


def guest(code: str, paging: Paging) -> Booted:
    machine = compose(memory_bytes=MEMORY, paging=paging)
    image = GuestImage("flat binary", ENTRY)
    image.add(ENTRY, bytes.fromhex(code), "the code", MEMORY)
    image.add(USER_PAGE, bytes.fromhex(CLI_HLT), "code of user mode", MEMORY)
    image.finish(0, MEMORY)
    tables = bytearray(image.loads[TABLES_GPA])
    for at in (0, 0x1000, 0x2000 + (USER_PAGE >> 21) * 8):
        tables[at] |= USER
    image.loads[TABLES_GPA] = bytes(tables)
    booted = boot(machine, image, Feature.PLAIN, paging=paging)
    booted.execution.run()
    return booted


@pytest.mark.parametrize("paging", list(Paging))
@pytest.mark.parametrize("smep", [False, True])
def test_a_supervisor_fetch_of_a_user_page_faults_with_smep_only(paging, smep):
    booted = guest((ENABLE_SMEP if smep else "") + "bb00004000 8a03 ffe3", paging)  # MOV EBX; MOV AL, [RBX]; JMP RBX
    run = booted.execution
    assert run.ended is not None
    if smep:
        assert run.ended.reason == "shutdown (triple fault)"
        assert run.vcpu.system.cr2 == USER_PAGE
    else:
        assert run.ended.reason == "halted: interrupts are off"
    assert run.vcpu.regs.rax & 0xFF == 0xFA  # without SMAP the data can be read


@pytest.mark.parametrize("paging", list(Paging))
def test_syscall_needs_efer_sce(paging):
    run = guest(DISABLE_SYSCALL + "0f05", paging).execution
    assert run.ended is not None
    assert run.ended.reason == "shutdown (triple fault)"
    assert run.vcpu.regs.rip == ENTRY + 12  # at SYSCALL
    assert not run.vcpu.regs.r11


def test_sysenter_is_undefined_in_long_mode():
    run = guest("0f34", Paging.OWN).execution
    assert run.ended is not None
    assert run.ended.reason == "shutdown (triple fault)"
    assert run.vcpu.regs.rip == ENTRY


@pytest.mark.parametrize(
    "code",
    [
        "0f20e0 0d00002000 0f22e0",  # CR4.SMAP, which the processor does not have
        "0f20e0 83e0df 0f22e0",  # CR4.PAE off in long mode
        "48b800000000 01000000 0f22c0",  # CR0 past 32 bits
        "0f20c0 83e0fe 0f22c0",  # CR0.PE off with paging on
    ],
)
def test_control_registers_refuse_what_is_reserved(code):
    run = guest(code, Paging.OWN).execution
    assert run.ended is not None
    assert run.ended.reason == "shutdown (triple fault)"
