"""Platform commands: INIT, INIT_EX, SHUTDOWN, PLATFORM_RESET, PLATFORM_STATUS, DF_FLUSH, GET_ID, NOP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, is_aligned
from sevlab.plugins.sev import asids, transfers
from sevlab.plugins.sev.buffers import Init, InitEx, OneBlob, PlatformStatus
from sevlab.plugins.sev.command import NoBuffer, Request, reserved_set
from sevlab.plugins.sev.context import Identity, sev_state
from sevlab.plugins.sev.handlers.common import move_platform
from sevlab.plugins.sev.identity import chip_id, complete
from sevlab.plugins.sev.numbers import InitFlag, Status
from sevlab.plugins.sev.nvram import NV_AREA_BYTES, Corrupt, erase, load, store
from sevlab.plugins.sev.states import PlatformState
from sevlab.plugins.sme import sme_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

MEM_ENCRYPTION_MOD_EN = 1 << 23
SNP_EN = 1 << 24
"""Bits of SYSCFG. Source: 24593, 15.34.3 and 15.36.2."""

TMR_BYTES = 1 << 20
ID_BYTES = 64


def init(machine: Machine, request: Request[Init]) -> Status:
    """Initialise the platform: keys from the SPI flash or new, no guests, every ASID dirty.

    Source: 55766, INIT; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_init_common (order of checks).
    """
    buffer = request.buffer
    return _hardware(machine, Init, buffer) or _initialise(
        machine, request, es=bool(buffer.es), tmr=(buffer.tmr_spa, buffer.tmr_bytes), nv_spa=0
    )


def init_ex(machine: Machine, request: Request[InitEx]) -> Status:
    """Initialise the platform with its keys in memory at `nv_spa`, where the driver keeps them for a file.

    A damaged area is erased before SECURE_DATA_INVALID is answered. Source: as INIT.
    """
    buffer = request.buffer
    status = _hardware(machine, InitEx, buffer)
    if status:
        return status
    if buffer.length != InitEx.SIZE:
        return Status.INVALID_LENGTH
    if buffer.nv_spa:
        if not is_aligned(buffer.nv_spa, PAGE_BYTES):
            return Status.INVALID_ADDRESS
        if not transfers.valid_range(machine, buffer.nv_spa, buffer.nv_bytes):
            return Status.INVALID_ADDRESS
        if buffer.nv_bytes != NV_AREA_BYTES:
            return Status.INVALID_LENGTH
        status = transfers.output_status(machine, buffer.nv_spa, NV_AREA_BYTES)
        if status:
            return status
    return _initialise(
        machine, request, es=bool(buffer.es), tmr=(buffer.tmr_spa, buffer.tmr_bytes), nv_spa=buffer.nv_spa
    )


def _hardware(machine: Machine, layout: type[Init | InitEx], buffer: Init | InitEx) -> Status:
    """Memory encryption is on, the buffer's reserved bits are zero, and with SNPEn the RMP was initialised before."""
    syscfg = sme_state(machine).syscfg
    if not syscfg & MEM_ENCRYPTION_MOD_EN:
        return Status.HWERROR_PLATFORM
    if reserved_set(layout, buffer):
        return Status.INVALID_CONFIG
    if syscfg & SNP_EN and not sev_state(machine).rmp_initialised:
        return Status.INVALID_PLATFORM_STATE
    return Status.SUCCESS


def _initialise(
    machine: Machine, request: Request[Init] | Request[InitEx], *, es: bool, tmr: tuple[int, int], nv_spa: int
) -> Status:
    sev = sev_state(machine)
    persistent = load(machine, nv_spa)
    if isinstance(persistent, Corrupt):
        erase(machine, nv_spa)
        return Status.SECURE_DATA_INVALID
    if es:
        status = _tmr_status(machine, *tmr, nv_spa=nv_spa)
        if status:
            return status
    sev.identity = persistent
    sev.nv_spa = nv_spa
    if complete(machine, persistent):
        store(machine, persistent)
    if not sev.snp_initialised:
        asids.make_all_dirty(sev)
    sev.es = es
    if es:
        sev.tmr.spa, sev.tmr.length_bytes = transfers.guest_spa(machine, tmr[0]), tmr[1]
    move_platform(sev, request.command)
    return Status.SUCCESS


def _tmr_status(machine: Machine, spa: int, length_bytes: int, *, nv_spa: int) -> Status:
    """The trusted region of SEV-ES: 1 MiB, or 2 MiB once the RMP is initialised, aligned to its size.

    Source: AMD-ASPFW sev_uapp/src/sev_es.c, sev_es_reserve_trusted_region.
    """
    size = PAGE_2M_BYTES if sev_state(machine).rmp_initialised else TMR_BYTES
    own = transfers.guest_spa(machine, spa)
    if nv_spa:
        if not transfers.valid_range(machine, spa, length_bytes):
            return Status.INVALID_ADDRESS
        if transfers.overlap(own, size, transfers.guest_spa(machine, nv_spa), NV_AREA_BYTES):
            return Status.INVALID_ADDRESS
    status = transfers.output_status(machine, spa, length_bytes)
    if status:
        return status
    if not is_aligned(spa, size):
        return Status.INVALID_ADDRESS
    if length_bytes != size:
        return Status.INVALID_LENGTH
    return Status.SUCCESS if transfers.valid_range(machine, spa, length_bytes) else Status.INVALID_ADDRESS


def shutdown(machine: Machine, request: Request[NoBuffer]) -> Status:
    """Wipe every guest and the platform's keys, give the trusted region back.

    Source: 55766, SHUTDOWN; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_shutdown.
    """
    sev = sev_state(machine)
    for guest in sev.guests.values():
        if guest.asid:
            asids.release(sev, guest.asid, guest.ccxs)
    sev.guests.clear()
    sev.tmr.checksums.clear()
    sev.tmr.spa = sev.tmr.length_bytes = 0
    sev.tmr.locked = False
    sev.identity = Identity()
    sev.nv_spa = 0
    if not sev.snp_initialised:
        sev.ring.enabled = sev.ring.active = False
    sev.es = False
    move_platform(sev, request.command)
    return Status.SUCCESS


def platform_reset(machine: Machine, _request: Request[NoBuffer]) -> Status:
    """Erase the keys in the SPI flash: the next INIT makes new ones. Source: 55766, PLATFORM_RESET."""
    erase(machine, 0)
    return Status.SUCCESS


def platform_status(machine: Machine, request: Request[PlatformStatus]) -> Status:
    """Version, state, owner, configuration, number of guests; the last three read 0 before INIT.

    Source: 55766, PLATFORM_STATUS; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_platform_status.
    """
    sev = sev_state(machine)
    request.answer(api_major=sev.api_major, api_minor=sev.api_minor, state=sev.state, build_id=sev.build)
    if sev.state is PlatformState.UNINIT:
        request.answer(owner=0, config=0, guest_count=0)
    else:
        owner, config = int(sev.identity.external_owner), InitFlag.ES if sev.es else 0
        request.answer(owner=owner, config=config, guest_count=len(sev.guests))
    return Status.SUCCESS


def df_flush(machine: Machine, _request: Request[NoBuffer]) -> Status:
    """Write back the data fabric: dirty ASIDs become clean, and the first time the trusted region is locked.

    WBINVD_REQUIRED when a core did not do WBINVD; the complexes that did are clean all the same. Source: 55766,
    DF_FLUSH; AMD-ASPFW sev_uapp/src/sev_mcmd.c, mcmd_df_flush_common.
    """
    sev = sev_state(machine)
    status = asids.flush(sev)
    if not status and sev.es:
        sev.tmr.locked = True
    return status


def get_id(machine: Machine, request: Request[OneBlob]) -> Status:
    """64 bytes for each socket: x and y of a secp256k1 point, which identify the chip.

    128 bytes only when exactly that much room is offered and there are two sockets. Source: 55766, GET_ID;
    AMD-ASPFW sev_uapp/src/sev_plat.c, sev_get_id.
    """
    buffer = request.buffer
    if buffer.length < ID_BYTES:
        request.answer(length=ID_BYTES)
        return Status.INVALID_LENGTH
    status = transfers.output_status(machine, buffer.spa, buffer.length)
    if status:
        return status
    sev = sev_state(machine)
    keys = [sev.chip_key]
    if buffer.length == 2 * ID_BYTES and sev.second_chip_key:
        keys.append(sev.second_chip_key)
    data = b"".join(map(chip_id, keys))
    if not transfers.valid_range(machine, buffer.spa, len(data)):
        return Status.INVALID_ADDRESS
    transfers.write(machine, buffer.spa, data)
    request.answer(length=len(data))
    return Status.SUCCESS


def nop(_machine: Machine, _request: Request[NoBuffer]) -> Status:
    """Nothing. Source: 55766, NOP."""
    return Status.SUCCESS
