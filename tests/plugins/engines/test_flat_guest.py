"""Our own guest in C, as plain, SEV and SEV-ES guest: what it prints, exits, recordings, digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from sevlab.core.cpu import Vcpu
from sevlab.core.memory import guest_tag
from sevlab.core.svm import ExitCode
from sevlab.plugins.engines import Booted, Feature, boot, compose
from sevlab.plugins.engines.commands.run import run
from sevlab.plugins.engines.launch import c_bit_mask
from sevlab.plugins.engines.loaders.image import GuestImage
from sevlab.plugins.engines.loaders.load import load_guest
from sevlab.plugins.io import devices
from sevlab.plugins.sev import SevLaunchDigest
from sevlab.plugins.sev_es import initial_vmsa, state_bytes

MEMORY = 16 << 20
STATUS = {Feature.PLAIN: ("a plain", 0), Feature.SEV: ("an SEV", 1), Feature.SEV_ES: ("an SEV-ES", 3)}


def booted(path: Path, feature: Feature) -> Booted:
    machine = compose(memory_bytes=MEMORY)
    image = load_guest(path, memory_bytes=MEMORY, encrypted=feature.encrypted, c_bit_mask=c_bit_mask(machine, feature))
    return boot(machine, image, feature)


def output(guest: Booted) -> str:
    return devices(guest.machine, guest.execution.vcpu).uart.output.decode()


@pytest.mark.parametrize("feature", list(Feature))
def test_the_guest_finds_its_mode_and_prints_its_lines(flat_elf, feature):
    guest = booted(flat_elf, feature)
    ended = guest.execution.run()
    words, status = STATUS[feature]
    lines = output(guest).splitlines()
    assert ended == ("debug exit with status 33", True)
    assert lines[0] == f"hello from {words} guest, vendor AuthenticAMD, status {status:04x}"
    assert lines[-1] == "page faults 1, line status 60"
    if feature is not Feature.SEV:  # whose hypervisor cannot read the string
        assert lines[1] == "rep outsb: a string in one exchange"


def test_encrypted_state_turns_every_ioio_into_one_vmgexit(flat_elf):
    guest = booted(flat_elf, Feature.SEV_ES)
    guest.execution.run()
    exits = guest.execution.exits
    assert exits[ExitCode.IOIO] + 4 + 1 + 1 == exits[ExitCode.VMGEXIT]  # CPUID by MSR, one by page, and SEV_INFO
    assert ExitCode.MSR not in exits


def test_private_memory_is_ciphertext_for_the_hypervisor_and_the_ghcb_is_not(flat_elf):
    guest = booted(flat_elf, Feature.SEV_ES)
    guest.execution.run()
    spa = guest.vm.memory_spa
    image = guest.image.loads[0x10_0000]
    assert guest.machine.access.hypervisor_read(spa + 0x10_0000, 64) != image[:64]
    assert guest.machine.access.guest_physical_read(guest.execution.vcpu, 0x10_0000, 64, c_bit=True) == image[:64]
    ghcb = guest.execution.vcpu.vmcb.ghcb_gpa
    assert guest.machine.access.hypervisor_read(spa + ghcb + 0x390, 1) == b"\x7b"


def test_no_byte_of_the_guests_own_lies_in_the_open(flat_elf):
    guest = booted(flat_elf, Feature.SEV_ES)
    guest.execution.run()
    tag = guest_tag(guest.vm.vm_id)
    memory = guest.machine.memory
    shared = [pfn for pfn, page in memory.pages.items() if page.key is None]
    assert shared
    assert all(tag not in memory.tags(pfn << 12, 4096) for pfn in shared)


def test_two_runs_are_the_same_to_the_last_register(flat_elf):
    states = []
    for _ in range(2):
        guest = booted(flat_elf, Feature.SEV_ES)
        guest.execution.run()
        states.append((guest.machine.tsc(), dict(guest.execution.exits), repr(guest.execution.vcpu.regs)))
    assert states[0] == states[1]


def test_the_launch_digest_is_that_of_the_loads_and_the_save_area(flat_elf):
    guest = booted(flat_elf, Feature.SEV_ES)
    expected = SevLaunchDigest()
    for gpa, data in sorted(guest.image.loads.items()):
        expected.add("page", gpa, data)
    fresh = Vcpu()
    guest.image.start(fresh.regs, fresh.system, 1 << 51)
    expected.add("vmsa", None, state_bytes(fresh, initial_vmsa()))
    assert guest.digest == expected.value


def test_a_changed_byte_changes_the_digest(flat_elf, tmp_path):
    changed = tmp_path / "changed.elf"
    changed.write_bytes(flat_elf.read_bytes().replace(b"rep outsb:", b"rep outsB:"))
    assert booted(flat_elf, Feature.SEV).digest != booted(changed, Feature.SEV).digest


def invoke(*arguments: str):
    return CliRunner().invoke(run, list(arguments))


def test_the_summary_as_json_counts_exits(flat_elf):
    result = invoke(str(flat_elf), "--feature", "sev-es", "--memory", "16 MiB", "--json")
    summary = json.loads(result.stdout)
    assert result.exit_code == 0
    assert summary["clean"] is True
    assert summary["vmgexits"] == summary["exits"]["VMGEXIT"] == 100


def test_a_triple_fault_ends_with_registers_and_the_last_exits(tmp_path):
    program = tmp_path / "crash.bin"
    program.write_bytes(bytes.fromhex("0fa2 0f0b"))  # CPUID; UD2 without an IDT
    result = invoke(str(program), "--memory", "16 MiB")
    assert result.exit_code == 1
    assert "triple fault" in result.output
    assert "rip 0000000000100002" in result.output
    assert "CPUID" in result.output


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (b"", [], "the file is empty"),
        (b"#!/bin/sh\n", [], "neither a bzImage nor an ELF"),
        (b"\x7fELF\x01\x01" + bytes(60), [], "64-bit, little-endian"),
        (b"\xf4", ["--append", "x"], "takes no --initrd and no --append"),
        (b"\xf4", ["--memory", "3 MiB"], "a multiple of 2 MiB"),
        (b"\xf4" * (2 << 20), ["--memory", "2 MiB"], "raise --memory"),
        (b"\xf4", ["--record", "x.sevtrace"], "only of --feature sev-es"),
    ],
)
def test_bad_input_is_said_before_the_start(tmp_path, content, arguments, words):
    program = tmp_path / "guest"
    program.write_bytes(content)
    result = invoke(str(program), *arguments)
    assert words in str(result.exception)
    assert not result.output


def test_a_recording_replays_without_the_engine(flat_elf, tmp_path):
    from sevlab.traces.reader import TraceReader
    from sevlab.traces.replay_recorded import replay_recorded

    traces = [tmp_path / name for name in ("a.sevtrace", "b.sevtrace")]
    for trace in traces:
        result = invoke(str(flat_elf), "--feature", "sev-es", "--memory", "16 MiB", "--record", str(trace))
        assert result.exit_code == 0
    assert traces[0].read_bytes() == traces[1].read_bytes()
    with TraceReader(traces[0]) as reader:
        replayed = replay_recorded(reader)
    assert replayed.divergences == ()
    assert replayed.entries > 400


def test_an_image_refuses_parts_over_each_other():
    image = GuestImage("flat binary", 0)
    image.add(0x1000, b"a", "first", MEMORY)
    with pytest.raises(Exception, match="lies over what is loaded at 0x1000"):
        image.add(0x1800, b"b", "second", MEMORY)


def test_a_guest_that_sleeps_without_a_timer_is_said_to_sleep_for_ever(tmp_path):
    program = tmp_path / "sleep.bin"
    program.write_bytes(bytes.fromhex("fb f4"))  # STI; HLT
    result = invoke(str(program), "--memory", "16 MiB")
    assert result.exit_code == 1
    assert "halted: no timer is set" in result.output


def test_idle_is_refused_for_a_vcpu_that_runs():
    from sevlab.core.events import Refused
    from sevlab.plugins.engines.records import Idle

    machine = compose(memory_bytes=MEMORY)
    before = machine.snapshot()
    for vcpu in (0, 7):
        assert isinstance(machine.apply(Idle(vcpu, 5)).records[0], Refused)
    assert machine.snapshot() == before
