"""Hypercalls of an encrypted guest whose kernel knows nothing of encryption, as if it had been adapted.

Not an ABI: a means to see all that such a kernel does, not only what it does first. Where Xen cannot find or read a
buffer at a linear address, the guest's own view of its memory is used - what bouncing the buffer through shared memory
would come to - and a record says so. Only with the option `adapt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.access import AccessKind
from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES, FaultUnwind
from sevlab.plugins.xen.call import MAX_COPY_BYTES, Abi, Call
from sevlab.plugins.xen.records import Adapted

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu


def is_encrypted(vcpu: Vcpu) -> bool:
    """Whether Xen sees ciphertext in this vCPU's private pages."""
    return bool(vcpu.vmcb.encryption_control & (CONTROL_SEV | CONTROL_SEV_ES))


class AdaptedCall(Call):
    """A hypercall whose linear addresses are the guest's to follow."""

    __slots__ = ()

    def copy_in(self, handle: int, length_bytes: int) -> bytes | None:
        """Read a buffer of the guest through its own page tables and key."""
        if self.abi is not Abi.LEGACY or not is_encrypted(self.vcpu):
            return super().copy_in(handle, length_bytes)
        if length_bytes > MAX_COPY_BYTES:
            return None
        try:
            data = self.machine.access.guest_read(self.vcpu, handle, length_bytes, AccessKind.READ)
        except FaultUnwind:
            return None
        self.machine.emit(Adapted(self.vcpu.vcpu_id, "buffer", handle))
        return data

    def copy_out(self, handle: int, data: bytes) -> bool:
        """Write one likewise."""
        if self.abi is not Abi.LEGACY or not is_encrypted(self.vcpu):
            return super().copy_out(handle, data)
        try:
            self.machine.access.guest_write(self.vcpu, handle, data)
        except FaultUnwind:
            return False
        self.machine.emit(Adapted(self.vcpu.vcpu_id, "buffer", handle))
        return True
