from __future__ import annotations

import re

import pytest
from sevlab.core.events import AspCommand, AspRegisterWrite
from sevlab.core.testing import make_machine
from sevlab.fuzz.export import export, syzkaller
from sevlab.plugins.sev import LEGACY_COMMANDS, Command
from sevlab.plugins.sev.buffers import LaunchStart, LaunchUpdate, OneBlob
from sevlab.plugins.snp.command_table import SNP_COMMANDS
from sevlab.traces.record import Recorder

LAYOUTS = {declared.command: declared.buffer for declared in (*LEGACY_COMMANDS, *SNP_COMMANDS)}


MACHINE = make_machine("snp")


def program(folder, *steps):
    machine = MACHINE
    machine.reset()
    with Recorder(machine, folder / "case.sevtrace", overwrite=True) as recorder:
        for step in steps:
            machine.apply(step)
        recorder.end()
    return export(folder / "case.sevtrace", "syzkaller")


def command(number, buffer=b"", interface="sev"):
    return AspCommand(interface, number, 0x10_0000 if buffer else 0, buffer)


def calls(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_a_launch_is_the_ioctls_of_kvm_in_its_order(tmp_path):
    text = program(
        tmp_path,
        command(Command.INIT, bytes(20)),
        command(Command.LAUNCH_START, LaunchStart.build(policy=5, session_bytes=0x80, dh_bytes=0x824)),
        command(Command.LAUNCH_UPDATE_DATA, LaunchUpdate.build(handle=7, spa=0x5000, length=0x2010)),
        command(Command.LAUNCH_FINISH, b"\x07\0\0\0"),
    )
    start = "{0x0, 0x5, &(0x7f0000010000/0x1000)=nil, 0x824, 0x0, &(0x7f0000011000/0x1000)=nil, 0x80, 0x0}"
    update = "{&(0x7f0000010000/0x3000)=nil, 0x2010, 0x0}"
    assert calls(text) == [
        "r0 = openat$sev(0xffffffffffffff9c, &AUTO, 0x2, 0x0)",
        r"r1 = openat$kvm(0xffffffffffffff9c, &AUTO='/dev/kvm\x00', 0x2, 0x0)",
        "r2 = ioctl$KVM_CREATE_VM(r1, 0xae01, 0x3)",
        "ioctl$KVM_SEV_INIT2(r2, 0xc008aeba, &AUTO={0x16, &AUTO={0x0, 0x0, 0x0}, 0x0, r0})",
        f"ioctl$KVM_SEV_LAUNCH_START(r2, 0xc008aeba, &AUTO={{0x2, &AUTO={start}, 0x0, r0}})",
        f"ioctl$KVM_SEV_LAUNCH_UPDATE_DATA(r2, 0xc008aeba, &AUTO={{0x3, &AUTO={update}, 0x0, r0}})",
        "ioctl$KVM_SEV_LAUNCH_FINISH(r2, 0xc008aeba, &AUTO={0x7, 0x0, 0x0, r0})",
    ]
    assert "# step 0, asp.command INIT: not expressed, no ioctl sends it" in text


def test_a_platform_command_goes_to_the_device_with_its_description(tmp_path):
    text = program(tmp_path, command(Command.PEK_CSR, OneBlob.build(spa=0x5000, length=0x1800)))
    assert calls(text)[1:] == [
        "ioctl$SEVLAB_SEV_PEK_CSR(r0, 0xc0105300, &AUTO={0x3, &AUTO={&(0x7f0000010000/0x2000)=nil, 0x1800}, 0x0})"
    ]
    assert "cmd const[0xc0105300], arg ptr[inout, sevlab_issue_cmd[3, ptr[inout, sevlab_pek_csr]]])" in text
    assert "openat$kvm" not in text


@pytest.mark.parametrize("number", sorted({*syzkaller.KVM, *syzkaller.DEVICE}), ids=lambda number: number.name)
def test_every_command_with_an_ioctl_is_a_call(tmp_path, number):
    layout = LAYOUTS.get(number)
    text = program(tmp_path, command(number, bytes(layout.SIZE) if layout else b""))
    name = syzkaller.NAMES.get(number, Command(number).name)
    (line,) = [line for line in calls(text) if re.match(rf"ioctl\$(KVM|SEVLAB)_SEV_{name}\(", line)]
    assert line.count("{") == line.count("}")
    assert all(ord(letter) < 128 for letter in text)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (AspRegisterWrite(0x10570, 1), "the mailbox's registers are the driver's"),
        (command(Command.ACTIVATE, bytes(8)), "no ioctl sends it"),
        (command(Command.LAUNCH_FINISH, b"", "psp"), "no ioctl sends it"),
        (command(0x7FF), "no ioctl sends it"),
    ],
)
def test_what_user_space_cannot_do_is_said(tmp_path, step, said):
    text = program(tmp_path, step)
    assert len(calls(text)) == 1
    assert f"not expressed, {said}" in text
