"""Debian's kernel as an HVM guest of Xen: plain, encrypted as it is, and encrypted with what it lacks done for it."""

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


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
    fetched = subprocess.run([str(FETCH)], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"Debian's packages cannot be fetched: {fetched.stderr.strip()[-200:]}")
    folder = Path(fetched.stdout.splitlines()[-1])
    archive = tmp_path_factory.mktemp("guests") / "initrd"
    archive.write_bytes(initrd(folder / "busybox"))
    return [str(folder / "vmlinuz"), "--direct", "--xen", "--initrd", str(archive), "--json"]


def outcome(arguments, *more):
    result = CliRunner().invoke(run, [*arguments, *more])
    return result, json.loads(result.stdout), result.stderr


def steps(summary):
    return {(step["step"], step["caller_symbol"].partition("+")[0]): step for step in summary["xen"]["steps"]}


def reasons(step):
    return [broken["why"] for broken in step["breaks"]]


def test_a_plain_kernel_finds_xen_and_uses_it(arguments):
    result, summary, console = outcome(arguments, "--append", "console=ttyS0")
    assert result.exit_code == 0, console[-2000:]
    assert "Hypervisor detected: Xen HVM" in console
    assert "xen:events: Using FIFO-based ABI" in console
    assert "clocksource: Switched to clocksource xen" in console
    assert "initrd: done" in console
    found = steps(summary)
    assert found["memory_op add_to_physmap", "xen_hvm_init_shared_info"]["result"] == 0
    assert found["event_channel_op send", "xenbus_thread"]["count"] > 10
    assert found["vcpu_op set_singleshot_timer", "xen_vcpuop_set_next_event"]["count"] > 50
    assert not any(step["breaks"] for step in summary["xen"]["steps"])


def test_an_encrypted_kernel_ends_at_its_first_hypercall(arguments):
    result, summary, console = outcome(arguments, "--append", "console=ttyS0 earlyprintk=serial", "--feature", "sev-es")
    assert result.exit_code == 1
    assert "exit-code 0x81" in console
    (step,) = summary["xen"]["steps"]
    assert (step["symbol"].partition("+")[0], step["result"]) == ("xen_hypercall_amd", None)
    assert step["caller_symbol"].startswith("xen_setup_features+")
    assert len(reasons(step)) == 1
    assert "RAX and CPL only" in reasons(step)[0]


def test_what_the_encrypted_kernel_lacks_is_a_list_and_with_it_the_kernel_gets_to_its_end(arguments):
    more = ("--append", "console=ttyS0 quiet", "--feature", "sev-es", "--adapt")
    result, summary, console = outcome(arguments, *more)
    assert result.exit_code == 0, console[-2000:]
    assert "initrd: clock xen" in console
    assert "initrd: done" in console
    assert summary["ended"] == "ACPI power off"
    found = steps(summary)
    calls = [step for step in found.values() if step["result"] is not None]
    assert all("RAX and CPL only" in reasons(step)[0] for step in calls)
    assert len(reasons(found["event_channel_op send", "xenbus_thread"])) == 2
    assert len(reasons(found["vcpu_op stop_periodic_timer", "xen_time_init"])) == 1  # no buffer
    assert "mapped with the C-bit" in reasons(found["shared_info", "xen_hvm_init_shared_info"])[0]
    for name, symbol in (
        ("vcpu_info", "xen_vcpu_setup"),
        ("FIFO control block", "init_control_block"),
        ("FIFO event array", "evtchn_fifo_setup"),
    ):
        assert "a private page of the guest's" in reasons(found[name, symbol])[0]
