"""Debian's kernel to a busybox initrd: what `make test-long` boots. Fetched by tests/guests/fetch-debian, with apt."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from sevlab.core.memory import guest_tag
from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_BYTES, PAGE_SHIFT
from sevlab.plugins.engines import Booted, Feature, Paging, boot, compose
from sevlab.plugins.engines.commands.run import run
from sevlab.plugins.engines.launch import c_bit_mask
from sevlab.plugins.engines.loaders.load import load_guest
from sevlab.plugins.io import devices

from tests.guests.initrd import initrd

pytestmark = pytest.mark.long
FETCH = Path(__file__).resolve().parents[2] / "guests" / "fetch-debian"
NO_APT = 3
MEMORY = 256 << 20
OWN_WORDS = b"sum $(/bin/busybox seq 1 100"
"""In the initrd's script, and never printed."""


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(kernel, initrd)."""
    pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
    fetched = subprocess.run([str(FETCH)], capture_output=True, text=True, check=False)
    if fetched.returncode == NO_APT:
        pytest.skip(fetched.stderr.strip())
    if fetched.returncode:
        pytest.skip(f"Debian's packages cannot be fetched: {fetched.stderr.strip()[-200:]}")
    folder = Path(fetched.stdout.splitlines()[-1])
    archive = tmp_path_factory.mktemp("guests") / "initrd"
    archive.write_bytes(initrd(folder / "busybox"))
    return folder / "vmlinuz", archive


@pytest.fixture(scope="module")
def counts() -> dict[Feature, int]:
    """VMGEXITs of the first boot with a feature: how its pages are walked is no matter of the guest."""
    return {}


def booted(debian: tuple[Path, Path], feature: Feature, paging: Paging, *, direct: bool) -> tuple[Booted, str]:
    machine = compose(memory_bytes=MEMORY, paging=Paging.NESTED)  # one C-bit for both, so that the guest is the same
    image = load_guest(
        debian[0],
        memory_bytes=MEMORY,
        initrd=debian[1],
        append="console=ttyS0",
        encrypted=feature.encrypted,
        c_bit_mask=c_bit_mask(machine, feature),
        direct=direct,
    )
    guest = boot(machine, image, feature, paging=paging)
    guest.execution.run()
    return guest, bytes(devices(machine, guest.execution.vcpu).uart.output).decode("latin-1")


def check(guest: Booted, console: str, feature: Feature) -> None:
    """It did what it is for, and powered off."""
    assert guest.execution.ended == ("ACPI power off", True), console[-2000:]
    assert "initrd: 6 * 7 = 42, sum 5050" in console
    assert "initrd: done" in console
    assert "BUG:" not in console
    assert "Call Trace" not in console
    assert int(console.split("initrd: timer interrupts ")[1].split(maxsplit=1)[0]) > 100  # of the local APIC
    assert ("Memory Encryption Features active: AMD SEV SEV-ES" in console) == (feature is Feature.SEV_ES)


@pytest.mark.parametrize("paging", list(Paging))
@pytest.mark.parametrize("feature", [Feature.PLAIN, Feature.SEV_ES])
def test_debian_boots_to_its_initrd_and_powers_off(debian, feature, paging, counts):
    guest, console = booted(debian, feature, paging, direct=True)
    check(guest, console, feature)
    vmgexits = guest.execution.exits[ExitCode.VMGEXIT]
    assert counts.setdefault(feature, vmgexits) == vmgexits
    assert (vmgexits > 10_000) == (feature is Feature.SEV_ES)
    if feature is Feature.SEV_ES:
        _nothing_private_is_in_the_open(guest)


def _nothing_private_is_in_the_open(guest: Booted) -> None:
    """By owner tags, and by looking for words that only the guest knows with the hypervisor's eyes."""
    memory, tag = guest.machine.memory, guest_tag(guest.vm.vm_id)
    seen = found = 0
    for pfn, page in list(memory.pages.items()):
        if page.key is None:
            assert tag not in memory.tags(pfn << PAGE_SHIFT, PAGE_BYTES)
            seen += 1
        found += OWN_WORDS in bytes(page.data)
        assert OWN_WORDS not in guest.machine.access.hypervisor_read(pfn << PAGE_SHIFT, PAGE_BYTES)
    assert seen > 10
    assert found


@pytest.mark.parametrize("feature", [Feature.PLAIN, Feature.SEV_ES])
def test_the_kernel_unpacks_itself(debian, feature):
    guest, console = booted(debian, feature, Paging.NESTED, direct=False)
    check(guest, console, feature)
    assert guest.image.kind == "Linux (bzImage)"


def test_two_boots_are_the_same_and_replay_without_the_engine(debian, tmp_path):
    from sevlab.traces.diff import diff
    from sevlab.traces.reader import TraceReader
    from sevlab.traces.replay_recorded import replay_recorded

    traces = [tmp_path / name for name in ("a.sevtrace", "b.sevtrace")]
    for trace in traces:
        arguments = [str(debian[0]), "--direct", "--initrd", str(debian[1]), "--append", "console=ttyS0 quiet"]
        options = ["--feature", "sev-es", "--record", str(trace), "--json"]
        result = CliRunner().invoke(run, [*arguments, *options])
        assert json.loads(result.stdout)["ended"] == "ACPI power off"
    with TraceReader(traces[0]) as left, TraceReader(traces[1]) as right:
        assert diff(left, right) is None
    with TraceReader(traces[0]) as reader:
        replayed = replay_recorded(reader)
    assert replayed.divergences == ()
    assert replayed.entries > 10_000
