"""The mailbox commands of a finding as a syzkaller program.

User space has no mailbox: it has the ioctls of /dev/sev and KVM_MEMORY_ENCRYPT_OP, and the kernel makes the command
buffers. So the program drives the same commands in the same order with the values that user space chooses (policy,
lengths, types); what the kernel chooses itself (handles, ASIDs, physical addresses, reserved bytes) and every command
that it alone sends are said in comments.

Source: syzkaller sys/linux/dev_kvm_amd64.txt (openat$sev, ioctl$KVM_SEV_*) and docs/program_syntax.md; Linux
include/uapi/linux/psp-sev.h (sev_issue_cmd) and arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sevlab.core.events import AspCommand
from sevlab.core.layout import Layout
from sevlab.core.units import PAGE_BYTES
from sevlab.core.vocabulary import spec_of
from sevlab.fuzz.export.case import Case
from sevlab.plugins.sev import Command, Policy
from sevlab.traces.records import TRACE_RECORDS
from sevlab.traces.schema import Entry

KVM_MEMORY_ENCRYPT_OP = 0xC008AEBA
SEV_ISSUE_CMD = 0xC0105300
KVM_CREATE_VM = 0xAE01
AT_FDCWD = 0xFFFF_FFFF_FFFF_FF9C
SEV_VM, SEV_ES_VM, SNP_VM = 2, 3, 4
"""VM types of KVM_CREATE_VM. Source: Linux arch/x86/include/uapi/asm/kvm.h (KVM_X86_SEV_VM)."""
INIT2 = 22

DATA = 0x7F00_0001_0000
"""Where the mappings are that commands point to, in syzkaller's view of a program's memory."""

MAX_PAGES = 4
"""syzkaller describes these mappings with one to four pages."""


class Ioctl(NamedTuple):
    """How user space asks for a command: its number there, and the arguments.

    An argument is the name of a field (its value), `field@pages` (a mapping as long as the field says), a number,
    "out" or "out[n]" (n bytes that the kernel fills in), or "buffer[n]" (the command buffer). None: there is none.
    """

    number: int
    arguments: tuple[str, ...] = ()


_UPDATE = ("header_bytes@pages", "header_bytes", "0", "guest_bytes@pages", "guest_bytes", "0",
           "transport_bytes@pages", "transport_bytes", "0")  # fmt: skip
_DEBUG = ("length@pages", "length@pages", "length")
_START = ("out", "policy", "dh_bytes@pages", "dh_bytes", "0", "session_bytes@pages", "session_bytes", "0")

KVM: dict[Command, Ioctl] = {
    Command.LAUNCH_START: Ioctl(2, _START),
    Command.LAUNCH_UPDATE_DATA: Ioctl(3, ("length@pages", "length", "0")),
    Command.LAUNCH_UPDATE_VMSA: Ioctl(4),
    Command.LAUNCH_SECRET: Ioctl(5, _UPDATE),
    Command.LAUNCH_MEASURE: Ioctl(6, ("length@pages", "length", "0")),
    Command.LAUNCH_FINISH: Ioctl(7),
    Command.SEND_START: Ioctl(
        8,
        ("policy", "0", "pdh_bytes@pages", "pdh_bytes", "0", "platform_bytes@pages", "platform_bytes", "0",
         "amd_bytes@pages", "amd_bytes", "0", "session_bytes@pages", "session_bytes", "0"),
    ),
    Command.SEND_UPDATE_DATA: Ioctl(9, _UPDATE),
    Command.SEND_UPDATE_VMSA: Ioctl(10),
    Command.SEND_FINISH: Ioctl(11),
    Command.RECEIVE_START: Ioctl(12, _START),
    Command.RECEIVE_UPDATE_DATA: Ioctl(13, _UPDATE),
    Command.RECEIVE_UPDATE_VMSA: Ioctl(14),
    Command.RECEIVE_FINISH: Ioctl(15),
    Command.GUEST_STATUS: Ioctl(16, ("out", "0", "0")),
    Command.DBG_DECRYPT: Ioctl(17, _DEBUG),
    Command.DBG_ENCRYPT: Ioctl(18, _DEBUG),
    Command.ATTESTATION: Ioctl(20, ("mnonce", "length@pages", "length", "0")),
    Command.SEND_CANCEL: Ioctl(21),
    Command.SNP_LAUNCH_START: Ioctl(100, ("policy", "gosvw", "0")),
    Command.SNP_LAUNCH_UPDATE: Ioctl(101, ("0", "4096@pages", "4096", "page_type", "0", "0", "0")),
    Command.SNP_LAUNCH_FINISH: Ioctl(
        102, ("id_block_en@pages", "id_block_en@pages", "id_block_en", "auth_key_en", "vcek_dis", "host_data")
    ),
}  # fmt: skip
"""Ioctl ioctl$KVM_SEV_... of each command; the structures in the order of syzkaller's description."""

NAMES = {Command.ATTESTATION: "GET_ATTESTATION_REPORT"}
"""Where syzkaller's name is not that of the command."""

DEVICE: dict[Command, Ioctl] = {
    Command.FACTORY_RESET: Ioctl(0),
    Command.PLATFORM_STATUS: Ioctl(1, ("out[12]",)),
    Command.PEK_GEN: Ioctl(2),
    Command.PEK_CSR: Ioctl(3, ("length@pages", "length")),
    Command.PDH_GEN: Ioctl(4),
    Command.PDH_CERT_EXPORT: Ioctl(5, ("pdh_bytes@pages", "pdh_bytes", "chain_bytes@pages", "chain_bytes")),
    Command.PEK_CERT_IMPORT: Ioctl(6, ("pek_bytes@pages", "pek_bytes", "oca_bytes@pages", "oca_bytes")),
    Command.GET_ID: Ioctl(8, ("length@pages", "length")),
    Command.SNP_PLATFORM_STATUS: Ioctl(9, ("out[32]",)),
    Command.SNP_COMMIT: Ioctl(10),
    Command.SNP_CONFIG: Ioctl(11, ("buffer[64]",)),
    Command.SNP_VLEK_LOAD: Ioctl(12, ("length", "wrapped_version", "out[3]", "432@pages")),
}
"""Commands of /dev/sev."""

DESCRIPTIONS = (
    "syzkaller describes KVM_MEMORY_ENCRYPT_OP, but not SEV_ISSUE_CMD: add this to a file of sys/linux.",
    "  type sevlab_issue_cmd[ID, DATA] {",
    "  \tcmd\tconst[ID, int32]",
    "  \tdata\tDATA",
    "  \terror\tint32\t(out)",
    "  } [packed]",
)


def text(case: Case) -> str:
    """The program."""
    commands = [entry.step for entry in case.entries if isinstance(entry.step, AspCommand)]
    numbers = {command for step in commands if (command := _command(step)) is not None}
    kvm, device = numbers & KVM.keys(), numbers & DEVICE.keys()
    lines = [f"# {line}".rstrip() for line in case.about()]
    lines += ["#", *(f"# {line}" for line in _limits()), ""]
    if device:
        lines += [f"# {line}".rstrip() for line in [*DESCRIPTIONS, *_descriptions(device)]] + [""]
    lines.append(f"r0 = openat$sev({AT_FDCWD:#x}, &AUTO, 0x2, 0x0)")
    if kvm:
        lines += _machine(case, commands, numbers)
    for number, entry in enumerate(case.entries):
        lines += _step(case, number, entry)
    return "\n".join(lines) + "\n"


def _limits() -> list[str]:
    return [
        "What user space chooses is as in the finding: commands, their order, policy, lengths, page types.",
        "Not expressed, since the kernel fills it in: guest handles, ASIDs, context pages, physical addresses,",
        "reserved bytes, and the contents of buffers that the command only points to.",
    ]


def _machine(case: Case, commands: list[AspCommand], numbers: set[Command]) -> list[str]:
    """Open KVM and make the VM that the commands are of."""
    snp = any(number.name.startswith("SNP_") for number in numbers & KVM.keys())
    es = any(step.command == Command.LAUNCH_START and _policy(case, step) & Policy.ES for step in commands)
    kind = SNP_VM if snp else SEV_ES_VM if es else SEV_VM
    return [
        f"r1 = openat$kvm({AT_FDCWD:#x}, &AUTO='/dev/kvm\\x00', 0x2, 0x0)",
        "# KVM sends INIT or SNP_INIT_EX, ACTIVATE and DF_FLUSH by itself",
        f"r2 = ioctl$KVM_CREATE_VM(r1, {KVM_CREATE_VM:#x}, {kind:#x})",
        _kvm("INIT2", INIT2, "{0x0, 0x0, 0x0}"),
    ]


def _policy(case: Case, step: AspCommand) -> int:
    buffer = _buffer(case, step)
    return 0 if buffer is None else int(getattr(buffer, "policy", 0))


def _step(case: Case, number: int, entry: Entry) -> Iterator[str]:
    step = entry.step
    if type(step) in TRACE_RECORDS:
        return
    title = f"# step {number}, {case.title(entry)}"
    command = _command(step) if isinstance(step, AspCommand) else None
    if not isinstance(step, AspCommand):
        yield f"{title}: not expressed, {_why_not(step)}"
    elif command is None:
        yield f"{title}: not expressed, no ioctl sends it"
    elif command in KVM:
        yield title
        ioctl = KVM[command]
        name = NAMES.get(command, command.name)
        yield _kvm(name, ioctl.number, _structure(case, step, ioctl))
    else:
        yield title
        ioctl = DEVICE[command]
        data = _structure(case, step, ioctl)
        yield (
            f"ioctl$SEVLAB_SEV_{command.name}(r0, {SEV_ISSUE_CMD:#x},"
            f" &AUTO={{{ioctl.number:#x}, {_pointer(data)}, 0x0}})"
        )


def _command(step: AspCommand) -> Command | None:
    """The command, if user space has a way to send it."""
    if step.interface != "sev":
        return None
    return next((command for command in (*KVM, *DEVICE) if command == step.command), None)


def _why_not(step: Any) -> str:
    return {
        "asp.read": "the mailbox's registers are the driver's",
        "asp.write": "the mailbox's registers are the driver's",
        "sev_es.vmgexit": "a guest's VMGEXIT: see the kvm-unit-test export",
        "race": "two threads decide when it happens",
    }.get(spec_of(step).kind, "no system call does it")


def _kvm(name: str, number: int, data: str) -> str:
    return f"ioctl$KVM_SEV_{name}(r2, {KVM_MEMORY_ENCRYPT_OP:#x}, &AUTO={{{number:#x}, {_pointer(data)}, 0x0, r0}})"


def _pointer(data: str) -> str:
    return f"&AUTO={data}" if data else "0x0"


def _buffer(case: Case, step: AspCommand) -> Layout | None:
    """The command buffer, decoded."""
    carried = case.messages.of(step)
    if carried is None or carried.layout is None:
        return None
    size = carried.layout.SIZE
    return carried.layout.from_bytes(step.buffer[:size].ljust(size, b"\0"))


def _structure(case: Case, step: AspCommand, ioctl: Ioctl) -> str:
    """The structure that the ioctl points to, "" for none."""
    buffer = _buffer(case, step)
    page = 0
    shown = []
    for argument in ioctl.arguments:
        name, _, pages = argument.partition("@")
        value = _value(buffer, name)
        if pages and isinstance(value, int):
            count = min(-(-value // PAGE_BYTES), MAX_PAGES)
            shown.append(f"&({DATA + page * PAGE_BYTES:#x}/{count * PAGE_BYTES:#x})=nil" if count else "nil")
            page += count
        elif isinstance(value, bytes):
            shown.append(f'"{value.hex()}"')
        else:
            shown.append(f"{value:#x}")
    if len(shown) == 1:
        return shown[0]
    return f"{{{', '.join(shown)}}}" if shown else ""


def _value(buffer: Layout | None, name: str) -> int | bytes:
    """What an argument stands for."""
    kind, _, size = name.rstrip("]").partition("[")
    if kind == "out":
        return bytes(int(size)) if size else 0
    if name.isdecimal() or buffer is None:
        return int(name) if name.isdecimal() else 0
    if kind == "buffer":
        return buffer.raw()
    value: int | bytes = getattr(buffer, name)
    return value


def _descriptions(commands: set[Command]) -> Iterator[str]:
    """The descriptions of the /dev/sev commands that the program uses."""
    for command in sorted(commands):
        ioctl = DEVICE[command]
        types = [_type(argument) for argument in ioctl.arguments]
        data = "const[0, int64]"
        if len(types) == 1:
            data = f"ptr[inout, {types[0]}]"
        elif types:
            name = f"sevlab_{command.name.lower()}"
            data = f"ptr[inout, {name}]"
            yield f"  {name} {{"
            yield from (f"  \tfield{place}\t{type_}" for place, type_ in enumerate(types))
            yield "  } [packed]"
        yield (
            f"  ioctl$SEVLAB_SEV_{command.name}(fd fd_sev, cmd const[{SEV_ISSUE_CMD:#x}],"
            f" arg ptr[inout, sevlab_issue_cmd[{ioctl.number}, {data}]])"
        )


def _type(argument: str) -> str:
    if argument.endswith("@pages"):
        return "vma64[1:4]"
    if argument.endswith("]"):
        return f"array[int8, {argument.partition('[')[2][:-1]}]"
    return "int8" if argument == "wrapped_version" else "int32"
