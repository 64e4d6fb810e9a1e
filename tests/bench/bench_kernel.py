"""The kernel: memory, layouts, exits, resets, start-up."""

from __future__ import annotations

import statistics
import subprocess
import sys
import timeit
from struct import Struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from sevlab.core.buffers import SharedBuffer, SharedFetches
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import VmcbControl
from sevlab.core.events import CpuExit, HostMsr, MemoryWrite, Party, SetRegisters, Space
from sevlab.core.hookspecs import hookimpl
from sevlab.core.layout import Layout, raw_bytes, u8, u16, u32, u64
from sevlab.core.memory import Memory
from sevlab.core.svm import ExitCode
from sevlab.core.testing import make_machine

from tests.bench.harness import Bench, Row


class Ghcb(Layout, size=4096, valid_bitmap=0x3F0):
    """The fields of the GHCB, for its size and shape. Source: 56421, GHCB layout."""

    cpl = u8(0x0CB, valid_bit=True)
    xss = u64(0x140, valid_bit=True)
    dr7 = u64(0x160, valid_bit=True)
    rax = u64(0x1F8, valid_bit=True)
    rcx = u64(0x308, valid_bit=True)
    rdx = u64(0x310, valid_bit=True)
    rbx = u64(0x318, valid_bit=True)
    rsi = u64(0x330, valid_bit=True)
    rdi = u64(0x338, valid_bit=True)
    r8 = u64(0x340, valid_bit=True)
    sw_exit_code = u64(0x390, valid_bit=True)
    sw_exit_info_1 = u64(0x398, valid_bit=True)
    sw_exit_info_2 = u64(0x3A0, valid_bit=True)
    sw_scratch = u64(0x3A8, valid_bit=True)
    xcr0 = u64(0x3E8, valid_bit=True)
    shared_buffer = raw_bytes(0x800, 0x7F0)
    protocol_version = u16(0xFFA)
    ghcb_usage = u32(0xFFC)


def memory(bench: Bench) -> list[Row]:
    xts_key = bytes(range(32))
    page = bytes(4096)
    store = Memory(1 << 30)
    key = store.install_key(xts_key, "bench")
    raw = bench(lambda: Cipher(algorithms.AES(xts_key), modes.XTS(bytes(16))).encryptor().update(page))
    ours = bench(lambda: key.encrypt_page(5, page))

    def look():
        store.pages[5].cipher = store.pages[5].view = None
        store.dram(0x5000, 4096)

    store.write(0x5000, page, key, 16)
    looked = bench(look)
    private = bench(lambda: (store.write(0x5000, page, key, 16), store.read(0x5000, 4096, key)))
    return [
        ("page encryption, of raw AES-XTS calls a second", raw / ours, f"{ours:.2f} us a page, raw {raw:.2f} us"),
        ("look at a private page, of raw AES-XTS", raw / looked, f"{looked:.2f} us with the slice"),
        ("private page written and read by its owner", private / raw, f"{private:.2f} us, no AES; ratio to one AES"),
    ]


def layouts(bench: Bench) -> list[Row]:
    store = Memory(1 << 30)
    store.write(0x3000, Ghcb.build(rax=1, sw_exit_code=0x72), None, 1)
    shared = SharedBuffer(SharedFetches(store), 0x3000, 4096, None, 1)
    window, snapshot = Ghcb(shared), Ghcb.snapshot(shared)
    raw_bytes_, u64_ = bytes(4096), Struct("<Q")
    plain = bench(lambda: u64_.unpack_from(raw_bytes_, 0x390)[0])
    counted = bench(lambda: shared.read_uint(0x390, 8))
    live = bench(lambda: window.ghcb_usage)
    read = bench(lambda: snapshot.rax)
    decode = bench(lambda: Ghcb.snapshot(shared))
    build = bench(
        lambda: Ghcb.build(rax=1, rcx=2, sw_exit_code=0x72, sw_exit_info_1=0, sw_exit_info_2=0, protocol_version=2)
    )
    return [
        ("counted live read of a u64, to unpack_from", counted / plain, f"{counted:.3f} us (target 0.4)"),
        ("the same through a layout", live / plain, f"{live:.3f} us"),
        ("snapshot field read", read / plain, f"{read:.3f} us (target 0.1)"),
        ("snapshot of a GHCB page", decode / plain, f"{decode:.2f} us"),
        ("build of the GHCB's core fields", build / plain, f"{build:.2f} us (target 4)"),
        ("decode of a VMCB", bench(lambda: VmcbControl.from_bytes(bytes(1024))) / plain, "ratio to one u64"),
    ]


class Halting:
    """A plugin that handles HLT and a port's worth of state, to time the kernel around it."""

    def __init__(self, name: str, *, handles: bool) -> None:
        self.__doc__ = f"Bench plugin {name}."
        self.handles = handles
        self.key = int(name.rpartition("_")[2])

    @hookimpl
    def sevlab_register(self, builder):
        builder.host_msrs.add(0x1000 + self.key, None)
        if self.handles:
            builder.exits.add(ExitCode.CPUID, lambda machine, vcpu, exit_: None)
            builder.at_boot(lambda machine: [v.vmcb.intercept(ExitCode.CPUID) for v in machine.vcpus.values()])


def machine_of(plugins: int, guests: int):
    given = {f"bench_{n}": Halting(f"bench_{n}", handles=n == 0) for n in range(plugins)}
    config = tuple(GuestConfig(memory_bytes=4096) for _ in range(guests))
    return make_machine("sme", given=given, guests=config, memory_bytes=1 << 40)


def exits(bench: Bench) -> list[Row]:
    step = CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0)

    def timed(plugins, guests):
        machine = machine_of(plugins, guests)
        return bench(lambda: machine.apply(step))

    base, many_guests, many_plugins = timed(5, 1), timed(5, 500), timed(30, 1)
    table = {step.exit_code: lambda: None}
    bare = bench(lambda: table[0x72]())
    frozen = machine_of(5, 1).tables.exits
    frozen[0x72] = lambda: None
    return [
        ("exit at Machine.apply, 500 guests to 1", many_guests / base, f"{base:.2f} us with 1 guest, 5 plugins"),
        ("exit at Machine.apply, 30 plugins to 5", many_plugins / base, f"{many_plugins:.2f} us"),
        ("dispatch through a frozen table, to a dictionary", bench(lambda: frozen[0x72]()) / bare, f"{bare:.3f} us"),
        ("a step that is refused", bench(lambda: machine_refused(step)) / base, "ratio to a handled exit"),
    ]


REFUSED = make_machine("sme")


def machine_refused(step):
    return REFUSED.apply(step)


def resets(bench: Bench) -> list[Row]:
    machine = machine_of(5, 1)
    write = [MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, 0x10_0000 + n * 4096, False, b"12345678") for n in range(64)]
    eight = (SetRegisters(0, (("rax", 1), ("rip", 2))), HostMsr(0xC001_0010, True, 1 << 24))

    def after(pages):
        """Time of the reset alone: the sequence with it, less the sequence without."""
        steps = [*write[:pages], *eight * 4][: max(10, pages)]

        def both():
            for step in steps:
                machine.apply(step)
            machine.reset()

        samples = []
        for _ in range(bench.rounds * 20):
            for step in steps:
                machine.apply(step)
            start = timeit.default_timer()
            machine.reset()
            samples.append(timeit.default_timer() - start)
        both()
        return statistics.median(samples) * 1e6

    idle, two, many = after(0), after(2), after(64)
    return [
        ("reset after 10 messages that dirtied 2 pages", two / idle, f"{two:.2f} us (target 2); no page {idle:.2f} us"),
        ("each further dirty page", (many - two) / 62 / two, f"{(many - two) / 62:.3f} us"),
    ]


def starts(bench: Bench) -> list[Row]:
    def start(*command):
        samples = []
        for _ in range(bench.rounds):
            begin = timeit.default_timer()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            samples.append(timeit.default_timer() - begin)
        return statistics.median(samples) * 1000

    bare = start("-c", "pass")
    kernel = start("-c", "import sevlab.core.machine")
    usage = start("-c", "from sevlab.core.cli import main; main(['--help'])")
    return [
        ("import sevlab.core.machine, to an empty interpreter", kernel / bare, f"{kernel:.0f} ms (target 120)"),
        ("sevlab --help, to an empty interpreter", usage / bare, f"{usage:.0f} ms (target 250)"),
    ]


GROUPS = (memory, layouts, exits, resets, starts)
