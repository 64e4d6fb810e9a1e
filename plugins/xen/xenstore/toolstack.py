"""The control domain's side: what is in the tree when a guest starts, and the requests of its toolstack.

Source: Xen tools/libs/light/libxl_create.c (libxl__domain_make), libxl_dom.c (libxl__build_post), libxl_console.c;
tools/xenstored/core.c (setup_structure). Which values are in the names: docs/misc/xenstore-paths.pandoc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.xen.numbers import Domid, Param
from sevlab.plugins.xen.state import Domain, xen
from sevlab.plugins.xen.xenstore.requests import carry_out
from sevlab.plugins.xen.xenstore.ring import deliver, open_ring, page_spa
from sevlab.plugins.xen.xenstore.store import READ, TOOLSTACK, Connection, Node, Perm, View, Xenstore
from sevlab.plugins.xen.xenstore.watches import fire_special
from sevlab.plugins.xen.xenstore.wire import raw

if TYPE_CHECKING:
    from sevlab.core.hypervisor import Vm
    from sevlab.core.machine import Machine

KIB = 1024
CONSOLE_LIMIT = 1_048_576
"""Bytes that the console daemon keeps. Source: libxl_internal.h, LIBXL_XENCONSOLE_LIMIT."""
OWN = (
    "device/suspend/event-channel",
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/feature-s3",
    "control/feature-s4",
    "control/sysrq",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
)
"""Names that the guest may write; all others of its own it may only read."""


def empty() -> Xenstore:
    """A daemon that has just started."""
    nobody = (Perm(0, 0),)
    store = Xenstore()
    store.nodes.update(
        {
            "/": Node(nobody, b"", ("tool",)),
            "/tool": Node(nobody, b"", ("xenstored",)),
            "/tool/xenstored": Node(nobody),
            "@releaseDomain": Node((*nobody, Perm(READ, Domid.ANY))),
            "@introduceDomain": Node(nobody),
        }
    )
    store.connections[TOOLSTACK] = Connection(domid=TOOLSTACK, privileged=True)
    return store


def introduce(machine: Machine, vm: Vm, domain: Domain) -> None:
    """Write a guest's names as the toolstack does, and serve its ring."""
    store = xen(machine).xenstore
    if not store.nodes:
        xen(machine).xenstore = store = empty()
    view, domid = View(store, store.connections[TOOLSTACK], None), domain.domid
    read_only, own = (Perm(0, 0), Perm(READ, domid)), (Perm(0, domid),)
    home, uuid = f"/local/domain/{domid}", f"/vm/00000000-0000-0000-0000-{domid:012}"
    for path in (home, uuid):
        _make(view, path, read_only)
    for name in ("cpu", "memory", "device", "control", "hvmloader"):
        _make(view, f"{home}/{name}", read_only)
    for name in OWN:
        _make(view, f"{home}/{name}", own)
    values = {
        f"{home}/vm": uuid,
        f"{home}/name": vm.name,
        f"{home}/domid": str(domid),
        f"{home}/control/platform-feature-multiprocessor-suspend": "1",
        f"{home}/control/platform-feature-xs_reset_watches": "1",
        f"{home}/memory/static-max": str(vm.memory_bytes // KIB),
        f"{home}/memory/target": str(vm.memory_bytes // KIB),
        f"{home}/memory/videoram": "0",
        f"{home}/store/port": str(domain.params.get(Param.STORE_EVTCHN, 0)),
        f"{home}/store/ring-ref": str(domain.params.get(Param.STORE_PFN, 0)),
        f"{home}/console/port": str(domain.params.get(Param.CONSOLE_EVTCHN, 0)),
        f"{home}/console/ring-ref": str(domain.params.get(Param.CONSOLE_PFN, 0)),
        f"{home}/console/type": "xenconsoled",
        f"{home}/console/limit": str(CONSOLE_LIMIT),
        f"{home}/console/output": "pty",
        f"{home}/console/tty": "",
        f"{uuid}/uuid": uuid[len("/vm/") :],
        f"{uuid}/name": vm.name,
    }
    values |= {f"{home}/cpu/{vcpu.index}/availability": "online" for vcpu in domain.vcpus}
    for path, value in values.items():
        _make(view, path, None, raw(value))
    store.connections[domid] = Connection(domid=domid, privileged=domain.is_control)
    spa = page_spa(machine, domain)
    if spa is not None:
        open_ring(machine, spa)


def _make(view: View, path: str, perms: tuple[Perm, ...] | None, value: bytes = b"") -> None:
    """A node with these permissions, or those of its parent."""
    if view.node(path) is None:
        view.create(path, value)
    node = view.node(path)
    assert node is not None  # just made
    view.put(path, node._replace(value=value, perms=perms or node.perms))


def request(machine: Machine, kind: int, payload: bytes, tx_id: int = 0) -> tuple[int, bytes]:
    """(type, payload) of the reply to a message of the toolstack; those that watch are told."""
    state = xen(machine)
    connection = state.xenstore.connections[TOOLSTACK]
    reply = carry_out(state.xenstore, connection, state.domains, kind, payload, tx_id)
    connection.outgoing = ()  # nobody reads the toolstack's own events
    deliver(machine)
    return int(reply[0]), reply[1]


def released(machine: Machine, domid: int) -> None:
    """A domain has shut down: those that watch @releaseDomain are told."""
    fire_special(xen(machine).xenstore, "@releaseDomain", domid)
    deliver(machine)
