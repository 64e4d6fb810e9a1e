"""A guest's own #VC handler under lies: what each oracle says of a handler with a fault, and of one without."""

from __future__ import annotations

import pytest
from sevlab.core.errors import ConfigError
from sevlab.core.events import MapFlag, NptEdit, Schedule, VmcbWrite
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_BYTES
from sevlab.core.vocabulary import Record
from sevlab.plugins.engines.hostile_run import EVENT_INJ
from sevlab.plugins.engines.start import Begun, Start, begin
from sevlab.plugins.sev_es import ForgeMsr, ForgeReply

from tests.guests.build import build

CORRECT, TRUSTS_CODE, PRIVATE_MMIO, NO_CPL_CHECK, COPIES_TOO_MUCH, WHOLE_REGISTER, WAITS, TRUSTS_LENGTH = range(8)
RAX, INFO_1, INFO_2, VALID = 0x1F8, 0x398, 0x3A0, 0x3F0
ONES = b"\xff" * 8


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, flat_elf):
    """(variant, place) -> the guest there."""
    folder = tmp_path_factory.mktemp("hostile")
    made: dict[tuple[int, str], Begun] = {}

    def make(variant: int, place: str, *, strict: bool = False) -> Begun:
        key = (variant, place + str(strict))
        if key not in made:
            kernel = build("hostile.c", folder / f"{variant}.elf", f"-DWEAK={variant}")
            made[key] = begin(Start(str(kernel), at=place, memory="16 MiB", strict=strict))
        return made[key]

    return make


def event(word: int) -> VmcbWrite:
    return VmcbWrite(0, EVENT_INJ, word.to_bytes(8, "little"))


def vc(code: int) -> VmcbWrite:
    """#VC with an exit code of the hypervisor's choice."""
    return event(1 << 31 | 1 << 11 | 29 | code << 32)


def in_reply(offset: int, data: bytes) -> tuple[Record, ...]:
    return (Schedule(), ForgeReply(0, offset, data))


def rules(guest: Begun, *steps: Record) -> set[str]:
    guest.run.play(steps)
    return {finding.rule for finding in guest.run.findings}


PLACES = ("at_cpuid", "at_in", "at_out", "at_outs", "at_lapic", "at_private", "user_cpuid", "user_out")
LIES = (
    (),
    *((vc(code),) for code in (0x6E, 0x72, 0x7B, 0x7C, 0x81, 0x400, 0x404)),
    *(in_reply(RAX, data) for data in (bytes(8), ONES)),
    *(in_reply(INFO_1, bytes((number,)) + bytes(7)) for number in (1, 2, 255)),
    in_reply(INFO_2, ONES),
    in_reply(VALID, bytes(16)),
    (Schedule(), ForgeMsr(0, 1)),
    (event(1 << 31 | 0x80),),
    (event(1 << 31 | 2 << 8 | 2),),
    (event(1 << 31 | 1 << 11 | 3 << 8 | 13),),
    (event(1 << 31 | 29),),
)


@pytest.mark.parametrize("place", PLACES)
def test_the_correct_handler_gives_no_alarm(begun, place):
    guest = begun(CORRECT, place)
    for steps in LIES:
        assert rules(guest, *steps) == set(), steps


@pytest.mark.parametrize(
    ("variant", "place", "steps", "rule"),
    [
        (TRUSTS_CODE, "at_cpuid", (vc(0x7B),), "request"),
        (TRUSTS_CODE, "at_in", (vc(0x72),), "register"),
        (PRIVATE_MMIO, "at_private", (vc(ExitCode.NPF),), "private-mmio"),
        (NO_CPL_CHECK, "user_out", (vc(0x7B),), "privilege"),
        (COPIES_TOO_MUCH, "at_outs", (), "leak"),
        (WHOLE_REGISTER, "at_in", in_reply(RAX, ONES), "register"),
        (WAITS, "at_cpuid", in_reply(INFO_2, ONES), "loop"),
        (TRUSTS_LENGTH, "at_outs", in_reply(INFO_2, b"\x10" + bytes(7)), "memory"),
    ],
)
def test_a_weak_handler_is_found_by_the_lie_that_it_believes(begun, variant, place, steps, rule):
    assert rule in rules(begun(variant, place), *steps)
    assert rules(begun(CORRECT, place), *steps) == set()


def test_a_fault_of_the_handler_itself_is_found_and_one_that_is_inflicted_is_not(begun):
    guest = begun(TRUSTS_CODE, "at_lapic")  # serves IOIO, goes on at the same MOV with a register that is spoiled
    assert "kernel-fault" in rules(guest, vc(0x7B))
    assert "kernel-fault" not in rules(guest, event(1 << 31 | 1 << 11 | 3 << 8 | 13))


def test_an_unmapped_page_is_device_memory_to_the_guest(begun):
    for variant, expected in ((CORRECT, set()), (PRIVATE_MMIO, {"private-mmio"})):
        guest = begun(variant, "at_private")
        page = guest.run.before.registers[3]  # RBX
        assert rules(guest, NptEdit(0, page, 0, PAGE_BYTES, int(MapFlag.UNMAP))) == expected
        assert rules(guest) == set()  # and it is mapped again


def test_other_bytes_in_a_page_are_no_finding(begun):
    guest = begun(CORRECT, "at_cpuid")
    stack = guest.run.before.registers[4] & -PAGE_BYTES
    base = guest.run.machine.hypervisor.vms[0].memory_spa
    assert rules(guest, NptEdit(0, stack, base + 0x50_0000, PAGE_BYTES, int(MapFlag.WRITABLE))) == set()
    assert guest.run.play(()).reason == "returned"


def test_what_the_hypervisor_maps_outside_the_guest_is_left_out(begun):
    guest = begun(CORRECT, "at_cpuid")
    for spa in (0, 1 << 47):
        guest.run.play((NptEdit(0, 0, spa, PAGE_BYTES, 1),))
        assert guest.run.ended is not None
        assert guest.run.ended.reason == "returned"


def test_a_lie_is_told_once_and_where_it_stands(begun):
    guest = begun(CORRECT, "at_cpuid")
    guest.run.play(in_reply(RAX, b"\x78\x56\x34\x12" + bytes(4)))
    assert guest.run.vcpu.regs.rax == 0x1234_5678
    guest.run.play((Schedule(), *in_reply(RAX, ONES)))  # in a second reply, which there is none of
    assert guest.run.vcpu.regs.rax != 0xFFFF_FFFF
    assert [request.code for request in guest.run.requests] == [ExitCode.CPUID]


def test_the_same_input_does_the_same_after_any_other(begun):
    guest = begun(CORRECT, "at_outs")

    def seen(steps):
        ended = guest.run.play(steps)
        return ended, tuple(guest.run.requests), tuple(guest.trace.edges()), repr(guest.run.vcpu.regs)

    first = [seen(steps) for steps in LIES]
    assert [seen(steps) for steps in reversed(LIES)] == first[::-1]


def test_secrets_are_where_the_instruction_does_not_look(begun):
    before = begun(CORRECT, "at_outs").run.before
    names = {name for name, _ in before.secrets}
    assert before.mnemonic == "outsb"
    assert "r12" in names
    assert "what lies behind the memory operand" in names
    assert not names & {"rsp", "rsi", "rcx", "rdx"}
    assert all(0 not in secret for _, secret in before.secrets)


def test_strict_judges_the_halves_that_cpuid_ignores(begun):
    guest = begun(CORRECT, "at_cpuid", strict=True)
    assert rules(guest) == set()
    assert "upper half of rcx" in {name for name, _ in guest.run.before.secrets}
    assert guest.run.before.upper_halves == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere", "no symbol of the guest, no address, and none of cpuid, ioio"),
        ("cpuid:x", "expected a number behind cpuid:"),
        ("mmio:99", "the guest ended (debug exit with status 33), 98 before"),
        ("0x1", "the guest ended (debug exit with status 33) before"),
    ],
)
def test_a_place_that_is_never_reached_is_said(tmp_path, flat_elf, place, words):
    kernel = build("hostile.c", tmp_path / "guest.elf")
    with pytest.raises(ConfigError) as error:
        begin(Start(str(kernel), at=place, memory="16 MiB"))
    assert words in str(error.value)


@pytest.mark.parametrize("place", ["at_cpuid", "at_outs", "at_lapic", "user_cpuid"])
def test_the_way_to_the_handler_is_gone_at_once_and_ends_the_same(begun, place):
    run = begun(CORRECT, place).run
    assert run._prefix is not None
    reached = []
    for prefix in (run._prefix, None):
        kept, run._prefix = run._prefix, prefix
        ended = run.play((Schedule(), ForgeReply(0, RAX, ONES)))
        memory = run.machine.memory
        reached.append((ended, tuple(run.requests), repr(run.vcpu.regs), memory.dram(0, memory.size_bytes)))
        run._prefix = kept
    assert reached[0] == reached[1]


@pytest.mark.parametrize("place", ["at_private", "user_out"])
def test_an_instruction_that_raises_no_vc_has_no_such_way(begun, place):
    assert begun(CORRECT, place).run._prefix is None
