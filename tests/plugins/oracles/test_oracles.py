from __future__ import annotations

import pytest
from sevlab.core.events import (
    AdvanceClock,
    AspCommand,
    AspStatus,
    CpuExit,
    Injected,
    MemoryWrite,
    Party,
    Space,
    VmExit,
)
from sevlab.core.memory import guest_tag
from sevlab.core.oracle import Finding, OracleSink
from sevlab.core.svm import EVENT_VALID, ExitCode
from sevlab.core.testing import make_machine
from sevlab.core.vocabulary import Outcome
from sevlab.fuzz.runner import Runner
from sevlab.fuzz.targets import target_named
from sevlab.plugins import oracles
from sevlab.plugins.oracles import OwnerTaint, SingleFetch, StepBudget
from sevlab.plugins.oracles.budget import MAX_FETCHES, MAX_RECORDS
from sevlab.plugins.sev import Command
from sevlab.plugins.sev.fuzzing import ContextInvariants, ResourceBalance
from sevlab.plugins.sev_es import Ghcb, NaeCode, Vmgexit
from sevlab.plugins.sev_es.fuzzing import GHCB_GPA
from sevlab.plugins.sev_es.oracles import EventProvenance, PrivateMmio, VcProvenance, VcpuInvariants
from sevlab.plugins.sev_es.records import GhcbRequest, VcDelivered

NOTHING = Outcome(())
CPUID = Vmgexit(0, GHCB_GPA, Ghcb.build(sw_exit_code=0x72, sw_exit_info_1=0, sw_exit_info_2=0, rax=0, rcx=0))
ALL = (
    *oracles.ORACLES,
    ContextInvariants(),
    ResourceBalance(),
    VcpuInvariants(),
    VcProvenance(),
    PrivateMmio(),
    EventProvenance(),
)


@pytest.fixture
def ghcb():
    return Runner(target_named("ghcb"))


def rules(findings):
    return {(finding.oracle, finding.rule) for finding in findings}


@pytest.mark.parametrize("oracle", ALL, ids=lambda oracle: oracle.name)
def test_each_oracle_says_its_rule_and_its_source(oracle):
    assert len(oracle.documentation) > 60


@pytest.mark.parametrize("oracle", ALL, ids=lambda oracle: oracle.name)
def test_no_oracle_objects_to_an_exchange_as_it_should_be(oracle, ghcb):
    machine = ghcb.machine
    machine.sink = None
    for step in (CPUID, AdvanceClock(5)):
        assert oracle.step_end(machine, step, machine.apply(step)) == ()
    assert oracle.sequence_end(machine) == ()


def test_single_fetch_sees_a_second_look_at_a_byte(ghcb):
    machine, oracle = ghcb.machine, SingleFetch()
    spa = machine.access.translate_gpa(machine.vcpus[0], GHCB_GPA)
    machine.apply(CPUID)
    machine.fetches.begin()
    window = machine.access.shared_window(machine.vcpus[0], GHCB_GPA, 4096)
    window.read(0, 4096)
    assert oracle.step_end(machine, CPUID, NOTHING) == ()
    window.read_uint(0x390, 8)
    (finding,) = oracle.step_end(machine, CPUID, NOTHING)
    assert (finding.oracle, finding.rule) == ("single-fetch", "twice")
    assert f"{spa + 0x390:#x}" in finding.message


def test_single_fetch_lets_a_guest_lay_its_scratch_area_over_its_ghcb(ghcb):
    """Two areas that overlap are each read once: KVM takes such a scratch area in version 1."""
    machine, oracle = ghcb.machine, SingleFetch()
    machine.fetches.keep_log(keep=True)
    fields = {"sw_exit_code": NaeCode.MMIO_WRITE, "sw_exit_info_1": 0xFEE0_0000, "sw_exit_info_2": 0x2000}
    step = Vmgexit(0, GHCB_GPA, Ghcb.build(**fields, sw_scratch=GHCB_GPA - 0x800))
    assert oracle.step_end(machine, step, machine.apply(step)) == ()
    assert len(machine.fetches.log) == 2


def test_taint_sees_private_bytes_of_an_encrypted_guest_in_the_open(ghcb):
    machine, oracle = ghcb.machine, OwnerTaint()
    machine.memory.write(0x9000, b"secret", None, guest_tag(0))
    assert rules(oracle.sequence_end(machine)) == {("taint", "private")}
    machine.reset()
    assert oracle.sequence_end(machine) == ()


def test_taint_minds_neither_a_plain_guest_nor_ciphertext(ghcb):
    machine = make_machine("io", guests=1)
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, 0x1000, False, b"public"))
    assert OwnerTaint().sequence_end(machine) == ()
    machine = ghcb.machine
    spa = machine.hypervisor.vms[0].memory_spa + 0x2000
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, 0x2000, True, b"private"))
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa + 64, False, b"overwritten"))
    assert OwnerTaint().sequence_end(machine) == ()


def test_budget_ends_at_its_limits(ghcb):
    machine, oracle = ghcb.machine, StepBudget()
    record = AdvanceClock(1)
    assert oracle.step_end(machine, CPUID, Outcome((record,) * MAX_RECORDS)) == ()
    assert rules(oracle.step_end(machine, CPUID, Outcome((record,) * (MAX_RECORDS + 1)))) == {("budget", "records")}
    machine.fetches.count = MAX_FETCHES + 1
    assert rules(oracle.step_end(machine, CPUID, NOTHING)) == {("budget", "fetches")}


@pytest.mark.parametrize(("xcr0", "wrong"), [(0, True), (5, True), (7, False), (1, False)])
def test_xcr0_must_be_possible(xcr0, wrong, ghcb):
    ghcb.machine.vcpus[0].system.xcr0 = xcr0
    found = VcpuInvariants().step_end(ghcb.machine, CPUID, NOTHING)
    assert rules(found) == ({("sev_es.vcpu", "xcr0")} if wrong else set())


@pytest.mark.parametrize("spa", [0, 0x1234, (1 << 64) - 1])
def test_a_vcpu_runs_with_a_save_area(spa, ghcb):
    vcpu, oracle = ghcb.machine.vcpus[0], VcpuInvariants()
    vcpu.vmcb.vmsa_pa = spa
    assert rules(oracle.step_end(ghcb.machine, CPUID, NOTHING)) == {("sev_es.vcpu", "vmsa")}
    vcpu.halted = True
    assert oracle.step_end(ghcb.machine, CPUID, NOTHING) == ()
    tried = Outcome((VmExit(0, ExitCode.INVALID, 0, 0),))
    assert rules(oracle.step_end(ghcb.machine, CPUID, tried)) == {("sev_es.vcpu", "vmsa")}


@pytest.mark.parametrize(("cpl", "code", "wrong"), [(3, 0x7B, True), (0, 0x7B, False), (3, 0x72, False)])
def test_user_space_gets_no_port(cpl, code, wrong):
    machine = Runner(target_named("vc")).machine
    machine.vcpus[0].system.cpl = cpl
    step = CpuExit(0, code, 0, 0, {0x7B: b"\xee", 0x72: b"\x0f\xa2"}[code], 0)
    outcome = Outcome((VcDelivered(0, code), GhcbRequest(0, code, 0, 0, bytes(16), (), b"")))
    assert rules(VcProvenance().step_end(machine, step, outcome)) == (
        {("sev_es.provenance", "privilege")} if wrong else set()
    )


@pytest.mark.parametrize(("asked", "arrived", "wrong"), [(0x80, 0x80, False), (0x80, 0x480, True), (0x80, 0x21, False)])
def test_an_event_arrives_as_what_it_was_injected_as(asked, arrived, wrong, ghcb):
    machine, oracle = ghcb.machine, EventProvenance()
    machine.vcpus[0].vmcb.event_inj = EVENT_VALID | asked
    assert oracle.step_end(machine, CPUID, NOTHING) == ()
    machine.vcpus[0].vmcb.event_inj = 0
    outcome = Outcome((Injected(0, EVENT_VALID | arrived),))
    assert bool(oracle.step_end(machine, CPUID, outcome)) is wrong
    assert oracle.step_end(machine, CPUID, outcome) == ()
    assert oracle.sequence_end(machine) == ()


@pytest.mark.parametrize(("insn", "wrong"), [(b"\x0f\xa2", False), (b"\x90", True)])
def test_a_request_needs_its_instruction(insn, wrong):
    machine = Runner(target_named("vc")).machine
    step = CpuExit(0, 0x72, 0, 0, insn, 0)
    outcome = Outcome((VcDelivered(0, 0x72), GhcbRequest(0, 0x72, 0, 0, bytes(16), (), b"")))
    assert rules(VcProvenance().step_end(machine, step, outcome)) == (
        {("sev_es.provenance", "opcode")} if wrong else set()
    )


@pytest.mark.parametrize(("gpa", "wrong"), [(0x2000, True), (0xFEE0_0000, False)])
def test_a_device_access_is_no_access_to_private_memory(gpa, wrong, ghcb):
    outcome = Outcome((GhcbRequest(0, 0x8000_0002, gpa, 4, bytes(16), (), b""),))
    assert bool(PrivateMmio().step_end(ghcb.machine, CPUID, outcome)) is wrong


def test_contexts_and_balance_see_what_does_not_agree():
    machine = Runner(target_named("sev.commands")).machine
    sev = machine.components["sev"]
    first, second = sev.guests.values()
    second.asid = first.asid
    assert rules(ContextInvariants().step_end(machine, CPUID, NOTHING)) == {("sev.contexts", "asid")}
    machine.reset()
    assert ContextInvariants().step_end(machine, CPUID, NOTHING) == ()
    sev.tmr.checksums[0x1000] = 1
    assert rules(ResourceBalance().sequence_end(machine)) == {("sev.balance", "tmr")}


@pytest.mark.parametrize(("handle", "status", "wrong"), [(1, 0, True), (1, 3, False), (9, 0, False)])
def test_a_decommissioned_guest_is_gone(handle, status, wrong):
    machine = Runner(target_named("sev.commands")).machine
    assert 1 in machine.components["sev"].guests
    step = AspCommand("sev", Command.DECOMMISSION, 0, handle.to_bytes(4, "little"))
    found = ResourceBalance().step_end(machine, step, Outcome((AspStatus(Command.DECOMMISSION, status, b""),)))
    assert rules(found) == ({("sev.balance", "context")} if wrong else set())


def test_buffers_are_checked_by_the_sink(ghcb):
    window = ghcb.machine.access.shared_window(ghcb.machine.vcpus[0], GHCB_GPA, 4096)
    assert ghcb.run((CPUID,)).findings == ()
    ghcb.machine.tables.steps[Vmgexit] = lambda machine, step: window.read(4090, 8)
    assert rules(ghcb.run((CPUID,)).findings) == {("invariant", "buffer.bounds")}


def test_an_oracle_is_asked_only_after_the_steps_that_it_names(ghcb):
    asked = []

    class After:
        name, documentation, after = "after", "Asked after a VMGEXIT alone.", ("sev_es.vmgexit",)

        def step_end(self, machine, step, outcome):
            asked.append(type(step))
            return (Finding("after", "asked", ""),)

        def sequence_end(self, machine):
            return ()

    sink = OracleSink((After(),))
    for step in (AdvanceClock(1), CPUID, AdvanceClock(1)):
        sink.step_end(ghcb.machine, step, NOTHING)
    assert asked == [Vmgexit]
    assert rules(sink.sequence_end(ghcb.machine)) == {("after", "asked")}
