"""One scripted guest in every protection and every ABI: what works, what fails, and what Xen gets to see.

It finds Xen, maps shared_info, writes to its console, connects an event channel and sends on it, grants a page that
the other domain copies, and sets a timer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import AdvanceClock, CpuExit, Data, Done, MemoryRead, Party, Space
from sevlab.core.memory import guest_tag
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.plugins import sev, sev_es
from sevlab.plugins.xen import (
    Abi,
    ConsoleInput,
    ConsoleOutput,
    Errno,
    Evtchnop,
    Gnttabop,
    Memop,
    Nr,
    Schedop,
    Vcpuop,
    XenGuest,
    XenstoreClient,
    XsType,
    enter_long_mode,
    hypercall_page,
    xen,
)
from sevlab.plugins.xen.layout import FifoControlBlock, VcpuInfo, XenstoreInterface
from sevlab.plugins.xen.numbers import ABI_FLAG, Domid, MapSpace, Param, Version, Virq
from sevlab.plugins.xen.xenstore.wire import XsError, message

from tests.plugins.xen.world import BOUNCE, FRAMES, INFO, PAGE

MEMORY = 4 << 20
SHARED = (BOUNCE, MEMORY - 0x4000)
"""Addresses in the two halves of memory: all 2 MiB pages are mapped shared, the script says which pages are private."""
SECRET_GPA, SECRET = 0x90000, b"nobody but the guest may read this"
GHCB, CONTROL, ARRAY = 0x50000, 0x60000, 0x61000
OTHER = 2


class Variant(NamedTuple):
    """How a guest is protected, and the plugins that do it."""

    name: str
    plugins: tuple[str, ...]
    policy: int | None
    handler: bool = False
    """VMMCALL by the reference guest's #VC handler; else the script writes the GHCB itself."""
    snp: bool = False

    @property
    def encrypted(self) -> bool:
        return self.snp or self.policy is not None

    @property
    def es(self) -> bool:
        return self.snp or bool(self.policy)


VARIANTS = (
    Variant("plain", ("sme", "sev", "sev_es"), None),
    Variant("sev", ("sme", "sev", "sev_es"), 0),
    Variant("sev_es", ("sme", "sev", "sev_es"), sev.Policy.ES),
    Variant("handler", ("sme", "sev", "sev_es"), sev.Policy.ES, handler=True),
    Variant("snp", ("sme", "sev", "sev_es", "snp"), None, handler=True, snp=True),
)
ES = VARIANTS[2]
ABIS = ((Abi.LEGACY, "none"), (Abi.PHYSICAL, "physical"), (Abi.FAST, "fast"))


class World(NamedTuple):
    machine: object
    guest: XenGuest
    other: XenGuest
    encrypted: bool
    protected: bool
    """An RMP keeps others from writing."""


def world(variant, abi, option):
    """The guest under test is domain 1; domain 2 is plain, and calls with the legacy ABI."""
    config = tuple(GuestConfig(name=name, memory_bytes=MEMORY) for name in ("guest", "other"))
    es = {"guest": "linux" if variant.handler else "none", "features": int(variant.snp)}
    options = {"xen": {"abi": option, "start": "long"}, "sev_es": es}
    machine = make_machine(*variant.plugins, "io", "xen", guests=config, options=options, memory_bytes=64 << 20)
    transport: Callable | None = None
    convert: Callable | None = None
    if variant.snp:
        convert = launch_snp(machine)
    elif variant.encrypted:
        vmsas = [sev_es.initial_vmsa(vcpu_signature=0xA0_0F11)] if variant.es else []
        sev.launch_guest(machine, 0, policy=variant.policy, loads={0: bytes(4096)}, vmsas=vmsas)
        if variant.es:
            sev_es.set_up_vcpus(machine, 0)
            machine.hypervisor.enter(machine, machine.vcpus[0])
    if variant.handler:
        assert Done() in machine.apply(sev_es.GuestSetup(0, GHCB)).records
    elif variant.es:
        transport = ghcb_transport(machine)
    if variant.encrypted:
        enter_long_mode(machine, machine.vcpus[0], shared=(0, *SHARED))
    guest = XenGuest(machine, 0, abi=abi, bounce_gpa=BOUNCE, transport=transport, convert=convert)
    other = XenGuest(machine, 1, bounce_gpa=BOUNCE)
    guest.write(SECRET_GPA, SECRET, private=variant.encrypted)
    return World(machine, guest, other, variant.encrypted, variant.snp)


def launch_snp(machine):
    """Everything that the script touches is launched private; what it shares it converts itself: it rescinds the page
    and asks by a page state change. Frames where Xen maps pages of its own are left out, and so are the rings.
    """
    from sevlab.plugins import snp
    from sevlab.plugins.snp import driver
    from sevlab.plugins.snp.launch_digest import PageType
    from sevlab.plugins.snp.records import SetPages
    from sevlab.plugins.snp.rmp import state_of

    guest = driver.begin_launch(machine, 0)
    tables = range(MEMORY - 0x8000, MEMORY - 0x5000, 4096)
    for gpa in (GHCB, BOUNCE, PAGE, CONTROL, ARRAY, SECRET_GPA, *tables):
        assert driver.load(machine, 0, guest, driver.LaunchPage(gpa, PageType.ZERO)) == 0
    driver.load_vmsa(machine, 0, guest, sev_es.initial_vmsa("qemu", sev_features=1))
    driver.finish(machine, guest)
    machine.hypervisor.enter(machine, machine.vcpus[0])

    def convert(gpa):
        spa = machine.hypervisor.vms[0].memory_spa + gpa
        assert state_of(machine, spa) is snp.PageState.GUEST_VALID
        assert Done() in machine.apply(SetPages(0, gpa, 1, 0, False)).records
        assert state_of(machine, spa) is snp.PageState.HYPERVISOR

    convert(GHCB)
    return convert


def ghcb_transport(machine):
    """VMMCALL by the NAE event: the registers go through the GHCB with their valid bits, and come back so."""

    def transport(rax, registers):
        page = sev_es.Ghcb.build(
            sw_exit_code=0x81, sw_exit_info_1=0, sw_exit_info_2=0, protocol_version=2, rax=rax, cpl=0, **registers
        )
        machine.apply(sev_es.Vmgexit(0, GHCB, page))
        outcome = machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, GHCB, False, 4096))
        reply = sev_es.Ghcb.from_bytes(outcome.first(Data).data)
        assert reply.sw_exit_info_1 == 0, f"{reply.sw_exit_info_2:#x}"
        return {name: getattr(reply, name) for name in ("rax", *registers, "rsi", "r8", "r9", "r10", "r11", "r12")
                if reply.is_valid(name)}  # fmt: skip

    return transport


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def variant(request):
    return request.param


@pytest.fixture(params=ABIS, ids=lambda abi: abi[0].value)
def made(request, variant):
    abi, option = request.param
    return world(variant, abi, option)


def works(made):
    """Whether calls with a buffer work: not with linear addresses from an encrypted guest."""
    return made.guest.abi is not Abi.LEGACY or not made.encrypted


def test_discovery_is_the_same_for_all(made):
    answer = made.machine.cpuid(made.machine.vcpus[0], 0x4000_0004, 0)
    assert bool(answer[0] & 1 << 7) == (made.guest.abi is not Abi.LEGACY)
    assert answer[2] == 1


def test_registers_alone_work_in_every_variant_and_abi(made):
    guest = made.guest
    fast = ABI_FLAG if guest.abi is Abi.FAST else 0
    assert guest.call(Nr.XEN_VERSION | fast, Version.VERSION, 0) == 4 << 16 | 17
    assert guest.call(Nr.SET_TIMER_OP, 5_000_000) == 0
    assert xen(made.machine).domains[1].vcpus[0].singleshot == 5_000_000
    assert guest.call(Nr.SCHED_OP | fast, Schedop.YIELD, 0) == 0
    assert guest.call(99) == -Errno.ENOSYS


def expect(made, result):
    assert result == (0 if works(made) else -Errno.EFAULT)


def test_events_reach_the_guest_by_a_mapped_shared_info(made):
    """FastABI as described maps no page of Xen's: such a guest uses a vcpu_info of its own and FIFO channels."""
    guest, other = made.guest, made.other
    if guest.abi is Abi.FAST:
        guest.abi = Abi.LEGACY  # the only other one that the host has
        expected = 0 if not made.encrypted else -Errno.EFAULT
        assert guest.map_page(MapSpace.SHARED_INFO, 0, INFO) == expected
        return
    expect(made, guest.map_page(MapSpace.SHARED_INFO, 0, INFO))
    expect(made, guest.set_callback_vector(0xF3))
    answer = guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=OTHER)
    expect(made, answer.result)
    if not works(made):
        return
    port = answer.fields["port"]
    bound = other.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_INTERDOMAIN, remote_dom=1, remote_port=port)
    assert bound.result == 0
    guest.acknowledge(INFO)
    assert other.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, port=bound.fields["local_port"]).result == 0
    assert guest.pending(INFO) == {port}
    assert guest.number(INFO, 1) == 1
    assert guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, port=port).result == 0


def test_events_reach_the_guest_by_pages_of_its_own(made):
    guest, other = made.guest, made.other
    for gpa in (PAGE, CONTROL, ARRAY):
        guest.share(gpa)
    expect(made, guest.invoke(Nr.VCPU_OP, Vcpuop.REGISTER_VCPU_INFO, on=0, mfn=PAGE >> 12, page_offset=0).result)
    expect(
        made,
        guest.invoke(
            Nr.EVENT_CHANNEL_OP, Evtchnop.INIT_CONTROL, control_gfn=CONTROL >> 12, page_offset=0, vcpu=0
        ).result,
    )
    expect(made, guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.EXPAND_ARRAY, array_gfn=ARRAY >> 12).result)
    answer = guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=OTHER)
    expect(made, answer.result)
    if not works(made):
        return
    port = answer.fields["port"]
    bound = other.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_INTERDOMAIN, remote_dom=1, remote_port=port)
    guest.write(PAGE, b"\0")
    assert other.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, port=bound.fields["local_port"]).result == 0
    assert guest.number(ARRAY + port * 4) >> 31
    assert FifoControlBlock.from_bytes(guest.read(CONTROL, 72)).head[7] == port
    assert VcpuInfo.from_bytes(guest.read(PAGE, 64)).evtchn_upcall_pending == 1


def test_the_console_ring_needs_only_the_notification(made):
    guest = made.guest
    if not works(made):
        assert guest.param(Param.CONSOLE_PFN) == -Errno.EFAULT
        return
    assert guest.console_write(b"hello from the guest") == 0
    assert xen(made.machine).domains[1].console_output == b"hello from the guest"
    assert made.machine.apply(ConsoleInput(1, b"x")).first(ConsoleOutput).data == b""  # it has been taken


def test_xenstore_answers_through_its_shared_ring(made):
    if not works(made):
        return
    client = XenstoreClient(made.guest)
    assert client.ask(XsType.WRITE, "data/hello", value=b"from an encrypted guest")[0] == XsType.WRITE
    assert client.ask(XsType.READ, "data/hello") == (XsType.READ, b"from an encrypted guest")


def test_a_xenstore_ring_in_a_private_page_is_ciphertext_to_the_daemon(made):
    if not made.encrypted or made.protected or not works(made):
        pytest.skip("an encrypted guest that can send an event, and a page that it may turn private alone")
    guest, ring = made.guest, made.guest.param(Param.STORE_PFN) << 12
    guest.write(ring, message(XsType.READ, b"name\0"), private=True)
    guest.write(ring + 2048, (0).to_bytes(4, "little") + (21).to_bytes(4, "little") + bytes(24), private=True)
    guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, port=guest.param(Param.STORE_EVTCHN))
    assert xen(made.machine).xenstore.connections[1].ignored
    assert guest.number(ring + XenstoreInterface.FIELDS["error"].offset) == XsError.RINGIDX
    assert b"name" not in guest.read(ring, 64)


def test_a_granted_page_is_copied_by_the_other_domain(made):
    guest, other = made.guest, made.other
    if guest.abi is Abi.FAST:
        assert guest.call(Nr.GRANT_TABLE_OP | ABI_FLAG, Gnttabop.SETUP_TABLE) == -Errno.ENOSYS
        return
    expect(made, guest.map_page(MapSpace.GRANT_TABLE, 0, FRAMES))
    if not works(made):
        return
    guest.share(PAGE)
    guest.write(PAGE, b"shared on purpose")
    guest.grant(FRAMES, 8, OTHER, PAGE, readonly=True)
    fields = {"source": 8, "source_domid": 1, "dest": 0x40, "dest_domid": Domid.SELF, "len": 4096, "flags": 1}
    assert other.grant_copy(**fields) == (0, [0])
    assert other.read(0x40000, 17) == b"shared on purpose"


def test_a_timer_fires_with_the_abi_that_the_guest_has(made):
    guest = made.guest
    expect(made, guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_VIRQ, virq=Virq.TIMER, vcpu=0).result)
    expect(made, guest.invoke(Nr.VCPU_OP, Vcpuop.SET_SINGLESHOT_TIMER, on=0, timeout_abs_ns=1_000_000).result)
    made.machine.apply(AdvanceClock(3_000_000))
    domain = xen(made.machine).domains[1]
    pending = int.from_bytes(made.machine.memory.read(domain.shared_info_spa + 2048, 8, None), "little")
    assert bool(pending) == works(made)


def test_private_bytes_never_reach_xen_or_another_domain(made):
    """A private buffer is read as ciphertext and written as garbage; a private page that is granted copies garbage."""
    if not made.encrypted or made.guest.abi is not Abi.PHYSICAL:
        pytest.skip("only a physical address can name a private page")
    guest, other, machine = made.guest, made.other, made.machine
    result = guest.call(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, SECRET_GPA)
    assert result == -Errno.EINVAL  # a port of ciphertext
    guest.map_page(MapSpace.GRANT_TABLE, 0, FRAMES)
    guest.grant(FRAMES, 8, OTHER, SECRET_GPA)
    fields = {"source": 8, "source_domid": 1, "dest": 0x40, "dest_domid": Domid.SELF, "len": 4096, "flags": 1}
    assert other.grant_copy(**fields) == (0, [0])
    copied = other.read(0x40000, 4096)
    assert copied != bytes(4096)
    assert SECRET[:16] not in copied
    assert guest.read(SECRET_GPA, len(SECRET), private=True) == SECRET
    if made.protected:  # the RMP lets nobody else write there
        assert guest.call(Nr.XEN_VERSION, Version.EXTRAVERSION, SECRET_GPA) == -Errno.EFAULT
        assert guest.read(SECRET_GPA, len(SECRET), private=True) == SECRET
        return
    assert guest.call(Nr.XEN_VERSION, Version.EXTRAVERSION, SECRET_GPA) == 0
    assert guest.read(SECRET_GPA, 16, private=True) not in (SECRET[:16], b".7".ljust(16, b"\0"))
    assert guest.read(SECRET_GPA + 16, 16, private=True) == SECRET[16:32]
    secret_spa = machine.hypervisor.vms[0].memory_spa + SECRET_GPA
    assert machine.memory.tags(secret_spa + 16, 16) == bytes((guest_tag(0),)) * 16


def test_a_hypercall_page_that_xen_wrote_is_garbage_to_an_encrypted_guest(variant):
    made = world(variant, Abi.LEGACY, "none")
    if variant.es:
        page = sev_es.Ghcb.build(
            sw_exit_code=0x7C,
            sw_exit_info_1=1,
            sw_exit_info_2=0,
            protocol_version=2,
            rcx=0x4000_0000,
            rax=0x70000,
            rdx=0,
        )
        reply = made.machine.apply(sev_es.Vmgexit(0, GHCB, page)).first(sev_es.GhcbReply)
        assert (reply.info_1, reply.info_2) == (0, 0)
    else:
        regs = made.machine.vcpus[0].regs
        regs.rcx, regs.rax, regs.rdx = 0x4000_0000, 0x70000, 0
        made.machine.apply(CpuExit(0, ExitCode.MSR, 1, 0, b"\x0f\x30", 0))
    assert made.guest.read(0x70000, 4096) == hypercall_page()
    if variant.snp:
        with pytest.raises(FaultUnwind) as fetch:  # a fetch is private, and the RMP gives the page to nobody
            made.machine.access.guest_read(made.machine.vcpus[0], 0x70000, 16, 1 << 1)
        assert fetch.value.fault.vector == ExitCode.NPF
        return
    fetched = made.machine.access.guest_read(made.machine.vcpus[0], 0x70000, 16, 1 << 1)
    assert (fetched == hypercall_page()[:16]) == (not variant.encrypted)


def test_the_ghcb_says_which_registers_it_misses():
    made = world(ES, Abi.PHYSICAL, "physical")

    def vmgexit(**registers):
        page = sev_es.Ghcb.build(sw_exit_code=0x81, sw_exit_info_1=0, sw_exit_info_2=0, protocol_version=2, **registers)
        reply = made.machine.apply(sev_es.Vmgexit(0, GHCB, page)).first(sev_es.GhcbReply)
        return reply.info_1, reply.info_2, reply.rax

    assert vmgexit(rax=17, cpl=0, rdi=0, rsi=0) == (0, 0, 4 << 16 | 17)
    assert vmgexit(rax=17, cpl=0, rdi=0)[:2] == (2, 4)
    assert vmgexit(rax=17, rdi=0, rsi=0)[:2] == (2, 4)
    assert vmgexit(cpl=0, rdi=0, rsi=0)[:2] == (2, 4)
    assert vmgexit(rax=17, cpl=3, rdi=0, rsi=0) == (0, 0, (1 << 64) - Errno.EPERM)


@pytest.mark.parametrize("variant", VARIANTS[2:], ids=lambda variant: variant.name)
def test_fastabi_returns_its_registers_through_the_ghcb(variant):
    made = world(variant, Abi.FAST, "fast")
    answer = made.guest.invoke(Nr.XEN_VERSION, Version.GET_FEATURES, submap_idx=0)
    assert (answer.result, answer.fields["submap"] >> 8 & 1) == (0, 1)
    port = made.guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_IPI, vcpu=0).fields["port"]
    assert made.guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.STATUS, dom=Domid.SELF, port=port).fields["status"] == 5


@pytest.mark.parametrize("variant", VARIANTS[2:], ids=lambda variant: variant.name)
def test_a_preempted_call_of_an_encrypted_guest_is_finished_for_it(variant):
    made = world(variant, Abi.PHYSICAL, "physical")
    from sevlab.plugins.xen.arguments import MemoryReservation

    guest = made.guest
    guest.share(PAGE)
    guest.write(PAGE, b"".join((0x200 + n).to_bytes(8, "little") for n in range(100)))
    guest.write(BOUNCE, MemoryReservation.build(extent_start=PAGE, nr_extents=100, domid=Domid.SELF))
    assert guest.call(Nr.MEMORY_OP, Memop.DECREASE_RESERVATION, BOUNCE) == 100
