from __future__ import annotations

from random import Random

import pytest
from sevlab.core.events import AspCommand, AspStatus, Party, Race
from sevlab.core.exitinfo import IOIO_STRING
from sevlab.core.layout_tools import validate
from sevlab.core.oracle import Target
from sevlab.core.testing import make_machine
from sevlab.core.vocabulary import Outcome
from sevlab.fuzz.codec import MAX_STEPS, Codec
from sevlab.fuzz.dictionaries import write_dictionary
from sevlab.fuzz.messages import Messages
from sevlab.fuzz.mutators import Mutator
from sevlab.fuzz.pools import Pools, resource_of
from sevlab.fuzz.runner import Runner
from sevlab.plugins.sev import Command
from sevlab.plugins.sev.driver import BUFFERS, enable_encryption
from sevlab.plugins.sev_es import Ghcb, NaeCode, Vmgexit

KINDS = ("asp.command", "sev_es.vmgexit", "registers", "race", "write")
MACHINE = make_machine("io", "sev_es", guests=2)
MESSAGES = Messages.of_plugins(MACHINE.plugins)
CODEC = Codec(MACHINE.vocabulary, KINDS)
LAUNCH_START = BUFFERS[Command.LAUNCH_START]


def mutator(seed=1, pools=None):
    found = pools or Pools()
    found.harvest_machine(MACHINE)
    return Mutator(MACHINE, CODEC, MESSAGES, found, Random(seed))


def vmgexit(**fields):
    return Vmgexit(0, 0x5000, Ghcb.build(**fields))


def test_a_record_is_known_by_the_message_it_carries():
    cpuid = MESSAGES.of(vmgexit(sw_exit_code=0x72))
    assert (cpuid.number, cpuid.layout, cpuid.name) == (0x72, Ghcb, "CPUID")
    assert MESSAGES.of(vmgexit(sw_exit_code=0x8BAD)).layout is Ghcb
    assert MESSAGES.number_of(vmgexit(sw_exit_code=0x8BAD)) == -1
    assert MESSAGES.of(Vmgexit(0, 0x002, b"")).name == "SEV_INFO_REQUEST"
    start = MESSAGES.of(AspCommand("sev", Command.LAUNCH_START, 0x1000, b""))
    assert (start.name, start.layout) == ("LAUNCH_START", LAUNCH_START)
    assert MESSAGES.of(AspCommand("tee", Command.LAUNCH_START, 0x1000, b"")) is None


def test_fresh_steps_reach_every_declared_message():
    wanted = {message.name for kind in KINDS for _, message in MESSAGES.choices(kind)}
    assert len(wanted) > 60
    made = mutator()
    reached = {carried.name for _ in range(3000) if (carried := MESSAGES.of(made.step()))}
    assert wanted <= reached


def test_most_fresh_messages_keep_the_rules_of_their_layout_and_some_break_one():
    made = mutator()
    steps = [step for _ in range(1800) if isinstance(step := made.step(), AspCommand) and step.buffer]
    good = sum(not validate(MESSAGES.of(step).layout, step.buffer) for step in steps)
    assert good == len(steps)
    broken = 0
    for step in steps:
        changed = [step]
        made._break_rule(changed)
        if changed != [step]:
            broken += 1
            assert len(validate(MESSAGES.of(step).layout, changed[0].buffer)) == 1
    assert broken > 30


def test_breaking_a_rule_of_a_ghcb_can_take_away_a_valid_bit():
    made, page = mutator(), Ghcb.build(sw_exit_code=NaeCode.HV_FEATURES, sw_exit_info_1=0, sw_exit_info_2=0)
    cleared = set()
    for _ in range(300):
        changed = [Vmgexit(0, 0x5000, page)]
        made._break_rule(changed)
        ghcb = Ghcb.from_bytes(changed[0].page)
        cleared |= {name for name in ("sw_exit_code", "sw_exit_info_1") if not ghcb.is_valid(name)}
    assert cleared == {"sw_exit_code", "sw_exit_info_1"}


def test_a_race_is_aimed_at_the_field_of_the_step_behind_it():
    made = mutator()
    spa = MACHINE.access.translate_gpa(MACHINE.vcpus[0], 0x5000)
    aimed = set()
    for _ in range(100):
        steps = [vmgexit(sw_exit_code=0x72)]
        made._race(steps)
        race, step = steps
        assert isinstance(race, Race)
        assert step == vmgexit(sw_exit_code=0x72)
        aimed.add(race.spa - spa)
    assert Ghcb.FIELDS["sw_exit_code"].offset in aimed
    assert aimed <= {info.offset for info in Ghcb.FIELDS.values()}


def test_a_handle_that_a_command_returned_is_used_by_later_ones():
    pools = Pools()
    step = AspCommand("sev", Command.LAUNCH_START, 0x1000, LAUNCH_START.build())
    status = AspStatus(Command.LAUNCH_START, 0, LAUNCH_START.build(handle=0xABCD))
    pools.harvest(MESSAGES, step, Outcome((status,)))
    assert pools.draw(Random(1), "handle") == 0xABCD
    made = mutator(pools=pools)
    steps = [step for _ in range(2000) if isinstance(step := made.step(), AspCommand)]
    used = [step for step in steps if step.command == Command.ACTIVATE and 0xABCD.to_bytes(2, "little") in step.buffer]
    assert used


def test_resources_are_known_by_unit_by_the_end_of_a_name_or_by_name():
    assert [resource_of(*names) for names in (("session_spa",), ("asid",), ("x", "pfn"), ("length",))] == [
        "spa",
        "asid",
        "pfn",
        "length",
    ]


def test_a_field_gets_mostly_what_its_own_name_had():
    pools, rng = Pools(), Random(1)
    for spa in range(0x1000, 0x9000, 0x1000):
        pools.keep("page_spa", spa)
    pools.keep("gctx_spa", 0xF000)
    drawn = [pools.draw(rng, "gctx_spa") for _ in range(200)]
    assert 120 < drawn.count(0xF000) < 190
    assert 0x1000 in drawn
    assert 0xF000 in {pools.draw(rng, "other_spa") for _ in range(200)}


def test_examples_of_a_message_are_drawn():
    made = mutator()
    words = {
        int.from_bytes(step.page[0x398:0x3A0], "little")
        for step in (made.step() for _ in range(4000))
        if isinstance(step, Vmgexit) and step.page[0x390:0x394] == b"\x7b\0\0\0"
    }
    assert {word & IOIO_STRING for word in words} == {0, IOIO_STRING}


def test_a_pool_forgets_the_oldest():
    pools = Pools()
    for value in range(200):
        pools.add("handle", value)
    assert min(pools.values["handle"]) == 136


def test_sequences_stay_within_the_limit():
    made = mutator()
    steps = made.fresh()
    for _ in range(300):
        steps = made.mutate(made.crossover(steps, steps))
        assert 1 <= len(steps) <= MAX_STEPS
        assert all(type(step) in CODEC.kinds for step in steps)


def test_a_sequence_of_messages_survives_its_bytes():
    made = mutator(7)
    for _ in range(200):
        steps = made.mutate(made.fresh())
        assert CODEC.decode(CODEC.encode(steps)) == steps


def test_the_dictionary_is_what_libfuzzer_reads_and_names_every_message():
    text = write_dictionary([p for found in MESSAGES.by_kind.values() for p in found], CODEC)
    assert all(line[0] == line[-1] == '"' for line in text.splitlines())
    assert '"\\xfd\\xff\\x00\\x80"' in text.splitlines()  # NaeCode.HV_FEATURES


@pytest.mark.slow
def test_fresh_commands_initialise_a_platform():
    target = Target("asp", Party.HYPERVISOR, ("asp.command", "msr"), (), ("sev",), boot=enable_encryption)
    seen = set()
    runner = Runner(target, seed=2)
    kept = []
    rng = Random(2)
    for _ in range(700):
        steps = runner.mutator.mutate(rng.choice(kept) if kept else ())
        if runner.run(steps, learn=True).new:
            kept.append(steps)
        seen |= {state for _, state in runner.feedback.states}
    assert ("INIT",) in seen
