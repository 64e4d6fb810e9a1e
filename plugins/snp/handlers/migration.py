"""Guest messages of migration agents: export, import, absorb a guest's context; set its root key.

Source: 56860, MSG_EXPORT_REQ to MSG_VMRK_REQ; AMD-ASPFW sev_uapp/src/sev_channel.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev import Status
from sevlab.plugins.snp.automata import SnpGuestState
from sevlab.plugins.snp.buffers import MetadataEntry
from sevlab.plugins.snp.context import NO_MIGRATION_AGENT, SnpGuest
from sevlab.plugins.snp.handlers.common import find_guest
from sevlab.plugins.snp.id_block import IdBlock
from sevlab.plugins.snp.messages import (
    EXPORT_BYTES,
    EXPORT_VERSION,
    ExportContext,
    ExportRequest,
    ExportResponse,
    ImportRequest,
    Message,
    StatusResponse,
    VmrkRequest,
)

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


def export_context(guest: SnpGuest) -> bytes:
    """A guest's context as its migration agent gets it."""
    return ExportContext.build(
        launch_digest=guest.launch_digest,
        oek=guest.oek,
        vmrk=guest.vmrk,
        host_data=guest.host_data,
        id_key_digest=guest.id_key_digest,
        author_key_digest=guest.author_key_digest,
        report_id=guest.report_id,
        imi_digest=guest.imi_digest,
        root_md_entry=guest.root_md_entry,
        author_key_en=int(guest.author_key_en),
        id_block_en=int(bool(guest.id_block)),
        vcek_dis=int(guest.vcek_dis),
        policy=guest.policy,
        state=guest.state,
        oek_iv_count=guest.oek_iv_count,
        id_block=guest.id_block or bytes(IdBlock.SIZE),
        gosvw=guest.gosvw,
        desired_tsc_khz=guest.desired_tsc_khz,
        tsc_offset=guest.tsc_offset,
        launch_tcb=guest.launch_tcb,
        **{f"vmpck{number}": key for number, key in enumerate(guest.vmpcks)},
        **{f"message_count{number}": count for number, count in enumerate(guest.message_counts)},
    )


def load_context(guest: SnpGuest, raw: bytes) -> None:
    """Take over an exported context; the guest runs from then on. Memory key, ASID and agent stay its own."""
    context = ExportContext.from_bytes(raw)
    for name in (
        "launch_digest",
        "oek",
        "vmrk",
        "host_data",
        "id_key_digest",
        "author_key_digest",
        "report_id",
        "imi_digest",
        "root_md_entry",
        "policy",
        "oek_iv_count",
        "gosvw",
        "desired_tsc_khz",
        "tsc_offset",
        "launch_tcb",
    ):
        setattr(guest, name, getattr(context, name))
    guest.author_key_en = bool(context.author_key_en)
    guest.vcek_dis = bool(context.vcek_dis)
    guest.id_block = context.id_block if context.id_block_en else b""
    guest.vmpcks = (context.vmpck0, context.vmpck1, context.vmpck2, context.vmpck3)
    guest.message_counts = (
        context.message_count0,
        context.message_count1,
        context.message_count2,
        context.message_count3,
    )
    guest.state = SnpGuestState.RUNNING


def _is_agent(sender: SnpGuest, target: SnpGuest) -> bool:
    return target.migration_agent_spa == sender.gctx_spa and target.report_id_ma == sender.report_id


def export(machine: Machine, sender: SnpGuest, message: Message) -> bytes:
    """MSG_EXPORT: the agent of a running guest, or a guest without one itself by VMPCK0, gets its context.

    Order: reserved bits, target, its state, the sender's right. Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    wish = ExportRequest.from_bytes(message.payload[: ExportRequest.SIZE])
    target = find_guest(machine, wish.gctx_spa)
    if wish.reserved_8 or wish.reserved_c:
        return ExportResponse.build(status=Status.INVALID_PARAM)
    if isinstance(target, Status):
        return ExportResponse.build(status=Status.INVALID_GUEST)
    if target.state is not SnpGuestState.RUNNING:
        return ExportResponse.build(status=Status.INVALID_GUEST_STATE)
    own = target is sender and target.migration_agent_spa == NO_MIGRATION_AGENT and not message.header.msg_vmpck
    if not own and not _is_agent(sender, target):
        return ExportResponse.build(status=Status.INVALID_GUEST)
    return ExportResponse.build(gctx_size=EXPORT_BYTES, gctx_version=EXPORT_VERSION, context=export_context(target))


def _root_entry_valid(raw: bytes) -> bool:
    return bool(MetadataEntry.from_bytes(raw).valid)


def _incoming(message: Message) -> ImportRequest | Status:
    wish = ImportRequest.from_bytes(message.payload[: ImportRequest.SIZE])
    if wish.gctx_size != EXPORT_BYTES or wish.gctx_version != EXPORT_VERSION or any(wish.reserved_10):
        return Status.INVALID_PARAM
    return wish


def _target(machine: Machine, message: Message) -> tuple[SnpGuest, ImportRequest] | Status:
    """The context that a message names, and the message."""
    wish = _incoming(message)
    if isinstance(wish, Status):
        return wish
    target = find_guest(machine, wish.gctx_spa)
    return Status.INVALID_GUEST if isinstance(target, Status) else (target, wish)


def import_(machine: Machine, _sender: SnpGuest, message: Message) -> bytes:
    """MSG_IMPORT: a fresh context becomes a running guest, whose root metadata entry must be valid.

    Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    return StatusResponse.build(status=_import_status(machine, message))


def _import_status(machine: Machine, message: Message) -> Status:
    named = _target(machine, message)
    if isinstance(named, Status):
        return named
    target, wish = named
    if target.state is not SnpGuestState.INIT:
        return Status.INVALID_GUEST_STATE
    if not _root_entry_valid(ExportContext.from_bytes(wish.context).root_md_entry):
        return Status.INVALID_MDATA_ENTRY
    load_context(target, wish.context)
    return Status.SUCCESS


def absorb(machine: Machine, _sender: SnpGuest, message: Message) -> bytes:
    """MSG_ABSORB: a guest that was launched from the same migration image takes over a context.

    Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    return StatusResponse.build(status=_absorb_status(machine, message))


def _absorb_status(machine: Machine, message: Message) -> Status:
    named = _target(machine, message)
    if isinstance(named, Status):
        return named
    target, wish = named
    if target.state is not SnpGuestState.LAUNCH or not target.imi_en:
        return Status.INVALID_GUEST_STATE
    if _root_entry_valid(target.root_md_entry):
        return Status.INVALID_MDATA_ENTRY
    if ExportContext.from_bytes(wish.context).imi_digest != target.launch_digest:
        return Status.BAD_MEASUREMENT
    target.imi_en = False
    load_context(target, wish.context)
    return Status.SUCCESS


def absorb_noma(_machine: Machine, sender: SnpGuest, message: Message) -> bytes:
    """MSG_ABSORB_NOMA: a guest without an agent takes over a context that was launched from the same image.

    Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    return StatusResponse.build(status=_absorb_noma_status(sender, message))


def _absorb_noma_status(sender: SnpGuest, message: Message) -> Status:
    wish = _incoming(message)
    if isinstance(wish, Status):
        return wish
    if sender.migration_agent_spa != NO_MIGRATION_AGENT:
        return Status.INVALID_GUEST
    incoming = ExportContext.from_bytes(wish.context).imi_digest
    if not incoming == sender.launch_digest == sender.imi_digest:
        return Status.BAD_MEASUREMENT
    load_context(sender, wish.context)
    return Status.SUCCESS


def vmrk(machine: Machine, sender: SnpGuest, message: Message) -> bytes:
    """MSG_VMRK: the agent sets the root key of a guest that it launches. Source: AMD-ASPFW sev_channel.c."""
    wish = VmrkRequest.from_bytes(message.payload[: VmrkRequest.SIZE])
    target = find_guest(machine, wish.gctx_spa)
    if any(wish.reserved_8):
        return StatusResponse.build(status=Status.INVALID_PARAM)
    if isinstance(target, Status) or not _is_agent(sender, target):
        return StatusResponse.build(status=Status.INVALID_GUEST)
    if target.state is not SnpGuestState.LAUNCH or target.imi_en:
        return StatusResponse.build(status=Status.INVALID_GUEST_STATE)
    target.vmrk = wish.vmrk
    return StatusResponse.build()
