"""xenstored through a guest's ring: the tree, permissions, watches, transactions, quotas, and rings that are broken."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.plugins.xen import Evtchnop, Nr, XenstoreClient, XenstoreReply, XenstoreRequest, XsType, xen
from sevlab.plugins.xen.layout import XenstoreInterface
from sevlab.plugins.xen.numbers import Domid, Param, Schedop
from sevlab.plugins.xen.xenstore.wire import joined, message

from tests.plugins.xen.world import guest_of, machine_of

OK = b"OK\0"
HOME = "/local/domain/1"


@pytest.fixture
def machine():
    return machine_of(memory_bytes=4 << 20)


@pytest.fixture
def store(machine):
    return XenstoreClient(guest_of(machine))


def error(name):
    return XsType.ERROR, name.encode() + b"\0"


def toolstack(machine, kind, *parts, value=b""):
    return tuple(machine.apply(XenstoreRequest(kind, joined(parts) + value, 0)).first(XenstoreReply))


# The tree ---------------------------------------------------------------------------------------------------------


def test_a_guest_finds_what_the_toolstack_wrote(store):
    assert store.ask(XsType.READ, "domid") == (XsType.READ, b"1")
    assert store.ask(XsType.READ, f"{HOME}/name") == (XsType.READ, b"guest0")
    assert store.ask(XsType.DIRECTORY, "store") == (XsType.DIRECTORY, b"port\0ring-ref\0")
    assert store.ask(XsType.GET_DOMAIN_PATH, "7") == (XsType.GET_DOMAIN_PATH, b"/local/domain/7\0")


def test_write_makes_what_is_missing_above_and_the_guest_owns_it(store):
    assert store.ask(XsType.WRITE, "data/a/b", value=b"1\0two") == (XsType.WRITE, OK)
    assert store.ask(XsType.READ, "data/a/b") == (XsType.READ, b"1\0two")
    assert store.ask(XsType.READ, "data/a") == (XsType.READ, b"")
    assert store.ask(XsType.GET_PERMS, "data/a/b") == (XsType.GET_PERMS, b"n1\0")
    assert store.ask(XsType.MKDIR, "data/a/b") == (XsType.MKDIR, OK)
    assert store.ask(XsType.READ, "data/a/b") == (XsType.READ, b"1\0two")


def test_rm_deletes_everything_below_and_needs_a_parent(store):
    store.ask(XsType.WRITE, "data/a/b/c")
    assert store.ask(XsType.RM, "data/a") == (XsType.RM, OK)
    assert store.ask(XsType.READ, "data/a/b/c") == error("ENOENT")
    assert store.ask(XsType.DIRECTORY, "data") == (XsType.DIRECTORY, b"")
    assert store.ask(XsType.RM, "data/a") == (XsType.RM, OK)
    assert store.ask(XsType.RM, "data/a/b") == error("ENOENT")


def test_a_tree_as_deep_as_a_path_can_be_is_deleted(store):
    deep = "data/" + "/".join(["a"] * 900)
    assert store.ask(XsType.WRITE, deep) == (XsType.WRITE, OK)
    assert store.ask(XsType.RM, "data/a") == (XsType.RM, OK)


@pytest.mark.parametrize("path", ["", "data/", "data//a", "da.ta", "@special", "data/" + "a" * 2043])
def test_what_is_no_path_is_einval(store, path):
    assert store.ask(XsType.WRITE, path, value=b"") == error("EINVAL")


def test_a_path_is_one_byte_shorter_than_its_limit(store):
    assert store.ask(XsType.MKDIR, "data/" + "a" * 2042) == error("ENOSPC")  # a path, and a name longer than a node
    assert store.ask(XsType.MKDIR, "data/" + "a" * 1900) == (XsType.MKDIR, OK)


def test_a_payload_of_no_or_two_strings_is_einval(store):
    assert store.request(XsType.READ, b"data") == error("EINVAL")
    assert store.request(XsType.READ, b"data\0data\0") == error("EINVAL")
    assert store.request(XsType.WRITE, b"data") == error("EINVAL")


def test_directory_part_pages_through_a_long_list(machine, store):
    names = [f"child-{n:04}" for n in range(400)]
    for name in names:
        toolstack(machine, XsType.WRITE, f"{HOME}/data/{name}")
    assert store.ask(XsType.DIRECTORY, "data") == error("E2BIG")
    got, offset = b"", 0
    while not got.endswith(b"\0\0"):
        kind, reply = store.ask(XsType.DIRECTORY_PART, "data", value=str(offset).encode() + b"\0")
        assert kind == XsType.DIRECTORY_PART
        assert len(reply) <= 4096
        part = reply.partition(b"\0")[2]
        got += part
        offset += len(part)
    assert got == joined(names) + b"\0"


# Permissions ------------------------------------------------------------------------------------------------------


def test_a_guest_may_not_write_where_only_the_toolstack_may(store):
    assert store.ask(XsType.WRITE, "name", value=b"x") == error("EACCES")
    assert store.ask(XsType.RM, "cpu") == error("EACCES")
    assert store.ask(XsType.READ, "/tool/xenstored") == error("EACCES")
    assert store.ask(XsType.READ, "/tool/nothing/there") == error("EACCES")  # it may not know that there is none
    assert store.ask(XsType.WRITE, "/local/domain/2/data/x") == error("EACCES")


def test_the_owner_lets_others_in(machine, store):
    other = XenstoreClient(guest_of(machine, 1))
    store.ask(XsType.WRITE, "data/x", value=b"for two")
    assert other.ask(XsType.READ, f"{HOME}/data/x") == error("EACCES")
    assert store.ask(XsType.SET_PERMS, "data/x", "n1", "r2") == (XsType.SET_PERMS, OK)
    assert other.ask(XsType.READ, f"{HOME}/data/x") == (XsType.READ, b"for two")
    assert other.ask(XsType.WRITE, f"{HOME}/data/x", value=b"") == error("EACCES")
    assert other.ask(XsType.SET_PERMS, f"{HOME}/data/x", "n2") == error("EACCES")
    assert store.ask(XsType.GET_PERMS, "data/x") == (XsType.GET_PERMS, b"n1\0r2\0")


def test_a_node_is_not_given_away(store):
    store.ask(XsType.MKDIR, "data/x")
    assert store.ask(XsType.SET_PERMS, "data/x", "n2") == error("EPERM")
    assert store.ask(XsType.SET_PERMS, "data/x", "n9") == error("ENOENT")
    assert store.ask(XsType.SET_PERMS, "data/x", "x1") == error("EINVAL")
    assert store.ask(XsType.SET_PERMS, "data/x") == error("EINVAL")
    assert store.ask(XsType.SET_PERMS, "data/x", "n1", *["r2"] * 3) == (XsType.SET_PERMS, OK)
    assert store.ask(XsType.SET_PERMS, "data/x", "n1", *["r2"] * 4) == error("ENOSPC")


@pytest.mark.parametrize(
    "kind",
    [
        XsType.INTRODUCE,
        XsType.RELEASE,
        XsType.RESUME,
        XsType.SET_TARGET,
        XsType.IS_DOMAIN_INTRODUCED,
        XsType.CONTROL,
        XsType.SET_FEATURE,
        XsType.GET_QUOTA,
        XsType.SET_QUOTA,
    ],
)
def test_what_only_the_toolstack_may_send_is_eacces_for_a_guest(store, kind):
    assert store.ask(kind, "2", "3", "4") == error("EACCES")


@pytest.mark.parametrize("kind", [XsType.WATCH_EVENT, XsType.ERROR, 20, 27, 0xFFFF])
def test_a_message_that_clients_do_not_send_is_enosys(store, kind):
    assert store.request(kind, b"x\0") == error("ENOSYS")


# Watches ----------------------------------------------------------------------------------------------------------


def test_a_watch_fires_at_once_and_at_every_change_below(machine, store):
    assert store.ask(XsType.WATCH, "control", "token") == (XsType.WATCH, OK)
    assert store.collect() == [("control", "token")]
    toolstack(machine, XsType.WRITE, f"{HOME}/control/shutdown", value=b"poweroff")
    assert store.collect() == [("control/shutdown", "token")]
    assert store.ask(XsType.READ, "control/shutdown") == (XsType.READ, b"poweroff")
    assert store.ask(XsType.UNWATCH, "control", "token") == (XsType.UNWATCH, OK)
    assert store.ask(XsType.UNWATCH, "control", "token") == error("ENOENT")
    toolstack(machine, XsType.WRITE, f"{HOME}/control/shutdown", value=b"reboot")
    assert store.collect() == []


def test_the_watcher_is_told_by_its_event_channel(machine, store):
    store.ask(XsType.WATCH, "control", "token")
    domain = xen(machine).domains[1]
    port = domain.params[Param.STORE_EVTCHN]
    machine.memory.write(domain.shared_info_spa + 2048, bytes(8), None, TAG_HYPERVISOR)
    toolstack(machine, XsType.WRITE, f"{HOME}/control/sysrq", value=b"h")
    assert machine.memory.read(domain.shared_info_spa + 2048, 1, None)[0] == 1 << port


def test_a_watch_is_set_once_and_limited_to_its_depth(machine, store):
    assert store.ask(XsType.WATCH, f"{HOME}/data", "t", "1") == (XsType.WATCH, OK)
    assert store.ask(XsType.WATCH, "data", "t") == error("EEXIST")
    assert store.ask(XsType.WATCH, "data", "t", "-1") == error("EINVAL")
    assert store.ask(XsType.WATCH, "data") == error("EINVAL")
    store.collect()
    toolstack(machine, XsType.WRITE, f"{HOME}/data/x/y")
    toolstack(machine, XsType.WRITE, f"{HOME}/data/x")
    assert store.collect() == [(f"{HOME}/data/x", "t")]


def test_a_deleted_parent_is_told_with_the_watched_path(machine, store):
    store.ask(XsType.WRITE, "data/x/y")
    store.ask(XsType.WATCH, "data/x/y", "t")
    store.collect()
    store.ask(XsType.RM, "data/x")
    assert store.collect() == [("data/x/y", "t")]


def test_nobody_is_told_of_what_he_may_not_read(machine, store):
    other = XenstoreClient(guest_of(machine, 1))
    other.ask(XsType.WATCH, "/local/domain/1/data", "t")
    assert len(other.collect()) == 1
    store.ask(XsType.WRITE, "data/x")
    assert other.collect() == []


def test_identical_events_wait_once(machine, store):
    store.ask(XsType.WATCH, "data", "t")
    store.collect()
    poke(machine, "rsp_cons", peek(machine, "rsp_prod") - 1024 & 0xFFFF_FFFF)  # full
    for _ in range(3):
        toolstack(machine, XsType.WRITE, f"{HOME}/data/x")
    assert len(xen(machine).xenstore.connections[1].outgoing) == 1


def test_a_shutdown_is_told_to_those_that_watch_for_it(machine, store):
    assert store.ask(XsType.WATCH, "@releaseDomain", "t") == (XsType.WATCH, OK)
    assert store.ask(XsType.WATCH, "@releaseDomain", "which", "1") == (XsType.WATCH, OK)
    store.collect()
    guest_of(machine, 1).invoke(Nr.SCHED_OP, Schedop.SHUTDOWN, reason=0)
    assert store.collect() == [("@releaseDomain", "t"), ("@releaseDomain/2", "which")]


def test_reset_watches_forgets_watches_and_transactions(machine, store):
    store.ask(XsType.WATCH, "data", "t")
    _, tx_id = store.ask(XsType.TRANSACTION_START, "")
    assert store.ask(XsType.RESET_WATCHES, "") == (XsType.RESET_WATCHES, OK)
    store.collect()
    assert store.ask(XsType.READ, "domid", tx_id=int(tx_id[:-1])) == error("ENOENT")
    toolstack(machine, XsType.WRITE, f"{HOME}/data/x")
    assert store.collect() == []


# Transactions -----------------------------------------------------------------------------------------------------


def start(store):
    kind, reply = store.ask(XsType.TRANSACTION_START, "")
    assert kind == XsType.TRANSACTION_START
    return int(reply[:-1])


def test_a_transaction_is_seen_by_others_when_it_commits(machine, store):
    tx_id = start(store)
    store.ask(XsType.WRITE, "data/x", value=b"1", tx_id=tx_id)
    assert store.ask(XsType.READ, "data/x", tx_id=tx_id) == (XsType.READ, b"1")
    assert store.ask(XsType.READ, "data/x") == error("ENOENT")
    assert store.ask(XsType.TRANSACTION_END, "T", tx_id=tx_id) == (XsType.TRANSACTION_END, OK)
    assert store.ask(XsType.READ, "data/x") == (XsType.READ, b"1")
    assert store.ask(XsType.TRANSACTION_END, "T", tx_id=tx_id) == error("ENOENT")


def test_a_transaction_whose_nodes_changed_is_eagain(machine, store):
    tx_id = start(store)
    store.ask(XsType.READ, "data", tx_id=tx_id)
    toolstack(machine, XsType.WRITE, f"{HOME}/data", value=b"new")
    assert store.ask(XsType.READ, "data", tx_id=tx_id) == (XsType.READ, b"")  # its copy
    store.ask(XsType.WRITE, "data/x", tx_id=tx_id)
    assert store.ask(XsType.TRANSACTION_END, "T", tx_id=tx_id) == error("EAGAIN")
    assert store.ask(XsType.READ, "data/x") == error("ENOENT")


def test_changes_elsewhere_do_not_disturb_a_transaction(machine, store):
    tx_id = start(store)
    store.ask(XsType.WRITE, "data/x", tx_id=tx_id)
    toolstack(machine, XsType.WRITE, f"{HOME}/control/sysrq", value=b"h")
    assert store.ask(XsType.TRANSACTION_END, "T", tx_id=tx_id) == (XsType.TRANSACTION_END, OK)


def test_a_transaction_that_ends_with_f_changes_nothing(store):
    store.ask(XsType.WATCH, "data", "t")
    store.collect()
    tx_id = start(store)
    store.ask(XsType.RM, "data", tx_id=tx_id)
    assert store.ask(XsType.TRANSACTION_END, "F", tx_id=tx_id) == (XsType.TRANSACTION_END, OK)
    assert store.ask(XsType.DIRECTORY, "data") == (XsType.DIRECTORY, b"")
    assert store.collect() == []


def test_watches_fire_when_a_transaction_commits(store):
    store.ask(XsType.WATCH, "data", "t")
    store.collect()
    tx_id = start(store)
    store.ask(XsType.WRITE, "data/x", tx_id=tx_id)
    assert store.collect() == []
    store.ask(XsType.TRANSACTION_END, "T", tx_id=tx_id)
    assert store.collect() == [("data/x", "t")]


def test_transactions_do_not_nest_and_are_limited(store):
    tx_id = start(store)
    assert store.ask(XsType.TRANSACTION_START, "", tx_id=tx_id) == error("EBUSY")
    assert store.ask(XsType.TRANSACTION_START, "", tx_id=tx_id + 1) == error("ENOENT")
    assert store.ask(XsType.TRANSACTION_END, "X", tx_id=tx_id) == error("EINVAL")
    for _ in range(8):
        start(store)
    assert store.ask(XsType.TRANSACTION_START, "") == error("ENOSPC")


# Quotas -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_guest_owns_999_nodes_and_no_more(machine, store):
    made = 0
    while True:
        answer = store.ask(XsType.WRITE, f"data/{made // 100}/{made}")
        if answer != (XsType.WRITE, OK):
            break
        made += 1
    assert answer == error("ENOSPC")
    nodes = xen(machine).xenstore.nodes
    assert sum(node.owner == 1 for node in nodes.values()) == 999
    assert f"{HOME}/data/{made // 100}/{made}" not in nodes


def test_a_node_is_shorter_than_2048_bytes(store):
    room = 2048 - 16 - 8 - 1  # head, one permission, and one byte less than the limit
    assert store.ask(XsType.WRITE, "data/x", value=bytes(room)) == (XsType.WRITE, OK)
    assert store.ask(XsType.WRITE, "data/x", value=bytes(room + 1)) == error("ENOSPC")
    assert store.ask(XsType.READ, "data/x") == (XsType.READ, bytes(room))


def test_a_guest_has_127_watches(store):
    for number in range(127):
        assert store.ask(XsType.WATCH, "data", f"{number}") == (XsType.WATCH, OK)
    assert store.ask(XsType.WATCH, "data", "one more") == error("ENOSPC")


# Rings ------------------------------------------------------------------------------------------------------------


def ring_of(machine):
    domain = xen(machine).domains[1]
    return domain, machine.hypervisor.vms[0].memory_spa + (domain.params[Param.STORE_PFN] << 12)


def poke(machine, name, value):
    spa = ring_of(machine)[1] + XenstoreInterface.FIELDS[name].offset
    machine.memory.write(spa, value.to_bytes(4, "little"), None, TAG_HYPERVISOR)


def peek(machine, name):
    field = XenstoreInterface.FIELDS[name]
    return int.from_bytes(machine.memory.read(ring_of(machine)[1] + field.offset, 4, None), "little")


def notify(machine):
    guest = guest_of(machine)
    return guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND, port=ring_of(machine)[0].params[Param.STORE_EVTCHN]).result


def test_the_daemon_says_what_it_can(machine):
    assert peek(machine, "server_features") == 2 | 4 | 8


@pytest.mark.parametrize(("index", "error_code"), [("req_prod", 2), ("rsp_prod", 2)])
def test_indices_further_apart_than_the_ring_end_the_service(machine, store, index, error_code):
    if index == "rsp_prod":  # looked at when there is something to send
        toolstack(machine, XsType.WRITE, f"{HOME}/data/x")
        store.ask(XsType.WATCH, "data", "t")
    poke(machine, index, peek(machine, index.replace("prod", "cons")) + 1025)
    toolstack(machine, XsType.WRITE, f"{HOME}/data/x")
    assert notify(machine) == 0
    assert peek(machine, "error") == error_code
    assert store.ask(XsType.READ, "domid") == (XsType.ERROR, b"")


def test_a_message_longer_than_a_page_ends_the_service(machine, store):
    head = message(XsType.READ, b"")[:12] + (4097).to_bytes(4, "little")
    machine.memory.write(ring_of(machine)[1], head, None, TAG_HYPERVISOR)
    poke(machine, "req_prod", 16)
    notify(machine)
    assert peek(machine, "error") == 3


def test_a_guest_that_does_not_read_is_not_read_after_20_requests(machine):
    guest_of(machine)
    request = message(XsType.DIRECTORY, b"control\0")
    spa = ring_of(machine)[1]
    sent = 0
    for _ in range(40):
        consumed = peek(machine, "req_cons")
        data = machine.memory.read(spa, 1024, None)
        at = sent % 1024
        ring = bytearray(data)
        for offset, byte in enumerate(request):
            ring[(at + offset) % 1024] = byte
        machine.memory.write(spa, bytes(ring), None, TAG_HYPERVISOR)
        if sent + len(request) - consumed > 1024:
            break
        sent += len(request)
        poke(machine, "req_prod", sent)
        notify(machine)
    waiting = xen(machine).xenstore.connections[1].outgoing
    assert len(waiting) == 20
    assert peek(machine, "rsp_prod") == 1024
    assert peek(machine, "req_cons") < sent


def test_a_closed_port_leaves_the_daemon_without_a_way_to_notify(machine, store):
    domain, _ = ring_of(machine)
    port = domain.params[Param.STORE_EVTCHN]
    guest = guest_of(machine)
    status = guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.STATUS, dom=Domid.SELF, port=port)
    assert status.fields["status"] == 2
    assert status.fields["u"] & 0xFFFF == 0
    assert guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.CLOSE, port=port).result == 0
    assert notify(machine) == -22
    assert store.ask(XsType.READ, "domid") == (XsType.ERROR, b"")


# Anything at all --------------------------------------------------------------------------------------------------

PATHS = st.sampled_from(["data", "data/a", "data/a/b", HOME, "/", "@releaseDomain", "control/shutdown", "x//", ""])
WORDS = st.one_of(PATHS, st.sampled_from(["T", "F", "n1", "r2", "1", "-1", "tok"]), st.text("ab/\0", max_size=4))
REQUESTS = st.tuples(st.integers(0, 27), st.lists(WORDS, max_size=3), st.integers(0, 3))


@cache
def world():
    machine = machine_of(memory_bytes=1 << 20, guests=1)
    guest = guest_of(machine)
    machine.mark()
    return machine, guest


@settings(max_examples=60, deadline=None)
@given(st.lists(REQUESTS, max_size=12))
def test_any_requests_leave_a_tree_whose_nodes_and_names_agree(sequence):
    machine, guest = world()
    machine.reset()
    client = XenstoreClient(guest)
    for kind, words, tx_id in sequence:
        reply, payload = client.request(kind, joined(words), tx_id)
        assert reply == kind or (reply == XsType.ERROR and payload.startswith(b"E"))
    nodes = xen(machine).xenstore.nodes
    for path, node in nodes.items():
        for child in node.children:
            assert f"{path.rstrip('/')}/{child}" in nodes
        if path not in ("/", "@releaseDomain", "@introduceDomain"):
            assert path.rpartition("/")[2] in nodes[path.rpartition("/")[0] or "/"].children


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=1024), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_any_bytes_in_the_ring_are_survived(data, consumed, produced):
    machine, _ = world()
    machine.reset()
    machine.memory.write(ring_of(machine)[1], data, None, TAG_HYPERVISOR)
    poke(machine, "req_cons", consumed)
    poke(machine, "req_prod", (consumed + produced % 1100) & 0xFFFF_FFFF)
    assert notify(machine) == 0
