"""Event channels of two domains against a naive model: results, states and pending bits after every call."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.plugins.xen import Errno, Evtchnop, Nr, xen
from sevlab.plugins.xen.numbers import Domid
from sevlab.plugins.xen.state import ChannelState

from tests.plugins.xen.world import guest_of, machine_of

PENDING_AT, PENDING_BYTES = 2048, 512
DOMAINS = (1, 2)


class Naive:
    """What each port is, and which are pending; ports 1 and 2 lead to xenstore and the console, in domain 0."""

    def __init__(self):
        self.ports = {(domid, port): ("connected", 0, 14 + 2 * domid + port) for domid in DOMAINS for port in (1, 2)}
        self.pending = set()

    def free(self, domid):
        return next(port for port in range(1, 1024) if (domid, port) not in self.ports)

    def alloc(self, domid, remote, _port):
        port = self.free(domid)
        self.ports[domid, port] = ("unbound", remote)
        return port

    def bind(self, domid, remote, far):
        if remote not in DOMAINS:
            return -Errno.ESRCH
        if self.ports.get((remote, far)) != ("unbound", domid):
            return -Errno.EINVAL
        port = self.free(domid)
        self.ports[domid, port] = ("connected", remote, far)
        self.ports[remote, far] = ("connected", domid, port)
        self.pending.add((domid, port))
        return port

    def ipi(self, domid, _remote, _port):
        port = self.free(domid)
        self.ports[domid, port] = ("ipi",)
        return port

    def close(self, domid, _remote, port):
        what = self.ports.pop((domid, port), None)
        if what is None:
            return -Errno.EINVAL
        if what[0] == "connected" and what[1]:
            self.ports[what[1:]] = ("unbound", domid)
        self.pending.discard((domid, port))
        return 0

    def send(self, domid, _remote, port):
        what = self.ports.get((domid, port))
        if what is None:
            return -Errno.EINVAL
        if what[0] == "connected" and what[1]:
            self.pending.add(what[1:])
        elif what[0] == "ipi":
            self.pending.add((domid, port))
        return 0


def carry_out(guest, name, remote, port):
    """The call itself: a port, 0, or an error."""
    command, fields, output = {
        "alloc": (Evtchnop.ALLOC_UNBOUND, {"dom": Domid.SELF, "remote_dom": remote}, "port"),
        "bind": (Evtchnop.BIND_INTERDOMAIN, {"remote_dom": remote, "remote_port": port}, "local_port"),
        "ipi": (Evtchnop.BIND_IPI, {"vcpu": 0}, "port"),
        "close": (Evtchnop.CLOSE, {"port": port}, None),
        "send": (Evtchnop.SEND, {"port": port}, None),
    }[name]
    answer = guest.invoke(Nr.EVENT_CHANNEL_OP, command, **fields)
    return answer.fields[output] if output and answer.result == 0 else answer.result


def found(machine):
    """(what each port is, what is pending) in the machine, in the model's words."""
    ports, pending = {}, set()
    for domid in DOMAINS:
        domain = xen(machine).domains[domid]
        for port, channel in domain.channels.items():
            ports[domid, port] = {
                ChannelState.UNBOUND: ("unbound", channel.remote_domid),
                ChannelState.INTERDOMAIN: ("connected", channel.remote_domid, channel.remote_port),
                ChannelState.IPI: ("ipi",),
            }[channel.state]
        data = machine.memory.read(domain.shared_info_spa + PENDING_AT, PENDING_BYTES, None)
        bits = int.from_bytes(data, "little")
        pending |= {(domid, port) for port in range(bits.bit_length()) if bits >> port & 1}
    return ports, pending


@cache
def world():
    machine = machine_of(memory_bytes=1 << 20)
    guests = {domid: guest_of(machine, domid - 1) for domid in DOMAINS}
    machine.mark()
    return machine, guests


def aim(model, name, domid, remote, number):
    """(remote domain, port) of a step: mostly something that exists, sometimes whatever the numbers say."""
    if name == "bind":
        there = [key for key, what in sorted(model.ports.items()) if what == ("unbound", domid)]
    else:
        there = [key for key in sorted(model.ports) if key[0] == domid]
    if name in ("bind", "close", "send") and there and number % 4:
        key = there[-1 - number % len(there)]
        return key if name == "bind" else (remote, key[1])
    return remote, number


steps = st.tuples(
    st.sampled_from(DOMAINS),
    st.sampled_from(("alloc", "alloc", "bind", "bind", "ipi", "close", "close", "send")),
    st.sampled_from((1, 2, 1, 2, 3)),
    st.integers(0, 15),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(steps, max_size=25))
def test_channels_do_what_a_naive_model_does(sequence):
    machine, guests = world()
    machine.reset()
    model = Naive()
    for domid, name, other, number in sequence:
        remote, port = aim(model, name, domid, other, number)
        expected = getattr(model, name)(domid, remote, port)
        assert carry_out(guests[domid], name, remote, port) == expected, (domid, name, remote, port)
        assert found(machine) == (model.ports, model.pending)
