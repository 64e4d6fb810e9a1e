"""xenstored: the tree of names and values behind the xenstore ring, with permissions, watches and transactions.

The model plays the daemon of the control domain. Guests reach it through their ring and its event channel (`ring`),
the toolstack by the step `xen.xenstore` (`toolstack`). Documents: Xen docs/misc/xenstore.txt, xenstore-ring.txt,
xenstore-paths.pandoc.
"""
