"""The hypervisor's driver of the SEV mailbox: run a command, initialise the platform, launch a guest.

Commands, memory and registers go through `Machine.apply`, as a driver's do; nothing here changes the firmware's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.errors import ConfigError
from sevlab.core.events import (
    AspCommand,
    AspStatus,
    CacheOp,
    Data,
    HostMsr,
    MemoryRead,
    MemoryWrite,
    Party,
    Space,
    Value,
)
from sevlab.core.memory import split_pages
from sevlab.core.state import Stateful
from sevlab.core.steps import MAX_ACCESS_BYTES
from sevlab.core.svm import ExitCode, Vector
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.sev.asids import in_range, owned
from sevlab.plugins.sev.context import sev_state
from sevlab.plugins.sev.layout import MEASUREMENT_BYTES
from sevlab.plugins.sev.legacy import LEGACY_COMMANDS, WRITTEN
from sevlab.plugins.sev.numbers import Command, Policy, Status
from sevlab.plugins.sev.states import PlatformState
from sevlab.plugins.sme import SYSCFG

if TYPE_CHECKING:
    from sevlab.core.hypervisor import Vm
    from sevlab.core.layout import FieldValue, Layout
    from sevlab.core.machine import Machine

TMR_BYTES = 1 << 20
MEM_ENCRYPTION_MOD_EN = 1 << 23

BUFFERS: dict[Command, type[Layout] | None] = {declared.command: declared.buffer for declared in LEGACY_COMMANDS}
ANSWERING = frozenset(declared.command for declared in LEGACY_COMMANDS if declared.firmware_page)
"""Commands whose buffer must be the firmware's once SNP is initialised."""


class Lender(Protocol):
    """Who gives pages to the firmware and takes them back; SNP brings it as component `LENDER`."""

    def give(self, machine: Machine, spa: int) -> None:
        """From now on only the firmware writes to the page."""

    def ring(self, machine: Machine, command: Command, spa: int) -> AspStatus:
        """Run the command whose buffer lies at `spa` already."""

    def take(self, machine: Machine, spa: int) -> None:
        """The page is the hypervisor's again."""


LENDER = "sev.driver.lender"


def _lender(machine: Machine) -> Lender | None:
    """None while nothing needs to be lent. Source: Linux drivers/crypto/ccp/sev-dev.c (snp_map_cmd_buf_desc_list)."""
    return cast("Lender | None", machine.components.get(LENDER)) if sev_state(machine).snp_initialised else None


@contextmanager
def lent(machine: Machine, *ranges: tuple[int, int]) -> Iterator[None]:
    """The pages of what a command writes - (address, length) each - are the firmware's meanwhile, where SNP demands it.

    Source: Linux drivers/crypto/ccp/sev-dev.c (snp_map_cmd_buf_desc_list, snp_unmap_cmd_buf_desc_list).
    """
    lender = _lender(machine)
    if lender is None:
        yield
        return
    c_bit = 1 << machine.config.part.c_bit
    parts = [part for spa, length_bytes in ranges for part in split_pages(spa & ~c_bit, length_bytes)]
    pages = tuple(dict.fromkeys(start & -PAGE_BYTES for start, _ in parts))
    for page in pages:
        lender.give(machine, page)
    yield
    for page in pages:
        lender.take(machine, page)


class Reply(NamedTuple):
    """What a command answered: its status, and its command buffer afterwards (None for a command without one)."""

    status: int
    buffer: Any


def run(machine: Machine, command: Command, *, buffer_spa: int = 0, **fields: FieldValue) -> Reply:
    """Run one command with these fields in its buffer, which lies at `buffer_spa` (0: the driver's page).

    While SNP is initialised what the firmware writes - the buffer that it answers in, the memory that the command
    names - is lent to it for the command.
    """
    layout = BUFFERS[command]
    if layout is None:
        return _reply(machine, AspCommand("sev", command, 0, b""), None)
    where = buffer_spa or scratch_page(machine)
    lender = _lender(machine)
    if lender is None:
        return _reply(machine, AspCommand("sev", command, where, layout.build(**fields)), layout)
    put(machine, where, layout.build(**fields))
    ranges = [(_number(fields, spa), _number(fields, length)) for spa, length in WRITTEN.get(command, ())]
    if command in ANSWERING:
        ranges.append((where, layout.SIZE))
    with lent(machine, *(written for written in ranges if all(written))):
        answer = lender.ring(machine, command, where)
    return Reply(answer.status, layout.from_bytes(answer.buffer) if answer.buffer else None)


def _number(fields: Mapping[str, FieldValue], name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0


def _reply(machine: Machine, step: AspCommand, layout: type[Layout] | None) -> Reply:
    answer = machine.apply(step).first(AspStatus)
    if answer is None:
        raise ConfigError(f"command {step.command:#x}: the machine has no mailbox {step.interface!r}")
    return Reply(answer.status, layout.from_bytes(answer.buffer) if layout is not None and answer.buffer else None)


def need(machine: Machine, command: Command, *, buffer_spa: int = 0, **fields: FieldValue) -> Any:
    """As `run`, for a command that must succeed; returns its buffer. Raises `ConfigError` with the status."""
    reply = run(machine, command, buffer_spa=buffer_spa, **fields)
    if reply.status:
        name = Status(reply.status).name if reply.status in _STATUSES else f"{reply.status:#x}"
        raise ConfigError(f"{command.name}: {name}, expected SUCCESS")
    return reply.buffer


_STATUSES = frozenset(Status)


class Driver(Stateful):
    """The driver's own memory: pages for command buffers and what they point to, and the TMR."""

    buffers_spa: int = 0
    tmr_spa: int = 0
    tmr_lent: bool = False
    """Whether the TMR's pages were given to the firmware."""


BUFFER_PAGES = 16


def scratch_page(machine: Machine) -> int:
    """Address of the driver's pages: the first for command buffers, the others for what they point to."""
    driver = cast("Driver", machine.components["sev.driver"])
    if not driver.buffers_spa:
        driver.buffers_spa = machine.hypervisor.allocate_pages(BUFFER_PAGES)
    return driver.buffers_spa


def put(machine: Machine, spa: int, data: bytes) -> None:
    """Write plaintext as the hypervisor does."""
    for start in range(0, len(data), MAX_ACCESS_BYTES):
        machine.apply(
            MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa + start, False, data[start : start + MAX_ACCESS_BYTES])
        )


def get(machine: Machine, spa: int, length_bytes: int) -> bytes:
    """Read as the hypervisor does: ciphertext where a page is private."""
    outcome = machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, length_bytes))
    data = outcome.first(Data)
    if data is None:
        raise ConfigError(f"the hypervisor cannot read {length_bytes:#x} bytes at {spa:#x}: {outcome.records}")
    return data.data


# Platform -----------------------------------------------------------------------------------------------------------


def enable_encryption(machine: Machine) -> None:
    """Set SYSCFG.MemEncryptionModEn, without which the firmware refuses INIT."""
    syscfg = machine.apply(HostMsr(SYSCFG, False, 0)).first(Value)
    if syscfg is not None and not syscfg.value & MEM_ENCRYPTION_MOD_EN:
        machine.apply(HostMsr(SYSCFG, True, syscfg.value | MEM_ENCRYPTION_MOD_EN))


def tmr_fields(machine: Machine) -> dict[str, int]:
    """The fields of INIT and INIT_EX that turn SEV-ES on; the region is allocated once.

    Beside SNP it is the firmware's from the first time on. Source: Linux sev-dev.c (__sev_platform_init_locked).
    """
    driver = cast("Driver", machine.components["sev.driver"])
    if not driver.tmr_spa:
        driver.tmr_spa = machine.hypervisor.allocate_pages(PAGE_2M_BYTES // PAGE_BYTES, alignment_bytes=PAGE_2M_BYTES)
    length = PAGE_2M_BYTES if sev_state(machine).rmp_initialised else TMR_BYTES
    if not driver.tmr_lent and (lender := _lender(machine)) is not None:
        for page in range(driver.tmr_spa, driver.tmr_spa + length, PAGE_BYTES):
            lender.give(machine, page)
        driver.tmr_lent = True
    return {"es": 1, "tmr_spa": driver.tmr_spa, "tmr_bytes": length}


def initialise(machine: Machine, *, es: bool = False) -> None:
    """Turn memory encryption on and run INIT, with a TMR for SEV-ES; nothing to do when it was done before."""
    enable_encryption(machine)
    status = need(machine, Command.PLATFORM_STATUS)
    if status.state == PlatformState.UNINIT:
        need(machine, Command.INIT, **(tmr_fields(machine) if es else {}))
        if es and _lender(machine) is not None:
            flush(machine)  # no ASID is dirty that would ask for it, and the TMR is not in use before
    elif es and not status.config:
        raise ConfigError("the platform is initialised without SEV-ES: SHUTDOWN first")


def flush(machine: Machine) -> None:
    """WBINVD on every core, then DF_FLUSH: what must come before an ASID is used again."""
    machine.apply(CacheOp("wbinvd", 0))
    need(machine, Command.DF_FLUSH)


# Guests -------------------------------------------------------------------------------------------------------------


NOT_FOR_SEV = 1 << ExitCode.EXCEPTION_0 + Vector.UD | 1 << ExitCode.EXCEPTION_0 + Vector.PF
"""Intercepts that make no sense when guest memory is ciphertext: instructions and page tables cannot be read.

Source: Linux arch/x86/kvm/svm/sev.c, sev_init_vmcb."""


class Launched(NamedTuple):
    """A guest that runs: its handle and ASID, and what LAUNCH_MEASURE gave."""

    handle: int
    asid: int
    measurement: bytes


def begin_launch(
    machine: Machine, vm_id: int, *, policy: int = 0, asid: int = 0, dh_certificate: bytes = b"", session: bytes = b""
) -> Launched:
    """LAUNCH_START and ACTIVATE (`asid` 0: the first free one); the VM's VMCBs and C-bit say that it is encrypted.

    With `dh_certificate` and `session` from the owner the launch can be attested.
    """
    es = bool(policy & Policy.ES)
    initialise(machine, es=es)
    fields: dict[str, int] = {"policy": policy}
    if dh_certificate:
        page = scratch_page(machine) + PAGE_BYTES
        put(machine, page, dh_certificate)
        put(machine, page + PAGE_BYTES, session)
        fields |= {
            "dh_spa": page,
            "dh_bytes": len(dh_certificate),
            "session_spa": page + PAGE_BYTES,
            "session_bytes": len(session),
        }
    handle = need(machine, Command.LAUNCH_START, **fields).handle
    return activate(machine, vm_id, handle, es=es, asid=asid)


def activate(machine: Machine, vm_id: int, handle: int, *, es: bool, asid: int = 0) -> Launched:
    """ACTIVATE the guest of `handle` (`asid` 0: the first free one) and make the VM use it."""
    sev = sev_state(machine)
    chosen = asid or next((n for n in range(1, sev.max_asid + 1) if in_range(sev, n, es=es) and not owned(sev, n)), 0)
    if not chosen:
        raise ConfigError("no ASID is free for this guest: DEACTIVATE one")
    reply = run(machine, Command.ACTIVATE, handle=handle, asid=chosen)
    if reply.status == Status.DF_FLUSH_REQUIRED:
        flush(machine)
        need(machine, Command.ACTIVATE, handle=handle, asid=chosen)
    elif reply.status:
        raise ConfigError(f"ACTIVATE of ASID {chosen}: {Status(reply.status).name}, expected SUCCESS")
    vm = machine.hypervisor.vms[vm_id]
    vm.c_bit_mask = 1 << machine.config.part.c_bit
    for vcpu_id in vm.vcpu_ids:
        vmcb = machine.vcpus[vcpu_id].vmcb
        vmcb.guest_asid = chosen
        vmcb.encryption_control |= CONTROL_SEV | (CONTROL_SEV_ES if es else 0)
        vmcb.intercepts &= ~NOT_FOR_SEV
    return Launched(handle, chosen, b"")


def load(machine: Machine, vm: Vm, guest: Launched, gpa: int, data: bytes) -> None:
    """Put plaintext at `gpa` (in the VM's memory as it was made) and let LAUNCH_UPDATE_DATA take it."""
    put(machine, vm.memory_spa + gpa, data)
    need(machine, Command.LAUNCH_UPDATE_DATA, handle=guest.handle, spa=vm.memory_spa + gpa, length=len(data))


def measure(machine: Machine, guest: Launched) -> Launched:
    """LAUNCH_MEASURE: the guest with its measurement."""
    page = scratch_page(machine) + PAGE_BYTES
    need(machine, Command.LAUNCH_MEASURE, handle=guest.handle, spa=page, length=MEASUREMENT_BYTES)
    return guest._replace(measurement=get(machine, page, MEASUREMENT_BYTES))


def inject_secret(machine: Machine, vm: Vm, guest: Launched, gpa: int, packet: tuple[bytes, bytes]) -> int:
    """LAUNCH_SECRET of a (header, ciphertext) packet at `gpa`; returns the status."""
    header, ciphertext = packet
    page = scratch_page(machine) + PAGE_BYTES
    put(machine, page, header)
    put(machine, page + PAGE_BYTES, ciphertext)
    return run(
        machine,
        Command.LAUNCH_SECRET,
        handle=guest.handle,
        header_spa=page,
        header_bytes=len(header),
        guest_spa=vm.memory_spa + gpa,
        guest_bytes=len(ciphertext),
        transport_spa=page + PAGE_BYTES,
        transport_bytes=len(ciphertext),
    ).status


def launch_guest(
    machine: Machine,
    vm_id: int,
    *,
    policy: int = 0,
    asid: int = 0,
    loads: Mapping[int, bytes] | None = None,
    vmsas: Sequence[bytes] = (),
) -> Launched:
    """Launch a VM without an owner, by the whole command sequence: INIT if needed, LAUNCH_START to LAUNCH_FINISH.

    `loads` maps guest-physical addresses to plaintext (lengths multiples of 16). For a policy with ES `vmsas` are the
    VMSA pages of the vCPUs; each gets a page of its own, and its VMCB points to it. Returns the running guest.
    """
    vm = machine.hypervisor.vms[vm_id]
    guest = begin_launch(machine, vm_id, policy=policy, asid=asid)
    for gpa, data in (loads or {}).items():
        load(machine, vm, guest, gpa, data)
    for vcpu_id, vmsa in zip(vm.vcpu_ids, vmsas, strict=False):
        spa = machine.hypervisor.allocate_pages(1)
        put(machine, spa, vmsa)
        need(machine, Command.LAUNCH_UPDATE_VMSA, handle=guest.handle, spa=spa, length=len(vmsa))
        machine.vcpus[vcpu_id].vmcb.vmsa_pa = spa
    guest = measure(machine, guest)
    need(machine, Command.LAUNCH_FINISH, handle=guest.handle)
    return guest


def stop_guest(machine: Machine, guest: Launched) -> None:
    """DEACTIVATE and DECOMMISSION; the ASID is dirty until the next `flush`."""
    need(machine, Command.DEACTIVATE, handle=guest.handle)
    need(machine, Command.DECOMMISSION, handle=guest.handle)
