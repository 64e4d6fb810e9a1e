"""Opening a session with the other side: the owner, or the platform that a guest comes from or goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sevlab.plugins.sev import crypto, transfers
from sevlab.plugins.sev.buffers import LaunchStart
from sevlab.plugins.sev.certificates import Algorithm, SevCertificate, Usage
from sevlab.plugins.sev.context import sev_state
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, KEY_BYTES, NONCE_BYTES, Session
from sevlab.plugins.sev.numbers import POLICY_RESERVED, Status, policy_api
from sevlab.plugins.sev.signatures import pubkey_point

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.plugins.sev.crypto import Point, TransportKeys


class Channel(NamedTuple):
    """What a session establishes."""

    keys: TransportKeys
    nonce: bytes


def agreement_key(certificate: bytes) -> Point | None:
    """The other side's point; None: INVALID_CERTIFICATE, for another version, usage or algorithm, or off the curve.

    Nobody checks a signature here: whoever holds the private key may open a session. Source: AMD-ASPFW
    sev_uapp/src/sev_channel.c, sev_channel_open_server; sev_cert.c, sev_cert_sanity_check.
    """
    fields = SevCertificate.from_bytes(certificate)
    if fields.certificate_version != 1 or fields.pubkey_usage != Usage.PDH:
        return None
    if fields.pubkey_algo != Algorithm.ECDH_SHA256:
        return None
    point = pubkey_point(fields.pubkey)
    return None if point is None else crypto.Point(*point)


def open_session(machine: Machine, buffer: LaunchStart) -> Channel | Status:
    """The receiving side: certificate, agreement, wrap MAC, policy MAC, and what the policy asks of the firmware.

    Source: AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_launch_start; sev_guest.c, sev_guest_verify_policy.
    """
    sev = sev_state(machine)
    if buffer.session_bytes != Session.SIZE:
        return Status.INVALID_LENGTH
    session_bytes = transfers.read(machine, buffer.session_spa, Session.SIZE)
    if session_bytes is None:
        return Status.INVALID_ADDRESS
    if buffer.dh_bytes != CERTIFICATE_BYTES:
        return Status.INVALID_LENGTH
    certificate = transfers.read(machine, buffer.dh_spa, CERTIFICATE_BYTES)
    if certificate is None:
        return Status.INVALID_ADDRESS
    point = agreement_key(certificate)
    shared = None if point is None else crypto.ecdh(sev.identity.pdh, point)
    if shared is None:
        return Status.INVALID_CERTIFICATE
    session = Session.from_bytes(session_bytes)
    keys = crypto.unwrap_session(shared, session)
    if keys is None or not crypto.policy_mac_is_right(keys.tik, buffer.policy, session.policy_mac):
        return Status.BAD_MEASUREMENT
    if policy_api(buffer.policy) > (sev.api_major, sev.api_minor) or buffer.policy & POLICY_RESERVED:
        return Status.POLICY_FAILURE
    return Channel(keys, session.nonce)


def new_session(machine: Machine, point: Point, policy: int) -> tuple[Channel, bytes]:
    """The sending side: fresh transport keys and nonce, wrapped for the holder of `point`, which is on the curve."""
    shared = crypto.ecdh(sev_state(machine).identity.pdh, point)
    assert shared is not None  # `agreement_key` has looked
    take = machine.entropy.take
    keys = crypto.TransportKeys(take("sev.tek", KEY_BYTES), take("sev.tik", KEY_BYTES))
    nonce = take("sev.session-nonce", NONCE_BYTES)
    return Channel(keys, nonce), crypto.wrap_session(shared, nonce, take("sev.wrap-iv", KEY_BYTES), keys, policy)
