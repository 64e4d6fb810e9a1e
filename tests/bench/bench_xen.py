"""Hypercalls: a no-op, an event, a copied page, a multicall; each as the guest's VMMCALL at `Machine.apply`."""

from __future__ import annotations

from sevlab.core.events import CpuExit, SetRegisters
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine
from sevlab.plugins.xen import Evtchnop, Gnttabop, Nr, XenGuest
from sevlab.plugins.xen.arguments import GrantCopy, Port
from sevlab.plugins.xen.layout import MulticallEntry
from sevlab.plugins.xen.numbers import Domid, MapSpace, Version

from tests.bench.harness import Bench, Row

BOUNCE, FRAMES, GRANTED, INFO = 0x10000, 0x21000, 0x30000, 0x20000
ENTRIES = 32
VMMCALL = CpuExit(0, ExitCode.VMMCALL, 0, 0, b"\x0f\x01\xd9", 0)


def machine_of():
    machine = make_machine("io", "xen", guests=2, options={"xen": {"start": "long", "preempt_after": 1 << 20}})
    return machine, XenGuest(machine, 0, bounce_gpa=BOUNCE), XenGuest(machine, 1, bounce_gpa=BOUNCE)


def calls(bench: Bench) -> list[Row]:
    machine, guest, other = machine_of()
    regs = machine.vcpus[0].regs

    def call(number, *args):
        """The guest has its registers already; the exit alone is timed, as for every other exit."""
        regs.rax = number
        regs.rdi, regs.rsi, regs.rdx = (*args, 0, 0, 0)[:3]
        machine.apply(VMMCALL)

    registers = bench(lambda: call(200))
    nothing = bench(lambda: call(Nr.XEN_VERSION, Version.VERSION))

    unbound = other.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=1)
    bound = guest.invoke(
        Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_INTERDOMAIN, remote_dom=2, remote_port=unbound.fields["port"]
    )
    guest.write(BOUNCE, Port.build(port=bound.fields["local_port"]))
    send = bench(lambda: call(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, BOUNCE))

    other.map_page(MapSpace.GRANT_TABLE, 0, FRAMES)
    other.write(GRANTED, bytes(range(256)) * 16)
    other.grant(FRAMES, 8, 1, GRANTED)
    fields = {"source": 8, "source_domid": 2, "dest": 0x40, "dest_domid": Domid.SELF, "len": 4096, "flags": 1}
    guest.write(BOUNCE, GrantCopy.build(**fields))
    copy = bench(lambda: call(Nr.GRANT_TABLE_OP, Gnttabop.COPY, BOUNCE, 1))
    assert guest.read(0x40000, 4096) == bytes(range(256)) * 16

    guest.write(BOUNCE, MulticallEntry.build(op=Nr.XEN_VERSION) * ENTRIES)
    many = bench(lambda: call(Nr.MULTICALL, BOUNCE, ENTRIES), bench.number // ENTRIES + 1)
    step = SetRegisters(0, (("rax", 17), ("rdi", 0)))
    return [
        (
            "hypercall that does not exist, to a register step",
            registers / bench(lambda: machine.apply(step)),
            f"{registers:.2f} us",
        ),
        ("xen_version, to a hypercall that does not exist", nothing / registers, f"{nothing:.2f} us (target 5)"),
        ("event to another domain, to xen_version", send / nothing, f"{send:.2f} us (target 8)"),
        ("grant copy of a page, to xen_version", copy / nothing, f"{copy:.2f} us (target 30)"),
        ("multicall of 32, to 32 calls (target 0.7)", many / (ENTRIES * nothing), f"{many:.1f} us"),
    ]


GROUPS = (calls,)
