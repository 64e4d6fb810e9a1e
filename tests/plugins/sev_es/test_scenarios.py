"""The scenarios of public test suites, each as one test on a scripted guest."""

from __future__ import annotations

import pytest
from sevlab.core.builder import Port
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import intercepted
from sevlab.core.events import CpuExit, SetRegisters, Stopped, VmExit
from sevlab.core.hookspecs import hookimpl
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.plugins.sev import Policy, launch_guest
from sevlab.plugins.sev_es import (
    MSR_SEV_STATUS,
    GhcbRequest,
    GuestSetup,
    Terminated,
    Vmgexit,
    Vmsa,
    initial_vmsa,
    set_up_vcpus,
    vm_protocol,
)

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine
from tests.vectors import load_json, vector_set

SCENARIOS = load_json(vector_set("ghcb") / "scenarios.json")
LONG_MODE = {"cs": (8, 0x29B, 0xFFFF_FFFF, 0), "efer": 0x1501}


def scenario(words):
    """The entry whose guest is described with `words`: a test exists for each, and for no other."""
    return next(entry for entry in SCENARIOS if words in entry["guest"])


def test_every_scenario_has_a_test():
    words = ("writes 0x100", "UD2", "XSAVE state", "KVM_SEV_INIT2", "REP OUTSW")
    assert {scenario(word)["guest"] for word in words} == {entry["guest"] for entry in SCENARIOS}


def test_a_termination_request_ends_the_vm_and_reports_the_msr():
    assert "one data word 0x100" in scenario("writes 0x100")["expect"]
    outcome = encrypted_machine().apply(Vmgexit(0, 0x100, b""))
    assert outcome.first(Terminated) == Terminated(0, 0, 0, 0x100)
    assert outcome.first(Stopped) is not None


def test_a_triple_fault_is_a_shutdown_exit():
    assert "shutdown exit" in scenario("UD2")["expect"]
    outcome = encrypted_machine().apply(CpuExit(0, ExitCode.SHUTDOWN, 0, 0, b"", 0))
    assert outcome.first(VmExit).exit_code == ExitCode.SHUTDOWN
    assert outcome.first(Stopped) is not None


CODE_GPA, MEMORY = 0x10_0000, 4 << 20


def executed(code, *, system=None):
    """An SEV-ES guest of this code under the engine, not yet run."""
    pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
    from sevlab.plugins.engines import Feature, GuestImage, boot, compose

    class Image(GuestImage):
        def start(self, regs, registers, c_bit_mask):
            super().start(regs, registers, c_bit_mask)
            for name, value in (system or {}).items():
                setattr(registers, name, value)

    machine = compose(memory_bytes=MEMORY)
    image = Image("code", CODE_GPA)
    image.add(CODE_GPA, code, "the code", MEMORY)
    image.finish(1 << machine.config.part.c_bit, MEMORY)
    return boot(machine, image, Feature.SEV_ES)


def test_an_idt_of_limit_0_and_ud2_end_in_a_shutdown_exit_when_executed():
    """LIDT of ten zero bytes, UD2: #UD has no gate, nor has #DF; the guest's registers stay its own."""
    lidt = b"\x0f\x01\x1d" + (2).to_bytes(4, "little")
    guest = executed(lidt + b"\x0f\x0b" + bytes(10))
    ended = guest.execution.run()
    assert guest.execution.exits[ExitCode.SHUTDOWN] == 1
    assert not ended.clean
    assert "shutdown" in ended.reason
    assert guest.execution.vcpu.stopped
    assert guest.execution.exits[ExitCode.VMGEXIT] == 0


def test_the_xmm_state_of_the_launch_is_there_at_the_first_instruction_when_executed():
    """MOVUPS of XMM0 and XMM15 to private memory, then UD2 without an IDT."""
    xmm = tuple(int.from_bytes(bytes(range(16 * n, 16 * n + 16)), "little") for n in range(16))
    store = b"\x0f\x11\x04\x25" + (0x9000).to_bytes(4, "little")
    store += b"\x44\x0f\x11\x3c\x25" + (0x9010).to_bytes(4, "little")
    guest = executed(store + b"\x0f\x0b", system={"xmm": xmm})
    guest.execution.run()
    stored = guest.machine.access.guest_physical_read(guest.execution.vcpu, 0x9000, 32, c_bit=True)
    assert stored == bytes(range(16)) + bytes(range(240, 256))


def test_the_fpu_state_set_before_launch_is_the_guests_at_its_first_instruction():
    assert "VMSA carries the FPU area" in scenario("XSAVE state")["expect"]
    xmm = bytes(range(256))
    ymm = bytes(reversed(range(256)))
    x87 = bytes(range(80))
    page = Vmsa.from_bytes(initial_vmsa()).replace(fpreg_xmm=xmm, fpreg_ymm=ymm, fpreg_x87=x87, mxcsr=0x1FA0).to_bytes()
    machine = make_machine("sme", "sev", "sev_es", guests=(GuestConfig(memory_bytes=1 << 20),))
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[page])
    set_up_vcpus(machine, 0)
    vcpu = machine.vcpus[0]
    machine.hypervisor.enter(machine, vcpu)
    assert b"".join(value.to_bytes(16, "little") for value in vcpu.system.xmm) == xmm
    key = machine.access.key_of(vcpu.asid, c_bit=True)
    area = Vmsa.from_bytes(machine.memory.read(vcpu.vmcb.vmsa_pa, 4096, key))
    assert (area.fpreg_xmm, area.fpreg_ymm, area.fpreg_x87, area.mxcsr) == (xmm, ymm, x87, 0x1FA0)


DEBUG_SWAP = 5
INIT2 = [("vmsa_features", 1 << bit) for bit in range(64) if bit != DEBUG_SWAP]
INIT2 += [("vmsa_features", 1 << DEBUG_SWAP | 1), ("protocol_max", 3), ("protocol_min", 0), ("features", 1 << 52)]
INIT2 += [(f"flag_{bit}", True) for bit in range(32)]


@pytest.mark.parametrize(("option", "value"), INIT2, ids=[f"{name}-{value:#x}" for name, value in INIT2])
def test_unsupported_settings_of_a_guest_are_refused(option, value):
    """KVM_SEV_INIT2 with a flag (there are none) or a feature that is not supported is EINVAL: here a ConfigError."""
    from sevlab.core.errors import ConfigError

    assert scenario("KVM_SEV_INIT2")["expect"] == "EINVAL"
    with pytest.raises(ConfigError, match=option):
        make_machine("sme", "sev", "sev_es", options={"sev_es": {option: value}})


@pytest.mark.parametrize("features", [0, 1 << DEBUG_SWAP])
def test_supported_features_are_what_the_guest_finds(features):
    machine = make_machine(
        "sme", "sev", "sev_es",
        guests=(GuestConfig(memory_bytes=1 << 20),), options={"sev_es": {"vmsa_features": features}},
    )  # fmt: skip
    vcpu = machine.vcpus[0]
    assert vm_protocol(machine, vcpu).sev_features == features
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa(sev_features=features)])
    set_up_vcpus(machine, 0)
    machine.hypervisor.enter(machine, vcpu)
    read = machine.tables.guest_msrs[MSR_SEV_STATUS].read
    assert read(machine, vcpu, MSR_SEV_STATUS) == 0b11 | features << 2
    for code in (ExitCode.DR7_READ, ExitCode.DR7_WRITE):
        assert intercepted(machine, vcpu, code, 0) is not bool(features)


def test_what_the_save_area_says_counts_whatever_the_machine_was_told():
    machine = make_machine("sme", "sev", "sev_es", guests=(GuestConfig(memory_bytes=1 << 20),))
    launch_guest(machine, 0, policy=Policy.ES, vmsas=[initial_vmsa(sev_features=1 << DEBUG_SWAP)])
    set_up_vcpus(machine, 0)
    machine.hypervisor.enter(machine, machine.vcpus[0])
    assert vm_protocol(machine, machine.vcpus[0]).sev_features == 1 << DEBUG_SWAP


def test_rep_outsw_leaves_the_last_word_in_a_latch():
    entry = scenario("REP OUTSW")
    assert "0x706f" in entry["expect"]
    latch = []

    class Latch:
        """A port that gives back what was written last."""

        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            builder.ports.add(0xE0, Port(lambda *_: latch[-1], lambda *args: latch.append(args[-1]), 2))

    machine = encrypted_machine(plugins=("sme", "sev", "sev_es"), guest="linux", given={"latch": Latch()})
    vcpu = machine.vcpus[0]
    vcpu.system.cs, vcpu.system.efer = LONG_MODE["cs"], LONG_MODE["efer"]
    machine.apply(GuestSetup(0, GHCB_GPA))
    machine.access.guest_physical_write(vcpu, 0x8000, b"abcdefghijklmnop", c_bit=True)
    machine.apply(SetRegisters(0, (("rsi", 0x8000), ("rcx", 8), ("rdx", 0xE0), ("rip", 0x1000))))
    outcome = machine.apply(CpuExit(0, ExitCode.IOIO, 0xE0_0E2C, 0, b"\xf3\x66\x6f", 0))
    assert outcome.first(GhcbRequest).data == b"abcdefghijklmnop"
    assert len(latch) == 8
    machine.apply(CpuExit(0, ExitCode.IOIO, 0xE0_0221, 0, b"\x66\xed", 0))
    assert vcpu.regs.rax & 0xFFFF == 0x706F
