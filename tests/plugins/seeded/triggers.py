"""For each seeded bug a machine in which it can act, and the shortest sequence that makes it.

`BUILD[name](options)` composes the machine, whose option table is `options`; `ACT[name](machine)` applies the steps.
"""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.events import AspCommand, CpuExit, MemoryWrite, Party, Race, Schedule, SetRegisters, Space, VmcbWrite
from sevlab.core.exitinfo import ioio_word
from sevlab.core.svm import ExitCode, NpfError
from sevlab.core.testing import make_machine
from sevlab.plugins import oracles, seeded
from sevlab.plugins.seeded.asp import LAYOUTS
from sevlab.plugins.sev import Command, GuestState, Policy, launch_guest
from sevlab.plugins.sev import driver as sev_driver
from sevlab.plugins.sev_es import ForgeReply, GuestSetup, NaeCode, Vmgexit, initial_vmsa, set_up_vcpus
from sevlab.plugins.snp import SetPages, SnpGuestRequest, driver
from sevlab.plugins.snp.messages import seal
from sevlab.plugins.xen import HYPERV_FLAG, HvCall
from sevlab.plugins.xen.arguments import HvSendIpiEx

from tests.plugins.sev.world import World
from tests.plugins.sev_es.guests import page
from tests.plugins.snp import support
from tests.plugins.xen import world as xen_world

GHCB_GPA = 0x5000
SHARED_BUFFER = GHCB_GPA + 0x800
CODE_AT, SCRATCH_AT = 0x390, 0x3A8
APIC_ICR_LOW, APIC_ICR_HIGH = 0xFEE0_0300, 0xFEE0_0310
INIT_MESSAGE, STARTUP_MESSAGE = 0x4500, 0x4608
APIC_BASE_X2APIC = 0xFEE0_0D00
OUTS = {width: ioio_word(0x80, width, is_in=False, string=True, rep=True) for width in (1, 4)}
GIVEN = {"seeded": seeded, "oracles": oracles}


# SEV-ES -------------------------------------------------------------------------------------------------------------


def encrypted(options, *, guest="none", vcpus=1):
    """One SEV-ES guest that runs."""
    machine = make_machine(
        "io",
        "sev_es",
        given=GIVEN,
        guests=(GuestConfig(memory_bytes=1 << 20, vcpus=vcpus),),
        options={"sev_es": {"guest": guest}} | options,
    )
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa(vcpu_signature=0xA0_0F11)] * vcpus)
    set_up_vcpus(machine, 0)
    for vcpu in machine.vcpus.values():
        machine.hypervisor.enter(machine, vcpu)
    machine._records.clear()
    machine.mark()
    return machine


def linux(options):
    """As `encrypted`, with Linux's #VC handler, which has its GHCB."""
    machine = encrypted(options, guest="linux")
    machine.apply(GuestSetup(0, GHCB_GPA))
    machine.mark()
    return machine


def two_vcpus(options):
    return encrypted(options, vcpus=2)


def exits(machine, code, info_1=0, info_2=0, *, vcpu=0, **fields):
    return machine.apply(Vmgexit(vcpu, GHCB_GPA, page(code, info_1, info_2, **fields)))


def ghcb_spa(machine):
    return machine.access.translate_gpa(machine.vcpus[0], GHCB_GPA)


def s01(machine):
    exits(machine, ExitCode.IOIO, OUTS[1], 4097, version=1, sw_scratch=0x1_0000)


def s02(machine):
    exits(machine, ExitCode.IOIO, OUTS[4], 2, sw_scratch=SHARED_BUFFER)


def s03(machine):
    machine.apply(Race(2, ghcb_spa(machine) + CODE_AT, int(ExitCode.VMGEXIT).to_bytes(8, "little")))
    exits(machine, ExitCode.CPUID, rax=0, rcx=0)


def s04(machine):
    machine.apply(Race(2, ghcb_spa(machine) + SCRATCH_AT, (GHCB_GPA + 0xFF0).to_bytes(8, "little")))
    exits(machine, ExitCode.IOIO, OUTS[1], 64, sw_scratch=SHARED_BUFFER)


def s06(machine):
    machine.apply(Vmgexit(1, 0x006, b""))
    writes = ((APIC_ICR_HIGH, 1 << 24), (APIC_ICR_LOW, INIT_MESSAGE), (APIC_ICR_LOW, STARTUP_MESSAGE))
    for gpa, value in writes:
        image = bytearray(page(NaeCode.MMIO_WRITE, gpa, 4, sw_scratch=SHARED_BUFFER))
        image[0x800:0x804] = value.to_bytes(4, "little")
        machine.apply(Vmgexit(0, GHCB_GPA, bytes(image)))


def started_ap(options):
    """The AP has run, so that it can wait in a reset hold."""
    machine = two_vcpus(options)
    machine.slots.start_vcpu(machine, machine.vcpus[1], 0)
    machine._records.clear()
    machine.mark()
    return machine


def s07(machine):
    exits(machine, ExitCode.CPUID, rax=0xD, rcx=0, xcr0=4)


def s09(machine):
    exits(machine, ExitCode.IOIO, ioio_word(0x80, 1, is_in=False), rax=0x1234_5600)
    stale = bytearray(page(ExitCode.IOIO, ioio_word(0x80, 1, is_in=True), rax=0x1234_5600))
    stale[0x3F0 + 7] &= 0x7F  # bit 63 of the bitmap: RAX
    machine.apply(Vmgexit(0, GHCB_GPA, bytes(stale)))


def s10(machine):
    exits(machine, ExitCode.IOIO, ioio_word(0x40, 2, is_in=True))


def s11(machine):
    exits(machine, NaeCode.MMIO_READ, 0xFEE0_0FFC, 8, sw_scratch=SHARED_BUFFER)


def s12(machine):
    exits(machine, ExitCode.MSR, 1, rcx=0x1B, rax=APIC_BASE_X2APIC, rdx=0)
    exits(machine, ExitCode.MSR, rcx=0x900)


def s14(machine):
    machine.apply(SetRegisters(0, (("cpl", 3), ("rax", 0x41), ("rdx", 0x80))))
    machine.apply(CpuExit(0, ExitCode.IOIO, ioio_word(0x80, 1, is_in=False), 0, b"\xee", 0))


def s15(machine):
    machine.apply(CpuExit(0, ExitCode.CPUID, 0, 0, b"\x90", 0))


def s16(machine):
    machine.apply(SetRegisters(0, (("cpl", 3),)))
    machine.apply(VmcbWrite(0, 0xA8, 0x8000_0080.to_bytes(8, "little")))
    machine.apply(Schedule())


def s17(machine):
    machine.apply(SetRegisters(0, (("rbx", 0x2000), ("rax", 0x5EC12E7))))
    # mov [bx], al at a page of memory, while the fault names another one
    machine.apply(CpuExit(0, ExitCode.NPF, int(NpfError.RSVD | NpfError.W), 0xFEE0_0000, b"\x88\x07", 0))


# SEV ----------------------------------------------------------------------------------------------------------------


def legacy(options):
    """SEV initialised, no guest yet."""
    return World(given=GIVEN, options=options).machine


def world_of(machine):
    """An owner whose keys are known, for a machine that `legacy` made."""
    made = World.__new__(World)
    made.machine, made.policy, made.handle, made.guest = machine, Policy.ES, 0, None
    made.vm, made.vmsa_spa = machine.hypervisor.vms[0], machine.hypervisor.allocate_pages(1)
    return made


def command(machine, number, spa, **fields):
    return machine.apply(AspCommand("sev", number, spa, LAYOUTS[number].build(**fields)))


def s22(machine):
    owner = world_of(machine).reach(GuestState.LUPDATE)
    buffer = LAYOUTS[Command.LAUNCH_MEASURE].build(handle=owner.handle, spa=owner.place(6), length=0x200)
    machine.apply(AspCommand("sev", Command.LAUNCH_MEASURE, owner.place(0), buffer))


def s23(machine):
    owner = world_of(machine)
    fields = owner.start_fields()
    certificate, _ = owner.session(owner.policy)
    broken = bytearray(certificate)
    broken[0x14] ^= 1  # the lowest byte of the point's x
    owner.put(10, bytes(broken))
    command(machine, Command.LAUNCH_START, owner.place(0), **fields)


def s24(machine):
    owner = world_of(machine)
    handle = owner.need(Command.RECEIVE_START, **owner.start_fields()).handle
    owner.run(Command.ACTIVATE, handle=handle, asid=0)
    owner.run(Command.DECOMMISSION, handle=handle)


# SNP ----------------------------------------------------------------------------------------------------------------


def snp(options):
    return support.talking_machine(given=GIVEN, options=options)[0]


def s05(machine):
    header = (0).to_bytes(2, "little") + (5).to_bytes(2, "little") + bytes(4)
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, support.SHARED_GPA, False, header))
    image = page(NaeCode.SNP_PAGE_STATE_CHANGE, version=1, sw_scratch=support.SHARED_GPA)
    machine.apply(Vmgexit(0, support.GHCB_GPA, image))


def s08(machine):
    machine.apply(Vmgexit(0, support.GHCB_GPA, page(NaeCode.SNP_AP_CREATION, 2)))


def s18(machine):
    machine.apply(ForgeReply(0, 0x800, (7).to_bytes(2, "little")))
    machine.apply(SetPages(0, support.PRIVATE_GPA, 2, 0, False))


def s19(machine):
    victim = machine.hypervisor.vms[0].memory_spa + support.PRIVATE_GPA
    spa = machine.hypervisor.allocate_pages(1)
    driver.put(machine, spa, sev_driver.BUFFERS[Command.GET_ID].build(spa=victim, length=0x80))
    driver.make_firmware(machine, spa)  # as a driver does; the victim's page is what it forgets
    driver.PageLender().ring(machine, Command.GET_ID, spa)


def s20(machine):
    launched = machine.components["snp.hypervisor"].guests[0]
    guest = machine.components["snp"].platform.guests[launched.gctx_spa]
    message = bytearray(seal(guest.vmpcks[0], bytes(96), seqno=1, kind=5, vmpck=0))
    message[0x36:0x38] = (4016).to_bytes(2, "little")
    own = driver.pages(machine)
    driver.put(machine, own.input_spa, bytes(message))
    spas = {"gctx_spa": launched.gctx_spa, "request_spa": own.input_spa, "response_spa": own.output_spa}
    machine.apply(AspCommand("sev", Command.SNP_GUEST_REQUEST, own.command_spa, SnpGuestRequest.build(**spas)))


def s21(machine):
    first = machine.components["snp.hypervisor"].guests[0]
    gctx = machine.hypervisor.allocate_pages(1)
    driver.make_firmware(machine, gctx)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=gctx)
    driver.need(machine, Command.SNP_LAUNCH_START, gctx_spa=gctx, policy=driver.DEFAULT_POLICY)
    driver.run(machine, Command.SNP_ACTIVATE, gctx_spa=gctx, asid=first.asid)


# Xen ----------------------------------------------------------------------------------------------------------------


def xen(options):
    return make_machine(
        "xen",
        given=GIVEN,
        guests=(GuestConfig(memory_bytes=16 << 20),),
        options={"xen": {"start": "long", "viridian": True}} | options,
    )


def s13(machine):
    parameters = HvSendIpiEx.build(vector=0x40, set_format=0, valid_bank_mask=1 << 2)
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, xen_world.PAGE, False, parameters + bytes(8)))
    registers = (("rax", HYPERV_FLAG), ("rcx", int(HvCall.SEND_IPI_EX)), ("rdx", xen_world.PAGE), ("r8", 0))
    machine.apply(SetRegisters(0, registers))
    xen_world.vmmcall(machine)


TRIGGERS = {
    "S01": (encrypted, s01),
    "S02": (encrypted, s02),
    "S03": (encrypted, s03),
    "S04": (encrypted, s04),
    "S05": (snp, s05),
    "S06": (started_ap, s06),
    "S07": (encrypted, s07),
    "S08": (snp, s08),
    "S09": (encrypted, s09),
    "S10": (encrypted, s10),
    "S11": (encrypted, s11),
    "S12": (encrypted, s12),
    "S13": (xen, s13),
    "S14": (linux, s14),
    "S15": (linux, s15),
    "S16": (linux, s16),
    "S17": (linux, s17),
    "S18": (snp, s18),
    "S19": (snp, s19),
    "S20": (snp, s20),
    "S21": (snp, s21),
    "S22": (legacy, s22),
    "S23": (legacy, s23),
    "S24": (legacy, s24),
}
"""By bug: (machine, sequence)."""
