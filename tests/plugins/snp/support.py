"""A machine with SNP on and guests that own pages, for the tests of the plugin."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.events import Done, HostMsr, Schedule
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import Command
from sevlab.plugins.sev_es import GuestSetup, Vmsa, initial_vmsa
from sevlab.plugins.sme import SYSCFG, install_key
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.layout import RmpState
from sevlab.plugins.snp.records import RmpResult, RmpUpdate, SetPages
from sevlab.plugins.snp.rmp import initialize_rmp
from sevlab.plugins.snp.states import SnpVcpu, snp_state

C_BIT = 1 << 51
SYSCFG_SNP = 1 << 23 | 1 << 24 | 1 << 25
MIB = 1 << 20


def rmp_machine(guests=1, *, memory=4 * MIB, vcpus=1, **settings):
    """SNP enabled, RMP initialised; guests are SNP-active and own nothing yet; ASID = VM number + 1."""
    machine = make_machine(
        "snp",
        guests=tuple(GuestConfig(name=f"g{n}", memory_bytes=memory, vcpus=vcpus) for n in range(guests)),
        memory_bytes=settings.pop("memory_bytes", 64 * MIB),
        **settings,
    )
    machine.apply(HostMsr(SYSCFG, True, SYSCFG_SNP))
    initialize_rmp(machine)
    for vm in machine.hypervisor.vms.values():
        vm.c_bit_mask = C_BIT
        install_key(machine, vm.vm_id + 1, bytes([vm.vm_id + 1]) * 16 + bytes([vm.vm_id + 0x81]) * 16, vm.name)
        for vcpu_id in vm.vcpu_ids:
            snp_state(machine).vcpus[vcpu_id] = SnpVcpu()
            machine.vcpus[vcpu_id].vmcb.guest_asid = vm.vm_id + 1
    machine.mark()
    return machine


def update(machine, spa, *, gpa=0, assigned=1, page_size=0, immutable=0, asid=0):
    """RAX of the RMPUPDATE."""
    state = RmpState.build(gpa=gpa, assigned=assigned, page_size=page_size, immutable=immutable, asid=asid)
    return machine.apply(RmpUpdate(spa, state)).first(RmpResult).rax


def snp_machine(guests=1, *, memory=4 * MIB, vcpus=1, **settings):
    """SNP initialised by the driver; nothing is launched yet."""
    machine = make_machine(
        "snp",
        guests=tuple(GuestConfig(name=f"g{n}", memory_bytes=memory, vcpus=vcpus) for n in range(guests)),
        memory_bytes=settings.pop("memory_bytes", 64 * MIB),
        **settings,
    )
    driver.enable(machine)
    machine.mark()
    return machine


def running(machine, vm_id=0, *, policy=driver.DEFAULT_POLICY, pages=(), **finish):
    """A guest that was launched with `pages` and a VMSA for each vCPU."""
    guest = driver.begin_launch(machine, vm_id, policy=policy)
    for page in pages:
        assert driver.load(machine, vm_id, guest, page) == 0
    for vcpu_id in machine.hypervisor.vms[vm_id].vcpu_ids:
        driver.load_vmsa(machine, vcpu_id, guest, VMSA)
    driver.finish(machine, guest, **finish)
    return guest


VMSA = bytes(0x3B0) + (1).to_bytes(8, "little") + bytes(0x1000 - 0x3B8)


def context(machine, guest):
    """The firmware's context of a launched guest."""
    return snp_state(machine).platform.guests[guest.gctx_spa]


def ask(machine, guest, message, *, request_spa=None):
    """(status, the bytes of the response page) of an SNP_GUEST_REQUEST with this message."""
    pages = driver.pages(machine)
    driver.put(machine, pages.input_spa, message.ljust(4096, b"\0"))
    status = driver.run(
        machine,
        Command.SNP_GUEST_REQUEST,
        gctx_spa=guest.gctx_spa,
        request_spa=request_spa or pages.input_spa,
        response_spa=pages.output_spa,
    )
    return status, driver.get(machine, pages.output_spa, 4096)


GHCB_GPA = 0x8000
SECRETS_GPA = 0x3000
SHARED_GPA = 0xA000
PRIVATE_GPA = 0x10_0000


def snp_vmsa(**fields):
    """A save area that VMRUN takes, with SNPActive."""
    return (
        Vmsa.from_bytes(initial_vmsa("qemu", sev_features=fields.pop("sev_features", 1))).replace(**fields).to_bytes()
    )


def launched_machine(*, vcpus=1, guests=1, features=0b11, pages=(), vmsa=None, options=None, **settings):
    """Guests that are launched and scheduled, and have said nothing yet."""
    options = {"sev_es": {"features": features}} | (options or {})
    machine = snp_machine(guests, vcpus=vcpus, options=options, **settings)
    launched = []
    for vm_id, vm in list(machine.hypervisor.vms.items()):
        guest = driver.begin_launch(machine, vm_id)
        shared = (GHCB_GPA, *range(SHARED_GPA, SHARED_GPA + 6 * 4096, 4096))
        zero = tuple(LaunchPage(gpa, PageType.ZERO) for gpa in shared)
        for page in (LaunchPage(SECRETS_GPA, PageType.SECRETS), *zero, *pages):
            assert driver.load(machine, vm_id, guest, page) == 0
        driver.load_vmsa(machine, vm.vcpu_ids[0], guest, vmsa or snp_vmsa())
        for vcpu_id in vm.vcpu_ids[1:]:
            machine.vcpus[vcpu_id].halted = True
        driver.finish(machine, guest)
        machine.apply(Schedule())
        launched.append(guest)
    machine.mark()
    return machine, launched


def talking_machine(**settings):
    """Guests that run, each with a GHCB and shared pages for messages, by the reference guest and hypervisor."""
    machine, launched = launched_machine(**settings)
    for vm in list(machine.hypervisor.vms.values()):
        first = vm.vcpu_ids[0]
        for step in (
            SetPages(first, GHCB_GPA, 1, 0, False),
            GuestSetup(first, GHCB_GPA),
            SetPages(first, SHARED_GPA, 6, 0, False),
            SetPages(first, PRIVATE_GPA, 4, 0, True),
        ):
            outcome = machine.apply(step)
            assert Done() in outcome.records, outcome
    machine.mark()
    return machine, launched
