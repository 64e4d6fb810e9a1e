"""VMGEXIT: round trips of both protocols, sequences, and the reference guest; ratios to an exit that only resumes."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.events import CpuExit
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es import Ghcb, GuestSetup, NaeCode, Vmgexit, initial_vmsa, set_up_vcpus

from tests.bench.harness import Bench, Row

GHCB_GPA = 0x5000
FIVE = ("io", "sme", "sev", "sev_es", "snp")


def machine_of(*plugins, **options):
    """A launched SEV-ES guest."""
    machine = make_machine(*plugins, guests=(GuestConfig(memory_bytes=1 << 20),), options={"sev_es": options})
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa()])
    set_up_vcpus(machine, 0)
    machine.hypervisor.enter(machine, machine.vcpus[0])
    machine._records.clear()
    machine.mark()
    return machine


def page(code, info_1=0, info_2=0, **fields):
    return Ghcb.build(
        sw_exit_code=code, sw_exit_info_1=info_1, sw_exit_info_2=info_2, protocol_version=2, ghcb_usage=0, **fields
    )


def requests():
    """A request of each kind that a booting guest makes most."""
    return {
        "CPUID": Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0x8000_001F, rcx=0, xcr0=1)),
        "MSR read": Vmgexit(0, GHCB_GPA, page(ExitCode.MSR, rcx=0x1B)),
        "IOIO, one OUT": Vmgexit(0, GHCB_GPA, page(ExitCode.IOIO, 0x80_0210, rax=0x41)),
        "MMIO read": Vmgexit(0, GHCB_GPA, page(NaeCode.MMIO_READ, 0xFEE0_0030, 4, sw_scratch=GHCB_GPA + 0x800)),
        "a refused request": Vmgexit(0, GHCB_GPA, page(0x9999)),
        "MSR protocol, CPUID": Vmgexit(0, 0x8000_001F_0000_0004, b""),
    }


def round_trips(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for name, machine in (("five plugins", machine_of(*FIVE)), ("without devices", machine_of("sme", "sev", "sev_es"))):
        resume = CpuExit(0, ExitCode.INTR, 0, 0, b"", 0)
        machine.tables.exits.setdefault(ExitCode.INTR, lambda *_: None)
        machine.reset()
        bare = bench(lambda machine=machine, resume=resume: machine.apply(resume))
        rows.append((f"{name}: an exit that only resumes", 1.0, f"{bare:.2f} us"))
        for kind, request in requests().items():
            machine.reset()
            took = bench(lambda machine=machine, request=request: machine.apply(request))
            target = 3 if kind.startswith("MSR protocol") else 10
            rows.append((f"{name}: {kind}", took / bare, f"{took:.2f} us (target {target})"))
    return rows


def sequences(bench: Bench) -> list[Row]:
    """Ten messages with building their pages and the reset, as a fuzzer makes them."""
    machine = machine_of(*FIVE)

    def sequence():
        for number in range(5):
            machine.apply(Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=number, rcx=0, xcr0=1)))
            machine.apply(Vmgexit(0, GHCB_GPA, page(ExitCode.IOIO, 0x80_0210, rax=number)))
        machine.reset()

    one = Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0, rcx=0, xcr0=1))
    single = bench(lambda: machine.apply(one))
    machine.reset()
    ten = bench(sequence, number=max(bench.number // 10, 50))
    return [
        (
            "ten messages with building the pages and reset, to ten round trips",
            ten / single / 10,
            f"{ten:.0f} us (target 130)",
        )
    ]


def guests(bench: Bench) -> list[Row]:
    """#VC, handler, request, reply and registers; the ratio is to the hypervisor's half."""
    machine = machine_of(*FIVE, guest="linux")
    machine.vcpus[0].system.cs, machine.vcpus[0].system.efer = (8, 0x29B, 0xFFFF_FFFF, 0), 0x1501
    machine.apply(GuestSetup(0, GHCB_GPA))
    request = Vmgexit(0, GHCB_GPA, page(ExitCode.CPUID, rax=0, rcx=0, xcr0=1))
    half = bench(lambda: machine.apply(request))
    vc = CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0)
    whole = bench(lambda: machine.apply(vc))
    return [("CPUID by the reference guest, to the hypervisor's half", whole / half, f"{whole:.1f} us")]


GROUPS = (round_trips, sequences, guests)
