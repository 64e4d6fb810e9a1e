"""The tree, who may touch what in it, and transactions.

A transaction works on copies of the nodes that it has touched; it commits if none of them has changed meanwhile.
Source: Xen tools/xenstored/core.c (get_node, create_node, do_rm), transaction.c (access_node, finalize_transaction).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.xen.numbers import Domid, Errno
from sevlab.plugins.xen.xenstore.wire import (
    MAX_NODE_BYTES,
    MAX_NODES,
    MAX_PATH_BYTES,
    MAX_TRANSACTION_NODES,
    Refusal,
)

READ, WRITE, OWNER = 1, 2, 4
ALL = READ | WRITE | OWNER
LETTERS = {"n": 0, "r": READ, "w": WRITE, "b": READ | WRITE}
NODE_HEAD_BYTES, PERM_BYTES = 16, 8
"""What a node counts for beside value and names of children. Source: tools/xenstored/core.h (node_hdr)."""
VALID = re.compile(r"[A-Za-z0-9/_@-]*")
DOMAIN_PATH = re.compile(r"/local/domain/[0-9]{1,5}/")
TOOLSTACK = -1
"""The connection of the control domain's toolstack, which is a socket and no ring."""


class Perm(NamedTuple):
    """What one domain may do with a node; of the first entry its owner, and what everybody else may do."""

    access: int
    domid: int

    def __str__(self) -> str:
        letter = next(letter for letter, access in LETTERS.items() if access == self.access)
        return f"{letter}{self.domid}"


class Node(NamedTuple):
    """A name's value, its children in the order of their making, and who may touch it."""

    perms: tuple[Perm, ...]
    value: bytes = b""
    children: tuple[str, ...] = ()
    generation: int = 0

    @property
    def owner(self) -> int:
        """The domain that the node belongs to."""
        return self.perms[0].domid

    @property
    def size_bytes(self) -> int:
        """What it counts for."""
        names = sum(len(child) + 1 for child in self.children)
        return NODE_HEAD_BYTES + PERM_BYTES * len(self.perms) + len(self.value) + names


class Match(Enum):
    """Which watches an event concerns: of this path, or of a parent too."""

    EXACT = 0
    SUBTREE = 1


class Watch(NamedTuple):
    """What a connection wants to be told of. `depth`: levels below `path`, -1 for any; `prefix_bytes`: what the
    connection leaves out of paths.
    """

    path: str
    token: str
    depth: int
    prefix_bytes: int


class Outgoing(NamedTuple):
    """A message that waits for room in the ring, without what is sent of it. `event` is an event's payload."""

    left: bytes
    event: bytes = b""


class Transaction(Stateful):
    """One transaction: the copies by path, what they were copied from, and the events that a commit makes."""

    copies: StateDict[str, Node | None] = new(StateDict)
    seen: StateDict[str, int] = new(StateDict)
    """Generation of each node when it was touched first, -1 where there was none."""
    old_perms: StateDict[str, tuple[Perm, ...]] = new(StateDict)
    changed: StateDict[str, bool] = new(StateDict)
    events: StateDict[str, Match] = new(StateDict)
    created: bool = False
    failed: bool = False
    """A quota was hit where Xen cannot take the request back: the commit is refused."""


class Connection(Stateful):
    """A client. What belongs to one message at a time is in `incoming`."""

    domid: int = 0
    privileged: bool = False
    incoming: bytes = b""
    outgoing: tuple[Outgoing, ...] = ()
    watches: tuple[Watch, ...] = ()
    transactions: StateDict[int, Transaction] = new(StateDict)
    next_transaction: int = 0
    ignored: bool = False
    """It broke the protocol and is not served any more."""

    @property
    def home(self) -> str:
        """What its relative paths begin with."""
        return f"/local/domain/{max(self.domid, 0)}"

    def may(self, perms: tuple[Perm, ...]) -> int:
        """What it may do with a node of these permissions."""
        if self.privileged or perms[0].domid in (self.domid, Domid.ANY):
            return ALL
        for perm in perms[1:]:
            if perm.domid in (self.domid, Domid.ANY):
                return perm.access
        return perms[0].access

    def path(self, name: str, *, special: bool = False) -> str:
        """The path that a request names; a special one begins with @. Refuses what is no path, or too long."""
        if VALID.fullmatch(name) is None or (name.startswith("@") and not special):
            raise Refusal(Errno.EINVAL)
        path = name if name.startswith(("/", "@")) else f"{self.home}/{name}"
        local = DOMAIN_PATH.match(path)
        length = len(path) - (local.end() if local else 0)
        if (path.endswith("/") and path != "/") or "//" in path:
            raise Refusal(Errno.EINVAL)
        if not self.privileged and length >= MAX_PATH_BYTES:
            raise Refusal(Errno.EINVAL)
        return path


class Xenstore(Stateful):
    """The daemon's state."""

    nodes: StateDict[str, Node] = new(StateDict)
    generation: int = 0
    connections: StateDict[int, Connection] = new(StateDict)
    """By domain id; the toolstack's is `TOOLSTACK`."""

    def tick(self) -> int:
        """The number of the next change."""
        self.generation += 1
        return self.generation


def parent_of(path: str) -> str:
    """The path above; that of a special node is the root."""
    return path.rpartition("/")[0] or "/"


def leaf_of(path: str) -> str:
    """The last name."""
    return path.rpartition("/")[2]


class View:
    """The tree as one request sees it: in its transaction, if it names one."""

    def __init__(self, store: Xenstore, connection: Connection, transaction: Transaction | None) -> None:
        self.store, self.connection, self.transaction = store, connection, transaction

    # Nodes, without a question of permission ------------------------------------------------------------------------

    def node(self, path: str) -> Node | None:
        """The node at `path`. In a transaction the first touch makes a copy."""
        transaction = self.transaction
        if transaction is None:
            return self.store.nodes.get(path)
        if path not in transaction.seen:
            if not self.connection.privileged and len(transaction.seen) + 1 >= MAX_TRANSACTION_NODES:
                transaction.failed = True
                raise Refusal(Errno.ENOSPC)
            there = self.store.nodes.get(path)
            transaction.seen[path] = -1 if there is None else there.generation
            transaction.copies[path] = there
            if there is not None:
                transaction.old_perms[path] = there.perms
        return transaction.copies[path]

    def put(self, path: str, node: Node | None) -> None:
        """Write a node, or delete it."""
        generation = self.store.tick()
        kept = None if node is None else node._replace(generation=generation)
        if self.transaction is not None:
            self.node(path)
            self.transaction.copies[path] = kept
            self.transaction.changed[path] = True
        elif kept is None:
            self.store.nodes.pop(path, None)
        else:
            self.store.nodes[path] = kept

    # Nodes, if the connection may -----------------------------------------------------------------------------------

    def find(self, path: str, access: int) -> Node | None:
        """The node at `path` if the connection has all of `access`; None where there is none and it may know that.

        Refuses with EACCES. That there is no node is told only to those that have some of `access` above it.
        """
        node = self.node(path)
        if node is not None:
            if self.connection.may(node.perms) & access != access:
                raise Refusal(Errno.EACCES)
            return node
        above = path
        while above != "/":
            above = parent_of(above)
            there = self.node(above)
            if there is not None:
                if not self.connection.may(there.perms) & access:
                    raise Refusal(Errno.EACCES)
                return None
        return None

    def need(self, path: str, access: int) -> Node:
        """The same, and ENOENT where there is none."""
        node = self.find(path, access)
        if node is None:
            raise Refusal(Errno.ENOENT)
        return node

    # Changes --------------------------------------------------------------------------------------------------------

    def create(self, path: str, value: bytes) -> None:
        """A node and all that is missing above it; each new one has its parent's permissions and the client as owner.

        Refuses with ENOSPC what is past a quota, and then nothing is changed.
        """
        missing = [path]
        parent = self.node(parent_of(path))
        while parent is None:
            missing.append(parent_of(missing[-1]))
            parent = self.node(parent_of(missing[-1]))
        perms = parent.perms
        if not self.connection.privileged:
            perms = (perms[0]._replace(domid=self.connection.domid), *perms[1:])
            self._check_count(1 if self.transaction is not None else len(missing))
        made = {
            name: Node(perms, b"" if child else value, (leaf_of(child),) if child else ())
            for name, child in zip(missing, ("", *missing), strict=False)
        }
        made[parent_of(missing[-1])] = parent._replace(children=(*parent.children, leaf_of(missing[-1])))
        for node in made.values():
            self.check_size(node)
        if self.transaction is not None:
            self.transaction.created = True
        for name, node in made.items():
            self.put(name, node)

    def _check_count(self, more: int) -> None:
        if owned(self.store, self.connection.domid) + more >= MAX_NODES:
            raise Refusal(Errno.ENOSPC)

    def check_size(self, node: Node) -> None:
        """Refuse what is longer than a client's nodes may be; its transaction can then not be committed."""
        if not self.connection.privileged and node.size_bytes >= MAX_NODE_BYTES:
            if self.transaction is not None:
                self.transaction.failed = True
            raise Refusal(Errno.ENOSPC)

    def remove(self, path: str) -> list[tuple[str, Node]]:
        """Delete a node and all below it; what was deleted, the deepest first."""
        gone: list[tuple[str, Node]] = []
        waiting = [path]
        while waiting:
            name = waiting.pop()
            node = self.node(name)
            if node is not None:
                gone.append((name, node))
                waiting += (f"{name}/{child}" for child in node.children)
        gone.reverse()
        for name, _ in gone:
            self.put(name, None)
        parent = self.node(parent_of(path))
        if parent is not None:
            left = tuple(child for child in parent.children if child != leaf_of(path))
            self.put(parent_of(path), parent._replace(children=left))
        return gone


def owned(store: Xenstore, domid: int) -> int:
    """How many nodes belong to a domain."""
    return sum(node.owner == domid for node in store.nodes.values())


def commit(store: Xenstore, connection: Connection, transaction: Transaction) -> None:
    """Make a transaction's changes the tree's. Refuses with EAGAIN when what it touched has changed, with ENOMEM when
    it failed before, with ENOSPC when its client would own too many nodes.
    """
    if transaction.failed:
        raise Refusal(Errno.ENOMEM)
    if transaction.created and not connection.privileged:
        more = sum(
            (copy is not None and copy.owner == connection.domid)
            - (path in store.nodes and store.nodes[path].owner == connection.domid)
            for path, copy in transaction.copies.items()
        )
        if owned(store, connection.domid) + more >= MAX_NODES:
            raise Refusal(Errno.ENOSPC)
    for path, generation in transaction.seen.items():
        there = store.nodes.get(path)
        if generation != (-1 if there is None else there.generation):
            raise Refusal(Errno.EAGAIN)
    for path in transaction.changed:
        copy = transaction.copies[path]
        if copy is not None:
            store.nodes[path] = copy._replace(generation=store.tick())
        elif path in store.nodes:
            del store.nodes[path]
