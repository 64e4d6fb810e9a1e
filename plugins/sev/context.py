"""What the firmware remembers: the platform context with its keys (PCTX), the guests' contexts (GCTX), the ASIDs."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.sev.crypto import TransportKeys
from sevlab.plugins.sev.numbers import API_MAJOR, API_MINOR, BUILD_ID, Policy
from sevlab.plugins.sev.states import GuestState, PlatformState

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.crypto import MemoryKey
    from sevlab.core.machine import Machine


class RunningDigest:
    """SHA-256 of what was loaded so far, as an immutable value: `plus` gives the next one."""

    __slots__ = ("_hash", "length_bytes")

    def __init__(self, hash_: Any = None, length_bytes: int = 0) -> None:
        self._hash = sha256() if hash_ is None else hash_
        self.length_bytes = length_bytes

    def plus(self, length_bytes: int, feed: Callable[[Callable[[bytes | bytearray], object]], object]) -> RunningDigest:
        """The digest with `length_bytes` more bytes, which `feed` gives to the function that it is called with."""
        grown = self._hash.copy()
        feed(grown.update)
        return RunningDigest(grown, self.length_bytes + length_bytes)

    def digest(self) -> bytes:
        """The 32 bytes of the digest as it stands."""
        return cast("bytes", self._hash.digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunningDigest) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return f"RunningDigest({self.digest().hex()}, {self.length_bytes} bytes)"


NO_KEYS = TransportKeys(bytes(16), bytes(16))
"""A guest without a session: the firmware's structure is all zero."""


class Gctx(Stateful):
    """Context of one guest. Source: 55766, GCTX; AMD-ASPFW sev_uapp/src/sev_guest.h."""

    handle: int = 0
    state: GuestState = GuestState.UNINIT
    policy: int = 0
    asid: int = 0
    """0: inactive."""
    ccxs: int = 0
    """Core complexes that the guest is activated on, a bit each."""
    running_on_ccxs: bool = False
    """The ASID is valid on them: in use; else the activation is pending until the guest runs."""
    vek_seed: bytes = b""
    key_id: int = 0
    """Number of the memory key once it was installed."""
    oek: bytes = b""
    oek_iv: int = 0
    keys: TransportKeys = NO_KEYS
    nonce: bytes = bytes(16)
    digest: RunningDigest = RunningDigest()
    launch_digest: bytes = bytes(32)
    measure: bytes = bytes(32)
    vmsa_slots: tuple[int, ...] = ()
    """Addresses in the TMR that hold the checksums of this guest's VMSAs."""

    @property
    def es(self) -> bool:
        """Whether it is an SEV-ES guest."""
        return bool(self.policy & Policy.ES)

    def key(self, machine: Machine) -> MemoryKey | None:
        """Its memory key; None before it was first activated."""
        return machine.memory.key(self.key_id)


class Identity(Stateful):
    """The platform's keys: private scalars (0: none) and certificates. Source: 55766, PCTX and non-volatile data."""

    cek: int = 0
    oca: int = 0
    oca_certificate: bytes = b""
    pek: int = 0
    pek_certificate: bytes = b""
    pdh: int = 0
    pdh_certificate: bytes = b""
    external_owner: bool = False


class Ccx(Stateful):
    """One core complex: state of each ASID as bits of numbers (none of them: clean), and which cores did WBINVD."""

    dirty: int = 0
    allocated: int = 0
    in_use: int = 0
    wbinvd_done: int = 0


class Tmr(Stateful):
    """The trusted memory region; `checksums` maps the address of a slot to the VMSA checksum in it."""

    spa: int = 0
    length_bytes: int = 0
    locked: bool = False
    checksums: StateDict[int, int] = new(StateDict)


class Ring(Stateful):
    """Ring-buffer mode; pairs are of the high and of the low queue, words as in the registers.

    `enabled` from the command RING_BUFFER on, `active` from the host's first control word on.
    """

    enabled: bool = False
    active: bool = False
    commands_spa: tuple[int, int] = (0, 0)
    statuses_spa: tuple[int, int] = (0, 0)
    thresholds: tuple[int, int] = (0, 0)
    interrupt_on_empty: bool = False
    control: int = 0
    tail: int = 0
    head: int = 0


class SevState(Stateful):
    """State of the plugin: the platform context and everything below it.

    `snp_initialised`, `rmp_initialised` and `rmp` belong to SNP, which sets them; legacy commands obey.
    """

    state: PlatformState = PlatformState.UNINIT
    es: bool = False
    api_major: int = API_MAJOR
    api_minor: int = API_MINOR
    build: int = BUILD_ID
    chip_key: bytes = b""
    """The chip's unique secret, from which the CEK and the storage keys derive."""
    second_chip_key: bytes = b""
    """That of the second socket; empty when there is none."""
    spi: bytes = b""
    """What the SPI flash holds of the platform's keys; empty: erased."""
    nv_spa: int = 0
    """Where INIT_EX keeps them instead; 0: the SPI flash."""
    identity: Identity = new(Identity)
    guests: StateDict[int, Gctx] = new(StateDict)
    tmr: Tmr = new(Tmr)
    ring: Ring = new(Ring)
    ccxs: StateDict[int, Ccx] = new(StateDict)
    cores_per_ccx: int = 1
    max_asid: int = 0
    min_asid: int = 0
    """Least ASID of a guest without SEV-ES."""
    snp_initialised: bool = False
    rmp_initialised: bool = False
    rmp: tuple[int, int] = (0, 0)
    """First byte and length of the RMP, which no command reaches by an address."""


def sev_state(machine: Machine) -> SevState:
    """The state of the plugin in `machine`."""
    return machine.components["sev"]  # type: ignore[return-value]  # cast would cost a call for each command
