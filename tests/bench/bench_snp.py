"""SNP: the RMP check of an access, PVALIDATE, page state changes, messages; ratios to what they are made of."""

from __future__ import annotations

from struct import Struct

from sevlab.core.config import GuestConfig
from sevlab.core.events import AdvanceClock, HostMsr, NptEdit
from sevlab.core.testing import make_machine
from sevlab.plugins.sev_es import Ghcb, GuestSetup, NaeCode, Vmgexit, initial_vmsa
from sevlab.plugins.sme import SYSCFG
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.psc import PscEntryValue, build_psc
from sevlab.plugins.snp.records import Pvalidate, SetPages

from tests.bench.harness import Bench, Row

GPA, GHCB = 0x5000, 0x8000
PRIVATE_READ, PRIVATE_WRITE = 8, 9


def _guest():
    machine = make_machine(
        "snp",
        guests=(GuestConfig(memory_bytes=8 << 20),),
        memory_bytes=64 << 20,
        options={"sev_es": {"features": 3}},
    )
    machine.apply(HostMsr(SYSCFG, False, 0))
    guest = driver.begin_launch(machine, 0)
    for gpa in (GPA, GHCB):
        driver.load(machine, 0, guest, LaunchPage(gpa, PageType.ZERO))
    driver.load_vmsa(machine, 0, guest, initial_vmsa("qemu", sev_features=1))
    driver.finish(machine, guest)
    machine.apply(SetPages(0, GHCB, 1, 0, False))
    machine.apply(GuestSetup(0, GHCB))
    machine.mark()
    return machine


def check(bench: Bench) -> list[Row]:
    """The check alone, and what a guest access costs with and without it."""
    machine = _guest()
    vcpu, spa = machine.vcpus[0], machine.hypervisor.vms[0].memory_spa + GPA
    slot, unpack, entry = machine.slots.access_check, Struct("<QQ").unpack_from, bytearray(16)
    decode = bench(lambda: unpack(entry, 0))
    passed = bench(lambda: slot(vcpu, spa, GPA, PRIVATE_READ))
    access = machine.access
    with_check = bench(lambda: access.guest_physical(vcpu, GPA, PRIVATE_READ))
    access._check = None
    without = bench(lambda: access.guest_physical(vcpu, GPA, PRIVATE_READ))
    access._check = slot
    return [
        ("RMP check of a private access that passes", passed / decode, f"{passed:.2f} us (<= 0.5)"),
        ("guest access with the check, to without", with_check / without, f"{with_check:.2f} us"),
    ]


def instructions(bench: Bench) -> list[Row]:
    """PVALIDATE as a step, to a step that does next to nothing."""
    machine = _guest()
    machine.apply(NptEdit(0, GPA, machine.hypervisor.vms[0].memory_spa + GPA, 4096, 3))
    empty = bench(lambda: machine.apply(AdvanceClock(1)))

    def pair():
        machine.apply(Pvalidate(0, GPA, 0, 0))
        machine.apply(Pvalidate(0, GPA, 0, 1))

    one = bench(pair) / 2
    return [("PVALIDATE round trip, to an empty step", one / empty, f"{one:.1f} us (<= 8)")]


def page_states(bench: Bench) -> list[Row]:
    """A page state change of 253 pages, to one of a single page."""
    machine = _guest()

    def change(count, operation, stride):
        gfns = (0x200 + number * stride for number in range(count))
        entries = tuple(PscEntryValue(gfn, operation) for gfn in gfns)
        fields = {"sw_exit_info_1": 0, "sw_exit_info_2": 0, "sw_scratch": GHCB + 0x800, "protocol_version": 2}
        page = bytearray(Ghcb.build(sw_exit_code=NaeCode.SNP_PAGE_STATE_CHANGE, **fields))
        structure = build_psc(entries)
        page[0x800 : 0x800 + len(structure)] = structure
        return Vmgexit(0, GHCB, bytes(page))

    def both(count, stride):
        steps = change(count, 1, stride), change(count, 2, stride)

        def run():
            for step in steps:
                machine.apply(step)

        return run

    one = bench(both(1, 1), number=200) / 2
    row = bench(both(253, 1), number=5) / 2
    apart = bench(both(253, 5), number=5) / 2
    return [
        ("page state change of 253 pages in a row, to one page", row / one, f"{row / 1000:.2f} ms (<= 1)"),
        ("page state change of 253 pages apart, to one page", apart / one, f"{apart / 1000:.2f} ms (<= 1)"),
    ]


GROUPS = (check, instructions, page_states)
