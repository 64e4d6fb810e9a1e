"""What the firmware remembers of the SNP platform and of each SNP guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.snp.automata import SnpGuestState, SnpPlatformState

if TYPE_CHECKING:
    from sevlab.core.crypto import MemoryKey
    from sevlab.core.machine import Machine

VMPCKS = 4
NO_MIGRATION_AGENT = (1 << 64) - 1
"""What stands in the context where a guest has no migration agent. Source: AMD-ASPFW sev_uapp/src/sev_guest.h."""

ROOT_ENTRY_BYTES = 0x40


class SnpGuest(Stateful):
    """Context of one guest. On a part it is the content of the context page, under a key of the firmware's; the model
    keeps it beside the memory, and the page shows nothing of it. Source: AMD-ASPFW sev_uapp/src/sev_guest.h.
    """

    gctx_spa: int = 0
    state: SnpGuestState = SnpGuestState.INIT
    policy: int = 0
    asid: int = 0
    """0: inactive."""
    ccxs: int = 0
    vek: bytes = b""
    key_id: int = 0
    oek: bytes = b""
    oek_iv_count: int = 0
    launch_digest: bytes = bytes(48)
    imi_digest: bytes = bytes(48)
    imi_en: bool = False
    id_block: bytes = b""
    """The 60h bytes; empty: none was given."""
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)
    author_key_en: bool = False
    vcek_dis: bool = False
    host_data: bytes = bytes(32)
    vmpcks: tuple[bytes, ...] = (bytes(32),) * VMPCKS
    message_counts: tuple[int, ...] = (0,) * VMPCKS
    vmrk: bytes = bytes(32)
    migration_agent_spa: int = NO_MIGRATION_AGENT
    report_id: bytes = bytes(32)
    report_id_ma: bytes = b"\xff" * 32
    root_md_entry: bytes = bytes(ROOT_ENTRY_BYTES)
    gosvw: bytes = bytes(16)
    desired_tsc_khz: int = 0
    tsc_offset: int = 0
    launch_tcb: int = 0
    launch_mit_vector: int = 0
    """The mitigations that were verified when it was launched."""

    def key(self, machine: Machine) -> MemoryKey | None:
        """Its memory key; None before it was first activated."""
        return machine.memory.key(self.key_id)


class SnpPlatform(Stateful):
    """The platform's context."""

    state: SnpPlatformState = SnpPlatformState.UNINIT
    guests: StateDict[int, SnpGuest] = new(StateDict)
    """By SPA of the context page."""
    current_tcb: int = 0
    committed_tcb: int = 0
    reported_tcb: int = 0
    committed_version: tuple[int, int, int] = (0, 0, 0)
    rmp_tcb: int = 0
    """The TCB with which the RMP was initialised."""
    mask_chip_id: bool = False
    mask_chip_key: bool = False
    vlek: bytes = b""
    """The loaded VLEK's hash stick; empty: none."""
    rapl_dis: bool = False
    ciphertext_hiding: bool = False
    max_snp_asid: int = 0
    """With ciphertext hiding, the last ASID of SNP guests; 0: no limit of its own."""
    tio_en: bool = False
    report_version: int = 2
    mitigations_supported: int = 0
    mitigations_verified: int = 0
    smt: bool = True
