"""In which mode a guest runs, as the hypervisor knows it from the VMCB."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu


class Mode(Enum):
    """What of the guest the hypervisor can read."""

    PLAIN = "plain"
    """Memory and registers."""
    SEV = "SEV"
    """Registers; memory and page tables are ciphertext."""
    SEV_ES = "SEV-ES"
    """Neither: what exits at all comes through the GHCB."""


def mode_of(vcpu: Vcpu) -> Mode:
    """The mode of the guest; SEV-SNP counts as SEV-ES here."""
    control = vcpu.vmcb.encryption_control
    if control & CONTROL_SEV_ES:
        return Mode.SEV_ES
    return Mode.SEV if control & CONTROL_SEV else Mode.PLAIN
