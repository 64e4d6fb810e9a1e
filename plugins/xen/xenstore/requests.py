"""What each message does. A handler returns the payload of its reply, or refuses.

Source: Xen docs/misc/xenstore.txt; tools/xenstored/core.c (wire_funcs, process_message and the functions do_*),
watch.c, transaction.c, domain.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sevlab.plugins.xen.layout import XsdSockmsg
from sevlab.plugins.xen.numbers import Domid, Errno
from sevlab.plugins.xen.xenstore.store import (
    LETTERS,
    OWNER,
    READ,
    WRITE,
    Connection,
    Match,
    Outgoing,
    Perm,
    Transaction,
    View,
    Watch,
    Xenstore,
    commit,
    parent_of,
)
from sevlab.plugins.xen.xenstore.watches import fire, fire_now, tell
from sevlab.plugins.xen.xenstore.wire import (
    FEATURES,
    MAX_PERMS,
    MAX_TRANSACTIONS,
    MAX_WATCHES,
    PAYLOAD_MAX,
    Refusal,
    XsType,
    domid_of,
    joined,
    message,
    number,
    one_string,
    strings,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Collection

OK = b"OK\0"
MASK32 = 0xFFFF_FFFF


class Request(NamedTuple):
    """One message, and the tree as it sees it. `domids`: the domains that there are."""

    view: View
    payload: bytes
    tx_id: int
    domids: Collection[int]

    @property
    def store(self) -> Xenstore:
        """The daemon."""
        return self.view.store

    @property
    def connection(self) -> Connection:
        """Who asks."""
        return self.view.connection


# The tree ---------------------------------------------------------------------------------------------------------


def directory(request: Request) -> bytes:
    """The names of a node's children."""
    path = request.connection.path(one_string(request.payload))
    return joined(request.view.need(path, READ).children)


def directory_part(request: Request) -> bytes:
    """As many of them as there is room for, from an offset on, after the node's generation; an empty name ends them."""
    if request.payload.count(b"\0") != 2:
        raise Refusal(Errno.EINVAL)
    name, offset = strings(request.payload)
    node = request.view.need(request.connection.path(name), READ)
    head, children = joined((str(node.generation),)), joined(node.children)
    start = number(offset) & MASK32
    if start >= len(children):
        return head + b"\0"
    room, taken = PAYLOAD_MAX - len(head) - 1, 0
    while start + taken < len(children):
        length = len(children[start + taken :].partition(b"\0")[0])
        if taken + length >= room:
            return head + children[start : start + taken]
        taken += length + 1
    return head + children[start : start + taken] + b"\0"


def read(request: Request) -> bytes:
    """A node's value."""
    return request.view.need(request.connection.path(one_string(request.payload)), READ).value


def write(request: Request) -> bytes:
    """Set a node's value; what is missing above it is made."""
    name, nul, value = request.payload.partition(b"\0")
    if not nul:
        raise Refusal(Errno.EINVAL)
    path, view = request.connection.path(text(name)), request.view
    node = view.find(path, WRITE)
    if node is None:
        view.create(path, value)
    else:
        changed = node._replace(value=value)
        view.check_size(changed)
        view.put(path, changed)
    fire(view, path)
    return OK


def mkdir(request: Request) -> bytes:
    """Make a node; one that is there stays as it is."""
    path, view = request.connection.path(one_string(request.payload)), request.view
    if view.find(path, WRITE) is None:
        view.create(path, b"")
        fire(view, path)
    return OK


def rm(request: Request) -> bytes:
    """Delete a node with everything below; one that is not there, below a node that is, is deleted already."""
    path, view = request.connection.path(one_string(request.payload)), request.view
    if view.find(path, WRITE) is None:
        if view.node(parent_of(path)) is None:
            raise Refusal(Errno.ENOENT)
        return OK
    if path == "/":
        raise Refusal(Errno.EINVAL)
    for name, node in view.remove(path):
        fire(view, name, Match.SUBTREE if name == path else Match.EXACT, node)
    return OK


def get_perms(request: Request) -> bytes:
    """A node's permissions, the owner's entry first."""
    path = request.connection.path(one_string(request.payload), special=True)
    return joined([str(perm) for perm in request.view.need(path, READ).perms])


def set_perms(request: Request) -> bytes:
    """Change them: its owner may, and may not give the node away."""
    found = strings(request.payload)
    if len(found) < 2:
        raise Refusal(Errno.EINVAL)
    connection, view = request.connection, request.view
    if not connection.privileged and len(found) - 1 >= MAX_PERMS:
        raise Refusal(Errno.ENOSPC)
    perms = tuple(map(_perm, found[1:]))
    if perms[0].domid != Domid.ANY and perms[0].domid not in request.domids:
        raise Refusal(Errno.ENOENT)
    path = connection.path(found[0], special=True)
    node = view.need(path, WRITE | OWNER)
    if not connection.privileged and perms[0].domid != node.owner:
        raise Refusal(Errno.EPERM)
    changed = node._replace(perms=perms)
    view.check_size(changed)
    view.put(path, changed)
    fire(view, path, old=node.perms)
    return OK


def _perm(entry: str) -> Perm:
    found = re.fullmatch(r"([nrwb])\s*([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)", entry)
    if found is None:
        raise Refusal(Errno.EINVAL)
    letter, sign, digits = found.groups()
    octal = digits[0] == "0" and digits[1:].isdigit()
    try:
        value = int(digits, 8 if octal else 0)
    except ValueError:  # an 8 or 9 in an octal number
        raise Refusal(Errno.EINVAL) from None
    return Perm(LETTERS[letter], -value & MASK32 if sign == "-" else value & MASK32)


# Watches ----------------------------------------------------------------------------------------------------------


def watch(request: Request) -> bytes:
    """Tell of changes from now on, beginning with one event at once."""
    found, connection = strings(request.payload), request.connection
    if len(found) not in (2, 3):
        raise Refusal(Errno.EINVAL)
    depth = number(found[2]) if len(found) == 3 else -1
    if len(found) == 3 and depth < 0:
        raise Refusal(Errno.EINVAL)
    path = connection.path(found[0], special=True)
    if any((there.path, there.token) == (path, found[1]) for there in connection.watches):
        raise Refusal(Errno.EEXIST)
    if not connection.privileged and len(connection.watches) + 1 >= MAX_WATCHES:
        raise Refusal(Errno.ENOSPC)
    prefix = 0 if found[0].startswith(("/", "@")) else len(connection.home) + 1
    connection.watches = (*connection.watches, Watch(path, found[1], depth, prefix))
    return OK


def unwatch(request: Request) -> bytes:
    """Stop that."""
    found, connection = strings(request.payload), request.connection
    if len(found) != 2:
        raise Refusal(Errno.EINVAL)
    path = connection.path(found[0], special=True)
    left = tuple(there for there in connection.watches if (there.path, there.token) != (path, found[1]))
    if len(left) == len(connection.watches):
        raise Refusal(Errno.ENOENT)
    connection.watches = left
    return OK


def reset_watches(request: Request) -> bytes:
    """Forget all watches and transactions of the client."""
    request.connection.watches = ()
    request.connection.transactions.clear()
    return OK


# Transactions -----------------------------------------------------------------------------------------------------


def transaction_start(request: Request) -> bytes:
    """A new transaction; they do not nest."""
    connection = request.connection
    if request.view.transaction is not None:
        raise Refusal(Errno.EBUSY)
    if not connection.privileged and len(connection.transactions) + 1 >= MAX_TRANSACTIONS:
        raise Refusal(Errno.ENOSPC)
    request.store.tick()
    while True:
        tx_id = connection.next_transaction
        connection.next_transaction = tx_id + 1 & MASK32
        if tx_id and tx_id not in connection.transactions:
            break
    connection.transactions[tx_id] = Transaction()
    return joined((str(tx_id),))


def transaction_end(request: Request) -> bytes:
    """T commits, F forgets; either way the transaction is over."""
    word = one_string(request.payload)
    if word not in ("T", "F"):
        raise Refusal(Errno.EINVAL)
    transaction = request.view.transaction
    if transaction is None:
        raise Refusal(Errno.ENOENT)
    connection, store = request.connection, request.store
    del connection.transactions[request.tx_id]
    if word == "T":
        commit(store, connection, transaction)
        for path in transaction.seen:
            if path in transaction.events:
                fire_now(store, path, transaction.events[path], None, transaction.old_perms.get(path))
    return OK


# Domains ----------------------------------------------------------------------------------------------------------


def get_domain_path(request: Request) -> bytes:
    """Where a domain's names begin."""
    return joined((f"/local/domain/{domid_of(one_string(request.payload))}",))


def is_domain_introduced(request: Request) -> bytes:
    """Whether a domain's ring is served; for the toolstack."""
    domid = domid_of(one_string(request.payload))
    return b"T\0" if domid == Domid.SELF or domid in request.store.connections else b"F\0"


def get_feature(request: Request) -> bytes:
    """The daemon's features; another domain's are for the toolstack."""
    found = strings(request.payload)
    if found:
        if not request.connection.privileged:
            raise Refusal(Errno.EACCES)
        if len(found) > 1:
            raise Refusal(Errno.EINVAL)
        if domid_of(found[0]) not in request.domids:
            raise Refusal(Errno.ENOENT)
    return joined((str(FEATURES),))


def not_modelled(_request: Request) -> bytes:
    """What toolstacks ask of a daemon and this one does not have."""
    raise Refusal(Errno.ENOSYS)


class Handler(NamedTuple):
    """How a message is carried out: for the toolstack only, and without a look at its transaction id."""

    run: Callable[[Request], bytes]
    privileged: bool = False
    no_transaction: bool = False


HANDLERS: dict[int, Handler] = {
    XsType.CONTROL: Handler(not_modelled, privileged=True),
    XsType.DIRECTORY: Handler(directory),
    XsType.READ: Handler(read),
    XsType.GET_PERMS: Handler(get_perms),
    XsType.WATCH: Handler(watch, no_transaction=True),
    XsType.UNWATCH: Handler(unwatch, no_transaction=True),
    XsType.TRANSACTION_START: Handler(transaction_start),
    XsType.TRANSACTION_END: Handler(transaction_end),
    XsType.INTRODUCE: Handler(not_modelled, privileged=True),
    XsType.RELEASE: Handler(not_modelled, privileged=True),
    XsType.GET_DOMAIN_PATH: Handler(get_domain_path),
    XsType.WRITE: Handler(write),
    XsType.MKDIR: Handler(mkdir),
    XsType.RM: Handler(rm),
    XsType.SET_PERMS: Handler(set_perms),
    XsType.IS_DOMAIN_INTRODUCED: Handler(is_domain_introduced, privileged=True),
    XsType.RESUME: Handler(not_modelled, privileged=True),
    XsType.SET_TARGET: Handler(not_modelled, privileged=True),
    XsType.RESET_WATCHES: Handler(reset_watches),
    XsType.DIRECTORY_PART: Handler(directory_part),
    XsType.GET_FEATURE: Handler(get_feature),
    XsType.SET_FEATURE: Handler(not_modelled, privileged=True),
    XsType.GET_QUOTA: Handler(not_modelled, privileged=True),
    XsType.SET_QUOTA: Handler(not_modelled, privileged=True),
}


def carry_out(
    store: Xenstore, connection: Connection, domids: Collection[int], kind: int, payload: bytes, tx_id: int
) -> tuple[int, bytes]:
    """(type, payload) of the reply to one message."""
    try:
        return kind, _run(store, connection, domids, kind, payload, tx_id)
    except Refusal as refusal:
        return XsType.ERROR, joined((refusal.errno.name,))


def _run(
    store: Xenstore, connection: Connection, domids: Collection[int], kind: int, payload: bytes, tx_id: int
) -> bytes:
    """In the daemon's order: is there such a message, may the client send it, is there such a transaction."""
    handler = HANDLERS.get(kind)
    if handler is None:
        raise Refusal(Errno.ENOSYS)
    if handler.privileged and not connection.privileged:
        raise Refusal(Errno.EACCES)
    transaction = None
    if tx_id and not handler.no_transaction:
        transaction = connection.transactions.get(tx_id)
        if transaction is None:
            raise Refusal(Errno.ENOENT)
    reply = handler.run(Request(View(store, connection, transaction), payload, tx_id, domids))
    if len(reply) > PAYLOAD_MAX:
        raise Refusal(Errno.E2BIG)
    return reply


def process(store: Xenstore, connection: Connection, domids: Collection[int], data: bytes) -> None:
    """Carry out a whole message and queue its reply; a new watch's first event follows it."""
    head = XsdSockmsg.from_bytes(data[: XsdSockmsg.SIZE])
    payload, before = data[XsdSockmsg.SIZE :], connection.watches
    kind, reply = carry_out(store, connection, domids, head.type, payload, head.tx_id)
    connection.outgoing = (*connection.outgoing, Outgoing(message(kind, reply, head.req_id, head.tx_id)))
    if kind == XsType.WATCH and len(connection.watches) > len(before):
        added = connection.watches[-1]
        tell(connection, added.path[added.prefix_bytes :], added.token)
