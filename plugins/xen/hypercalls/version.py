"""xen_version. Source: Xen xen/common/kernel.c (do_xen_version)."""

from __future__ import annotations

from typing import Any

from sevlab.plugins.xen.arguments import CompileInfo, FeatureInfo
from sevlab.plugins.xen.call import Abi, Call
from sevlab.plugins.xen.numbers import Errno, Version
from sevlab.plugins.xen.operations import Operation, run_operation
from sevlab.plugins.xen.settings import XEN_MAJOR, XEN_MINOR

EXTRAVERSION = b".7"
CAPABILITIES = b"xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 "
CHANGESET = b"unavailable"
COMMANDLINE = b""
FIXED: dict[int, tuple[bytes, int]] = {
    Version.EXTRAVERSION: (EXTRAVERSION, 16),
    Version.CAPABILITIES: (CAPABILITIES, 1024),
    Version.CHANGESET: (CHANGESET, 64),
    Version.GUEST_HANDLE: (b"", 16),
    Version.COMMANDLINE: (COMMANDLINE, 1024),
    Version.COMPILE_INFO: (
        CompileInfo.build(compiler=b"sevlab".ljust(64, b"\0"), compile_by=bytes(16), compile_domain=bytes(32)),
        CompileInfo.SIZE,
    ),
}
VARIABLE = {
    Version.EXTRAVERSION2: EXTRAVERSION,
    Version.CAPABILITIES2: CAPABILITIES,
    Version.CHANGESET2: CHANGESET,
    Version.COMMANDLINE2: COMMANDLINE,
}
"""Texts of the model's Xen, cut and filled as the real one's."""

FEATURES = 1 << 0 | 1 << 2 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 16 | 1 << 18 | 1 << 19 | 1 << 20
"""XENFEAT_ bits of an HVM domain: writable page tables, auto-translated, callback vector, safe pvclock, PIRQs, vnode,
not direct-mapped, runstate and time areas by physical address, MSI-X writes. Source: xen/include/public/features.h."""
FEATURE_DOM0 = 1 << 11


def version(call: Call, _argument: Any) -> int:
    """The version as major << 16 | minor."""
    return XEN_MAJOR << 16 | XEN_MINOR


def fixed(call: Call, command: int, handle: int) -> int:
    """A text in a field of fixed length."""
    text, length = FIXED[command]
    return 0 if call.copy_out(handle, text.ljust(length, b"\0")[:length]) else -Errno.EFAULT


def variable(call: Call, command: int, handle: int) -> int:
    """A text behind a length: only the length without a handle."""
    if command == Version.BUILD_ID:
        return -Errno.ENODATA
    text = VARIABLE[Version(command)]
    if not handle:
        return len(text)
    length = call.copy_in(handle, 4)
    if length is None:
        return -Errno.EFAULT
    if len(text) > int.from_bytes(length, "little"):
        return -Errno.ENOBUFS
    return len(text) if call.copy_out(handle + 4, text) else -Errno.EFAULT


def get_features(call: Call, a: Any) -> int:
    """A word of feature bits; there is one."""
    if a.submap_idx:
        return -Errno.EINVAL
    a.submap = FEATURES | (FEATURE_DOM0 if call.domain.is_control else 0)
    return 0


def platform_parameters(call: Call, handle: int) -> int:
    """Where Xen begins in virtual memory: nowhere, for an HVM guest."""
    return 0 if call.copy_out(handle, bytes(call.long_bytes)) else -Errno.EFAULT


def page_size(call: Call, handle: int) -> int:
    """4096."""
    return -Errno.EINVAL if handle else 4096


OPERATIONS: dict[int, Operation] = {
    Version.VERSION: Operation(version, fast=()),
    Version.PLATFORM_PARAMETERS: Operation(platform_parameters),
    Version.GET_FEATURES: Operation(get_features, FeatureInfo, ("submap",), (("submap_idx", 2),), (("submap", 3),)),
    Version.PAGESIZE: Operation(page_size),
}


def xen_version(call: Call) -> int:
    """Hypercall xen_version of cmd, ptr."""
    command, handle = call.args
    if command not in OPERATIONS and call.abi is not Abi.FAST:
        if command in FIXED:
            return fixed(call, command, handle)
        if command in VARIABLE or command == Version.BUILD_ID:
            return variable(call, command, handle)
    return run_operation(call, OPERATIONS, command, handle)
