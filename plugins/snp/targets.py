"""Targets of fuzzing SNP, with guests that run: what is booted, and benign sequences to begin from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.config import GuestConfig
from sevlab.core.events import MemoryWrite, Party, Schedule, Space
from sevlab.core.listening import steps_of
from sevlab.core.oracle import Target
from sevlab.core.units import PAGE_BYTES
from sevlab.core.vocabulary import Record
from sevlab.plugins import sev
from sevlab.plugins.sev import Command
from sevlab.plugins.sev_es import Ghcb, GuestSetup, NaeCode, Vmgexit, Vmsa, initial_vmsa
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.driver import LaunchPage, SnpLaunched
from sevlab.plugins.snp.fuzzing import GHCB_GPA
from sevlab.plugins.snp.hypervisor import snp_hypervisor
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.messages import MessageType, ReportRequest, seal
from sevlab.plugins.snp.oracles import ORACLES
from sevlab.plugins.snp.psc import PscEntryValue, PscOperation, build_psc
from sevlab.plugins.snp.records import CreateAp, Pvalidate, RmpAdjust, SendMessage, SetPages
from sevlab.plugins.snp.states import snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

GUESTS = (GuestConfig(name="first", vcpus=2, memory_bytes=1 << 20), GuestConfig(name="second", memory_bytes=1 << 20))
SECRETS_GPA, SHARED_GPA, SHARED_PAGES = 0x3000, 0xA000, 6
PRIVATE_GPA, PRIVATE_PAGES = 0x8_0000, 4
BUFFER_GPA = GHCB_GPA + 0x800
"""The shared buffer of the GHCB."""
FEATURES = 1
"""SEV_FEATURES of the guests: SNPActive."""

# Boot -----------------------------------------------------------------------------------------------------------------


def save_area() -> bytes:
    """A VMSA that VMRUN of an SNP guest takes."""
    return Vmsa.from_bytes(initial_vmsa("qemu", sev_features=FEATURES)).to_bytes()


def load_all(machine: Machine, vm_id: int, guest: SnpLaunched) -> None:
    """Launch what a guest starts with: its secrets, empty pages, a save area for its first vCPU."""
    pages = (GHCB_GPA, *range(SHARED_GPA, SHARED_GPA + SHARED_PAGES * PAGE_BYTES, PAGE_BYTES))
    driver.load(machine, vm_id, guest, LaunchPage(SECRETS_GPA, PageType.SECRETS))
    for gpa in pages:
        driver.load(machine, vm_id, guest, LaunchPage(gpa, PageType.ZERO))
    first, *others = machine.hypervisor.vms[vm_id].vcpu_ids
    driver.load_vmsa(machine, first, guest, save_area())
    for vcpu_id in others:
        machine.vcpus[vcpu_id].halted = True  # until somebody creates it


def run_guest(machine: Machine, vm_id: int) -> None:
    """Launch a guest and let it share its GHCB and some pages, and validate others."""
    guest = driver.begin_launch(machine, vm_id)
    load_all(machine, vm_id, guest)
    driver.finish(machine, guest)
    first = machine.hypervisor.vms[vm_id].vcpu_ids[0]
    machine.apply(Schedule())
    machine.apply(SetPages(first, GHCB_GPA, 1, 0, False))
    machine.apply(GuestSetup(first, GHCB_GPA))
    machine.apply(SetPages(first, SHARED_GPA, SHARED_PAGES, 0, False))
    machine.apply(SetPages(first, PRIVATE_GPA, PRIVATE_PAGES, 0, True))


def boot_both(machine: Machine) -> None:
    """Two guests that run."""
    for vm_id in list(machine.hypervisor.vms):
        run_guest(machine, vm_id)


def boot_one(machine: Machine) -> None:
    """A guest that runs, and the context of another whose launch has begun."""
    first, _ = list(machine.hypervisor.vms)
    run_guest(machine, first)
    gctx = machine.hypervisor.allocate_pages(1)
    driver.make_firmware(machine, gctx)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=gctx)
    driver.need(machine, Command.SNP_LAUNCH_START, gctx_spa=gctx, policy=driver.DEFAULT_POLICY)


# Seeds ----------------------------------------------------------------------------------------------------------------


def command_seeds(machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """What a driver does: launch and stop a guest, carry a message, ask the platform, run a legacy command."""
    first, second = list(machine.hypervisor.vms)
    host = snp_hypervisor(machine).guests[first]
    running = SnpLaunched(host.gctx_spa, host.asid)
    own = driver.pages(machine)

    def launch() -> None:
        guest = driver.begin_launch(machine, second)
        driver.load(machine, second, guest, LaunchPage(SECRETS_GPA, PageType.SECRETS))
        driver.load_vmsa(machine, machine.hypervisor.vms[second].vcpu_ids[0], guest, save_area())
        driver.finish(machine, guest)

    def carry() -> None:
        key = snp_state(machine).platform.guests[running.gctx_spa].vmpcks[0]
        driver.put(machine, own.input_spa, seal(key, bytes(ReportRequest.SIZE), seqno=1, kind=REPORT, vmpck=0))
        spas = {"request_spa": own.input_spa, "response_spa": own.output_spa}
        driver.run(machine, Command.SNP_GUEST_REQUEST, gctx_spa=running.gctx_spa, **spas)

    def ask() -> None:
        driver.run(machine, Command.SNP_PLATFORM_STATUS, page_spa=own.output_spa)
        driver.run(machine, Command.SNP_GUEST_STATUS, gctx_spa=running.gctx_spa, page_spa=own.output_spa)
        sev.run(machine, Command.PLATFORM_STATUS)
        sev.run(machine, Command.GET_ID, spa=own.input_spa, length=0x80)

    def stop() -> None:
        driver.stop(machine, running)
        driver.flush(machine)

    return tuple(steps_of(machine, call) for call in (ask, carry, launch, stop))


REPORT = int(MessageType.REPORT_REQ)


def page(code: int, info_1: int = 0, info_2: int = 0, *, buffer: bytes = b"", version: int = 2, **fields: int) -> bytes:
    """A GHCB with a request, `buffer` in its shared buffer."""
    image = Ghcb.build(sw_exit_code=code, sw_exit_info_1=info_1, sw_exit_info_2=info_2, protocol_version=2, **fields)
    return image[:0x800] + buffer + image[0x800 + len(buffer) :]


def guest_request_seeds(_machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """Page state changes with PVALIDATE, the creation of a vCPU with RMPADJUST, a guest request."""
    share = build_psc(tuple(PscEntryValue(PRIVATE_GPA >> 12 | n, PscOperation.SHARED) for n in range(3)))
    back = build_psc((PscEntryValue(PRIVATE_GPA >> 12, PscOperation.PRIVATE),))
    ask = NaeCode.SNP_PAGE_STATE_CHANGE
    vmsa = MemoryWrite(Party.GUEST, 0, Space.GPA, PRIVATE_GPA + PAGE_BYTES, True, save_area())
    return (
        (Vmgexit(0, GHCB_GPA, page(ask, buffer=share, sw_scratch=BUFFER_GPA)),),
        (
            Pvalidate(0, PRIVATE_GPA, 0, 0),
            Vmgexit(0, GHCB_GPA, page(ask, buffer=share[:16], sw_scratch=BUFFER_GPA)),
            Vmgexit(0, GHCB_GPA, page(ask, buffer=back, sw_scratch=BUFFER_GPA)),
            Pvalidate(0, PRIVATE_GPA, 0, 1),
        ),
        (
            vmsa,
            RmpAdjust(0, PRIVATE_GPA + PAGE_BYTES, 0, 1 << 16 | 1),
            Vmgexit(0, GHCB_GPA, page(NaeCode.SNP_AP_CREATION, 1 << 32 | 1, PRIVATE_GPA + PAGE_BYTES, rax=FEATURES)),
        ),
        (Vmgexit(0, GHCB_GPA, page(NaeCode.SNP_GUEST_REQUEST, SHARED_GPA, SHARED_GPA + PAGE_BYTES)),),
    )


def guest_seeds(_machine: Machine) -> tuple[tuple[Record, ...], ...]:
    """What the reference guest does: pages shared and made private again, a report, another vCPU."""
    return (
        (SetPages(0, PRIVATE_GPA, 2, 0, False), SetPages(0, PRIVATE_GPA, 2, 0, True)),
        (SendMessage(0, SECRETS_GPA, SHARED_GPA, 0, REPORT, bytes(ReportRequest.SIZE), 0),),
        (CreateAp(0, 1, PRIVATE_GPA, 1, 0, save_area()), CreateAp(0, 1, PRIVATE_GPA, 2, 0, b"")),
    )


# Targets --------------------------------------------------------------------------------------------------------------

_NAMES = tuple(oracle.name for oracle in ORACLES)
_GUEST_STEPS = ("snp.set-pages", "snp.message", "snp.create-ap", "snp.cpuid-page", "snp.doorbell", "snp.hv",
                "snp.hv-ipi")  # fmt: skip
_RMP_STEPS = ("snp.rmpupdate", "snp.psmash", "snp.rmpread", "read", "write", "npt")

TARGETS: tuple[Target, ...] = (
    Target(
        "snp.commands",
        Party.HYPERVISOR,
        ("asp.command", "asp.read", "asp.write", "cache", *_RMP_STEPS),
        _NAMES,
        ("snp",),
        "SNP mailbox commands and RMP instructions of a hostile hypervisor.",
        guests=GUESTS,
        boot=boot_one,
        seeds=command_seeds,
    ),
    Target(
        "snp.messages",
        Party.GUEST,
        ("snp.message", "sev_es.vmgexit", "write"),
        (*_NAMES, "sev_es.vcpu"),
        ("snp",),
        "Guest messages of a hostile guest to the firmware, through an honest hypervisor.",
        guests=GUESTS,
        boot=boot_both,
        seeds=guest_seeds,
    ),
    Target(
        "snp.psc",
        Party.GUEST,
        ("sev_es.vmgexit", "snp.pvalidate", "snp.rmpadjust", "snp.rmpquery", "write", "race"),
        (*_NAMES, "sev_es.vcpu"),
        ("snp",),
        "Page state changes and RMP instructions of a hostile guest.",
        guests=GUESTS,
        boot=boot_both,
        seeds=guest_request_seeds,
    ),
    Target(
        "snp.guest",
        Party.HYPERVISOR,
        (*_GUEST_STEPS, "sev_es.forge", "sev_es.forge-msr", *_RMP_STEPS),
        _NAMES,
        ("snp",),
        "The reference guest against a hypervisor that forges replies and page states.",
        guests=GUESTS,
        boot=boot_both,
        seeds=guest_seeds,
    ),
)
