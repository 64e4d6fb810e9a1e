"""Campaigns against a guest's own handler: inputs, feedback, the store, and a finding that is played again."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from sevlab.core.events import VmcbWrite
from sevlab.fuzz.builtin_engine import BuiltinEngine
from sevlab.fuzz.commands.guest import again
from sevlab.fuzz.commands.run import run
from sevlab.fuzz.engine import Budget
from sevlab.fuzz.guest_vc import GuestRunner, seeds
from sevlab.fuzz.guest_vc_state import load, save
from sevlab.plugins.engines.hostile_run import EVENT_INJ
from sevlab.plugins.engines.start import Start, begin

from tests.guests.build import build

FETCH = Path(__file__).resolve().parents[1] / "guests" / "fetch-debian"
VARIANTS = {
    1: ("at_cpuid", "request"),
    2: ("at_private", "private-mmio"),
    3: ("user_out", "privilege"),
    4: ("at_outs", "leak"),
    5: ("at_in", "register"),
    6: ("at_cpuid", "loop"),
    7: ("at_outs", "memory"),
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    """variant -> its file."""
    pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing: the guest cannot be built")
    folder = tmp_path_factory.mktemp("hostile")

    def make(variant: int) -> Path:
        target = folder / f"{variant}.elf"
        return target if target.exists() else build("hostile.c", target, f"-DWEAK={variant}")

    return make


def start(kernel: Path, place: str = "at_cpuid") -> Start:
    return Start(str(kernel), at=place, memory="16 MiB")


def fuzz(runner: GuestRunner, runs: int, seed: int = 1) -> set[str]:
    found: set[str] = set()

    def told(*what) -> bool:
        found.update(finding.rule for finding in what[-1].findings)
        return True

    inputs = [runner.codec.encode(steps) for steps in runner.seeds()]
    BuiltinEngine().fuzz(runner, inputs, Budget(runs=runs, seed=seed), told)
    return found


def test_every_seed_is_an_input_and_says_one_thing(kernel):
    runner = GuestRunner(begin(start(kernel(0))))
    assert len(runner.seeds()) == len(list(seeds()))
    for steps in runner.seeds():
        assert runner.codec.decode(runner.codec.encode(steps)) == steps
    assert runner.run(runner.seeds()[0]).new
    assert not runner.run(runner.seeds()[0]).new


def test_feedback_names_blocks_requests_and_ends(kernel):
    runner = GuestRunner(begin(start(kernel(0))))
    fuzz(runner, 60)
    seen = {(key.machine, key.message.partition("+")[0]) for key in runner.feedback.coordinates}
    assert {("blocks", "checked_vc"), ("blocks", "by_page"), ("requests", "0x72"), ("end", "returned")} <= seen


def test_a_guest_that_was_kept_goes_on_as_the_one_that_was_not(kernel, tmp_path):
    begun = begin(start(kernel(0), "at_outs"))
    save(start(kernel(0), "at_outs"), tmp_path / "guest")
    known, other = load(tmp_path / "guest")
    assert known == start(kernel(0), "at_outs")
    one, two = GuestRunner(begun), GuestRunner(other)
    for steps in one.seeds()[::7]:
        assert one.run(steps) == two.run(steps)
        assert begun.run.requests == other.run.requests
        assert repr(begun.run.vcpu.regs) == repr(other.run.vcpu.regs)


@pytest.mark.slow
def test_a_campaign_finds_keeps_and_plays_again(kernel, tmp_path):
    folder = tmp_path / "campaign"
    arguments = ["guest-vc", "--campaign", str(folder), "--seconds", "0", "--runs", "150", "--engine", "builtin"]
    guest = ["--kernel", str(kernel(1)), "--at", "at_cpuid", "--memory", "16 MiB"]
    result = CliRunner().invoke(run, [*arguments, *guest, "--json"])
    assert result.exit_code == 1, result.output
    status = json.loads(result.stdout[result.stdout.index("{") :])
    assert status["targets"]["guest-vc"]["inputs"] == 150
    assert status["findings"] == {"guest-vc": 2}
    result = CliRunner().invoke(run, arguments)
    assert "2 findings" in result.output
    identity = result.output.splitlines()[-2].split()[0]
    played = CliRunner().invoke(again, [str(folder), identity])
    assert played.exit_code == 1
    assert "asks by the page: 0x7b" in played.output
    assert "checked_vc" in played.output or "by_page" in played.output
    assert played.output.endswith("it shows again\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no campaign of guest-vc here"),
        (["--kernel", "/nowhere"], "there is no such file"),
        (["vc", "--kernel", "/nowhere"], "runs alone"),
        (["--workers", "2"], "with one worker"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, arguments, words):
    result = CliRunner().invoke(run, ["guest-vc", "--campaign", str(tmp_path / "c"), *arguments])
    assert words in str(result.exception)


def test_a_campaign_keeps_its_guest(kernel, tmp_path):
    from sevlab.fuzz.guest_vc_campaign import prepare

    prepare(tmp_path / "c", start(kernel(0)), fresh=True).close()
    with pytest.raises(Exception, match="name a new directory for another one"):
        prepare(tmp_path / "c", start(kernel(0), "at_in"), fresh=False)
    with pytest.raises(Exception, match="there is a campaign here"):
        prepare(tmp_path / "c", None, fresh=True)


@pytest.mark.long
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_planted_weakness_is_found(kernel, variant):
    place, rule = VARIANTS[variant]
    assert rule in fuzz(GuestRunner(begin(start(kernel(variant), place))), 1000)


@pytest.mark.long
@pytest.mark.parametrize("place", sorted({place for place, _ in VARIANTS.values()} | {"at_lapic"}))
def test_the_correct_handler_gives_no_alarm_however_long(kernel, place):
    assert fuzz(GuestRunner(begin(start(kernel(0), place))), 6000, seed=7) == set()


@pytest.mark.long
def test_debians_handler_returns_and_serves_a_code_that_is_not_the_instructions(tmp_path):
    """The kernel's own handler; that it believes a claimed exit code is CVE-2024-25742, open in Debian 12's 6.1."""
    pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
    fetched = subprocess.run([str(FETCH)], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"Debian's packages cannot be fetched: {fetched.stderr.strip()[-200:]}")
    kernel = Path(fetched.stdout.splitlines()[-1]) / "vmlinuz"
    place = Start(str(kernel), after="Memory Encryption", append="console=ttyS0", memory="128 MiB")
    runner = GuestRunner(begin(place))
    run = runner.begun.run
    assert run.name_of(run.before.rip).startswith("native_cpuid")
    for _ in range(3):
        assert run.play(()).reason == "returned"
        assert run.findings == []
    claims_dr7 = VmcbWrite(0, EVENT_INJ, (1 << 31 | 1 << 11 | 29 | 0x37 << 32).to_bytes(8, "little"))
    run.play((claims_dr7,))
    assert {finding.rule for finding in run.findings} <= {"request"}
    assert fuzz(runner, 300) <= {"request", "kernel-fault"}
