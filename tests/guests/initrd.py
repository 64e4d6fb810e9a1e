"""A small initrd for Debian's kernel: static busybox and a script that says what the guest can do."""

from __future__ import annotations

from pathlib import Path

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
echo "initrd: started as $(/bin/busybox id -u) on $(/bin/busybox uname -r)"
echo "initrd: 6 * 7 = $((6 * 7)), sum $(/bin/busybox seq 1 100 | /bin/busybox awk '{ s += $1 } END { print s }')"
/bin/busybox sleep 1
echo "initrd: slept; up $(/bin/busybox cut -d' ' -f1 /proc/uptime) s"
echo "initrd: $(/bin/busybox grep -c processor /proc/cpuinfo) cpu"
echo "initrd: memory $(/bin/busybox sed -n 's/^MemTotal: *//p' /proc/meminfo)"
echo "initrd: clock $(/bin/busybox cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "initrd: timer interrupts $(/bin/busybox sed -n 's/^ *LOC: *\\([0-9]*\\).*/\\1/p' /proc/interrupts)"
echo "initrd: done"
/bin/busybox poweroff -f
"""
DIRECTORY, EXECUTABLE, CHARACTER = 0o040755, 0o100755, 0o020600
CONSOLE = (5, 1)


def entry(number: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file in cpio's "newc" format. Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst."""
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name.encode() + b"\0"
    head += bytes(-len(head) % 4)
    return head + data + bytes(-len(data) % 4)


def initrd(busybox: Path, script: str = INIT) -> bytes:
    """The archive."""
    files = (
        ("bin", DIRECTORY, b"", (0, 0)),
        ("dev", DIRECTORY, b"", (0, 0)),
        ("dev/console", CHARACTER, b"", CONSOLE),
        ("bin/busybox", EXECUTABLE, busybox.read_bytes(), (0, 0)),
        ("init", EXECUTABLE, script.encode(), (0, 0)),
        ("TRAILER!!!", 0, b"", (0, 0)),
    )
    return b"".join(entry(n + 1, name, mode, data, device) for n, (name, mode, data, device) in enumerate(files))
