"""Messages of xenstore: types, errors, limits.

Source: Xen xen/include/public/io/xs_wire.h; quotas: tools/xenstored/domain.c (quotas).
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING

from sevlab.plugins.xen.layout import XsdSockmsg
from sevlab.plugins.xen.numbers import Errno

if TYPE_CHECKING:
    from collections.abc import Sequence


class XsType(IntEnum):
    """Types of messages; 20 was RESTRICT."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26


PAYLOAD_MAX = 4096
"""A longer one ends the connection."""
FEATURE_ERROR, FEATURE_WATCH_DEPTH, FEATURE_DOMID_ANY = 2, 4, 8
FEATURES = FEATURE_ERROR | FEATURE_WATCH_DEPTH | FEATURE_DOMID_ANY
"""What the daemon says of itself in the ring page."""


class XsError(IntEnum):
    """Why a ring is not served any more: the field `error` of its page."""

    NONE = 0
    COMM = 1
    RINGIDX = 2
    PROTO = 3


MAX_NODES, MAX_WATCHES, MAX_OUTSTANDING, MAX_TRANSACTIONS = 1000, 128, 20, 10
MAX_TRANSACTION_NODES, MAX_PERMS, MAX_PATH_BYTES, MAX_NODE_BYTES = 1024, 5, 2048, 2048
"""A guest stays below each of these: the last value that is granted is one less."""
MAX_QUEUED_BYTES = 5 << 19
"""Bytes that wait for a guest; the daemon's quota of memory, which counts its nodes as well."""


class Refusal(Exception):  # an answer of the protocol, not an error of ours
    """A request is answered with an error; caught where requests are carried out, nowhere else."""

    def __init__(self, errno: Errno) -> None:
        super().__init__(errno.name)
        self.errno = errno


def message(kind: int, payload: bytes, req_id: int = 0, tx_id: int = 0) -> bytes:
    """Head and payload."""
    return XsdSockmsg.build(type=kind, req_id=req_id, tx_id=tx_id, len=len(payload)) + payload


def text(value: bytes) -> str:
    """A string of the protocol: any byte, one to one."""
    return value.decode("latin-1")


def raw(value: str) -> bytes:
    """The bytes of a string."""
    return value.encode("latin-1")


def strings(payload: bytes) -> list[str]:
    """The nul-terminated strings of a payload; what follows the last nul is not one."""
    return [text(part) for part in payload.split(b"\0")[:-1]]


def one_string(payload: bytes) -> str:
    """The only string of a payload. Refuses a payload that is not one nul-terminated string."""
    found = strings(payload)
    if len(found) != 1 or payload[-1:] != b"\0":
        raise Refusal(Errno.EINVAL)
    return found[0]


def joined(parts: Sequence[str]) -> bytes:
    """Strings, each with its nul."""
    return b"".join(raw(part) + b"\0" for part in parts)


def number(digits: str) -> int:
    """What C's atoi makes of a string: its leading digits, 0 without any."""
    found = re.match(r"\s*[+-]?[0-9]+", digits)
    return int(found[0]) if found else 0


def domid_of(digits: str) -> int:
    """A domain id in decimal. Refuses anything else."""
    if re.fullmatch(r"\s*[+-]?[0-9]+|", digits) is None or not 0 <= number(digits) <= 0xFFFF:
        raise Refusal(Errno.EINVAL)
    return number(digits)
