"""Who is told of a change.

Source: Xen tools/xenstored/watch.c (is_child, watch_permitted, fire_watches) and core.c (send_event).
"""

from __future__ import annotations

from sevlab.plugins.xen.xenstore.store import (
    READ,
    Connection,
    Match,
    Node,
    Outgoing,
    Perm,
    View,
    Watch,
    Xenstore,
    parent_of,
)
from sevlab.plugins.xen.xenstore.wire import MAX_QUEUED_BYTES, PAYLOAD_MAX, XsType, joined, message


def concerns(watch: Watch, path: str, match: Match) -> bool:
    """Whether an event at `path` matches a watch: its own path, or one as far below it as it asks for."""
    if path == watch.path:
        return True
    if match is Match.EXACT:
        return False
    base = watch.path if watch.path == "/" else f"{watch.path}/"
    return path.startswith(base) and (watch.depth < 0 or path.count("/", len(base)) < watch.depth)


def permitted(
    store: Xenstore, connection: Connection, path: str, node: Node | None, old: tuple[Perm, ...] | None
) -> bool:
    """Whether a client may learn of a change at `path`: it could read the node before, or can now, or its parent."""
    if old is not None and connection.may(old) & READ:
        return True
    node = node or store.nodes.get(path)
    if node is None:
        return False
    if connection.may(node.perms) & READ:
        return True
    parent = store.nodes.get(parent_of(path))
    return parent is not None and bool(connection.may(parent.perms) & READ)


def tell(connection: Connection, path: str, token: str) -> None:
    """Put an event into a client's queue; not twice while it waits there, not one that is too long, and none when the
    queue of a guest that does not read has reached its quota.
    """
    payload = joined((path, token))
    if len(payload) > PAYLOAD_MAX:
        return
    if not path.startswith("@") and any(waiting.event == payload for waiting in connection.outgoing):
        return
    event = message(XsType.WATCH_EVENT, payload)
    queued = sum(len(waiting.left) for waiting in connection.outgoing)
    if connection.privileged or queued + len(event) < MAX_QUEUED_BYTES:
        connection.outgoing = (*connection.outgoing, Outgoing(event, payload))


def fire(
    view: View, path: str, match: Match = Match.SUBTREE, node: Node | None = None, old: tuple[Perm, ...] | None = None
) -> None:
    """Tell of a change at `path`; in a transaction, when it commits. `node` and `old` as in `permitted`."""
    transaction = view.transaction
    if transaction is not None:
        if match is Match.SUBTREE or path not in transaction.events:
            transaction.events[path] = match
        return
    fire_now(view.store, path, match, node, old)


def fire_now(
    store: Xenstore, path: str, match: Match, node: Node | None = None, old: tuple[Perm, ...] | None = None
) -> None:
    """Tell every client that asked and may know."""
    for connection in store.connections.values():
        if connection.watches and permitted(store, connection, path, node, old):
            for watch in connection.watches:
                if concerns(watch, path, match):
                    tell(connection, path[watch.prefix_bytes :], watch.token)


def fire_special(store: Xenstore, name: str, domid: int) -> None:
    """An event of the daemon's own: with the domain's number for watches that ask for a depth, without for others.

    Source: Xen tools/xenstored/domain.c (fire_special_watches).
    """
    node = store.nodes.get(name)
    if node is None:
        return
    full = f"{name}/{domid}"
    for connection in store.connections.values():
        if not permitted(store, connection, name, node, None):
            continue
        for watch in connection.watches:
            if watch.path == full or (watch.path == name and watch.depth > 0):
                tell(connection, full, watch.token)
            elif watch.path == name and watch.depth < 0:
                tell(connection, name, watch.token)
