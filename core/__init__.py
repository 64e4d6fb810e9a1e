"""The kernel: pages, keys, vCPUs, a mailbox, an exit loop and tables; every AMD feature is a plugin."""
