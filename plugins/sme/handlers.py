"""SYSCFG, CPUID Fn8000_001F, and the key of host accesses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.builder import Msr
from sevlab.core.events import Fault
from sevlab.core.units import HOST_ASID
from sevlab.plugins.sme.layout import CPUID_ENCRYPTION, MEM_ENCRYPTION_MOD_EN, SYSCFG, SmeCpuid
from sevlab.plugins.sme.states import SmeState, sme_state

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.crypto import MemoryKey
    from sevlab.core.machine import Machine

SYSCFG_LATCHED = MEM_ENCRYPTION_MOD_EN
"""Bits that software can set and only a reset clears. Source: 24593, 7.10.2."""


def register(builder: PluginBuilder) -> None:
    """Register SME with a machine."""
    part = builder.config.part
    state = SmeState(syscfg=MEM_ENCRYPTION_MOD_EN if builder.options["enabled"] else 0)
    builder.component(state)
    builder.host_msrs.add(SYSCFG, Msr(read_syscfg, write_syscfg))
    leaf = SmeCpuid.from_bytes(
        SmeCpuid.build(sme=1, coherent=int(part.coherent), c_bit_position=part.c_bit, lost_physical_bits=part.lost_bits)
    ).to_bytes()
    eax, ebx = int.from_bytes(leaf[:4], "little"), int.from_bytes(leaf[4:8], "little")
    builder.cpuid_bits(CPUID_ENCRYPTION, eax=eax, ebx=ebx)
    builder.at_boot(make_key)
    slots = KeySlots()
    builder.at_boot(slots.attach)
    builder.slot("key_of", slots)


def make_key(machine: Machine) -> None:
    """At reset the ASP makes the key of ASID 0 from its random source; no software sees it. Source: 24593, 7.10.1."""
    xts_key = machine.entropy.take("sme.host-key", machine.memory.key_bits // 4)
    install_key(machine, HOST_ASID, xts_key, "SME host key")


def install_key(machine: Machine, asid: int, xts_key: bytes, label: str) -> MemoryKey:
    """Put a new key into the slot of `asid`; what the old one encrypted stays behind as ciphertext."""
    key = machine.memory.install_key(xts_key, label)
    sme_state(machine).keys[asid] = key.key_id
    return key


def remove_key(machine: Machine, asid: int) -> None:
    """Empty the slot of `asid`: its accesses are plaintext from now on."""
    sme_state(machine).keys.pop(asid, None)


def read_syscfg(machine: Machine, _vcpu: Vcpu | None, _msr: int) -> int:
    """RDMSR of SYSCFG."""
    return sme_state(machine).syscfg


def write_syscfg(machine: Machine, _vcpu: Vcpu | None, _msr: int, value: int) -> Fault | None:
    """WRMSR of SYSCFG; MemEncryptionModEn stays set until reset.

    Source: 24593, 7.10.2. That clearing it is ignored rather than #GP is UNVERIFIED.
    """
    state = sme_state(machine)
    state.syscfg = value | state.syscfg & SYSCFG_LATCHED
    return None


class KeySlots:
    """The slot `key_of`: the memory controller's look-up of a key by ASID.

    While MemEncryptionModEn is clear, no access is encrypted. Source: 24593, 7.10.2 and 15.34.2.
    """

    __slots__ = ("_machine",)

    def __init__(self) -> None:
        self._machine: Machine | None = None

    def attach(self, machine: Machine) -> None:
        """Remember the machine that is being made."""
        self._machine = machine

    def __call__(self, asid: int, c_bit: bool) -> MemoryKey | None:  # noqa: FBT001  # the slot's signature
        """The key in the slot of `asid` for a C=1 access while encryption is on, else None: plaintext."""
        machine = self._machine
        if not c_bit or machine is None:
            return None
        state = sme_state(machine)
        if not state.syscfg & MEM_ENCRYPTION_MOD_EN:
            return None
        return machine.memory.key(state.keys.get(asid, 0))
