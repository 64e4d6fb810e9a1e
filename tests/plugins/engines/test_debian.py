"""Debian's kernel to a busybox initrd: what `make test-long` boots. Fetched by tests/guests/fetch-debian, with apt."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from sevlab.plugins.engines.commands.run import run

from tests.guests.initrd import initrd

pytestmark = pytest.mark.long
FETCH = Path(__file__).resolve().parents[2] / "guests" / "fetch-debian"
NO_APT = 3


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
def counts() -> dict[str, int]:
    """VMGEXITs of the first boot with a feature: how its pages are walked is no matter of the guest."""
    return {}


@pytest.mark.parametrize("paging", ["own", "nested"])
@pytest.mark.parametrize("feature", ["plain", "sev-es"])
def test_debian_boots_to_its_initrd_and_powers_off(debian, feature, paging, counts):
    kernel, archive = debian
    arguments = [str(kernel), "--direct", "--initrd", str(archive), "--append", "console=ttyS0 quiet"]
    result = CliRunner().invoke(run, [*arguments, "--feature", feature, "--engine-paging", paging, "--json"])
    console = result.stderr
    summary = json.loads(result.stdout)
    assert result.exit_code == 0, console[-2000:]
    assert "initrd: 6 * 7 = 42, sum 5050" in console
    assert "initrd: done" in console
    assert "BUG:" not in console
    assert "Call Trace" not in console
    assert counts.setdefault(feature, summary["vmgexits"]) == summary["vmgexits"]
    assert (summary["vmgexits"] > 10_000) == (feature == "sev-es")
    assert summary["ended"] == "ACPI power off"
    assert int(console.split("initrd: timer interrupts ")[1].split()[0]) > 100  # of the local APIC
