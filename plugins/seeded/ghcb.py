"""Bugs of the hypervisor's GHCB handling: fetches, string I/O, AP reset hold, synchronised registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.buffers import CheckedBuffer
from sevlab.core.exitinfo import IOIO_IN, IOIO_STRING
from sevlab.core.memory import TAG_PUBLIC
from sevlab.core.svm import ExitCode
from sevlab.core.units import MASK64, PAGE_BYTES
from sevlab.plugins.seeded.planting import Bug
from sevlab.plugins.sev_es import (
    VALID_BITS,
    Ghcb,
    Hold,
    NaeCode,
    Reply,
    Scratch,
    ghcb_window,
    vcpu_protocol,
    write_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.buffers import SharedBuffer
    from sevlab.core.builder import ExitHandler
    from sevlab.core.cpu import Vcpu
    from sevlab.core.events import CpuExit
    from sevlab.core.machine import Machine
    from sevlab.plugins.seeded.planting import Mark, Planter

CODE_AT = Ghcb.FIELDS["sw_exit_code"].offset
SCRATCH_AT = Ghcb.FIELDS["sw_scratch"].offset
RAX_AT = Ghcb.FIELDS["rax"].offset
XCR0_AT = Ghcb.FIELDS["xcr0"].offset
BITMAP_AT = Ghcb.FIELDS["valid_bitmap"].offset
X87, SSE, AVX = 1 << 0, 1 << 1, 1 << 2
SUPPORTED_XCR0 = X87 | SSE | AVX


def peek(machine: Machine, window: SharedBuffer, offset: int, length: int) -> int:
    """What stands in the page, without a fetch: for canaries."""
    return int.from_bytes(machine.memory.read(window.spa + offset, length, None), "little")


def fetch_again(machine: Machine, mark: Mark, window: SharedBuffer, offset: int) -> int:
    """The second read of a field that the guest can change; in watch mode only the chance to change it."""
    if mark.live:
        return window.read_uint(offset, 8)
    machine.fetches.point()
    return peek(machine, window, offset, 8)


def strio_page(plan: Planter, mark: Mark) -> None:
    """A string goes through a buffer of one page in one pass: nothing splits what is longer.

    Source: CVE-2021-4093, Linux 95e16b4792b0 (arch/x86/kvm/svm/sev.c).
    """

    def make(original: Callable[..., Reply]) -> Callable[..., Reply]:
        def ioio(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
            if scratch is not None and ghcb.sw_exit_info_1 & IOIO_STRING:
                mark.reached()
                if len(scratch.data) > PAGE_BYTES and mark.triggers():
                    CheckedBuffer(PAGE_BYTES).write(0, scratch.data, TAG_PUBLIC)
            return original(machine, vcpu, ghcb, scratch)

        return ioio

    plan.event(ExitCode.IOIO, make)


def strio_units(plan: Planter, mark: Mark) -> None:
    """The length of the scratch area in bytes is handed on as a number of elements.

    Source: Linux 019057bd73d1 (arch/x86/kvm/svm/sev.c), the same series as CVE-2021-4093.
    """

    def make(original: Callable[..., Reply]) -> Callable[..., Reply]:
        def ioio(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
            info = ghcb.sw_exit_info_1
            width = info >> 4 & 7
            if scratch is not None and info & IOIO_STRING:
                mark.reached()
                if width > 1 and mark.triggers():
                    area = CheckedBuffer.of(scratch.data, TAG_PUBLIC)
                    for element in range(len(scratch.data)):
                        area.read(element * width, width)
            return original(machine, vcpu, ghcb, scratch)

        return ioio

    plan.event(ExitCode.IOIO, make)


def exitcode_refetch(plan: Planter, mark: Mark) -> None:
    """The exit code is read from the shared page once to be judged and again to be dispatched.

    A second value that is the code of VMGEXIT itself makes the handler enter itself. Source: CVE-2023-4155, Linux
    7588dbcebcbf (arch/x86/kvm/svm/sev.c).
    """

    def make(original: ExitHandler) -> ExitHandler:
        def vmgexit(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
            window = ghcb_window(machine, vcpu)
            if window is not None:
                judged = fetch_again(machine, mark, window, CODE_AT)
                if judged in machine.tables.nae_events:
                    mark.reached()
                    used = fetch_again(machine, mark, window, CODE_AT)
                    if used != judged and mark.triggers() and used == ExitCode.VMGEXIT:
                        vmgexit(machine, vcpu, exit_)
            original(machine, vcpu, exit_)

        return vmgexit

    plan.replace("exits", ExitCode.VMGEXIT, make)


def scratch_refetch(plan: Planter, mark: Mark) -> None:
    """The place of the scratch area is checked in a snapshot and then taken from the live page.

    Source: Linux 4e15a0ddc3ff (arch/x86/kvm/svm/sev.c).
    """

    def make(original: Callable[..., Reply]) -> Callable[..., Reply]:
        def handler(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
            window = ghcb_window(machine, vcpu)
            if scratch is not None and window is not None:
                mark.reached()
                used = fetch_again(machine, mark, window, SCRATCH_AT)
                if used != ghcb.sw_scratch and mark.triggers():
                    offset = used - vcpu.vmcb.ghcb_gpa
                    rest = window.read(offset, len(scratch.data))
                    scratch = Scratch(window, offset, rest, len(scratch.data))
            return original(machine, vcpu, ghcb, scratch)

        return handler

    for code in (ExitCode.IOIO, NaeCode.MMIO_READ, NaeCode.MMIO_WRITE):
        plan.event(code, make)


def resethold_unmapped(plan: Planter, mark: Mark) -> None:
    """The end of an AP reset hold is written into the GHCB, mapped or not, and whichever way the hold was asked for.

    Source: CVE-2021-47008, Linux a3ba26ecfb56 (arch/x86/kvm/svm/sev.c).
    """

    def make(original: Callable[..., bool]) -> Callable[..., bool]:
        def start_vcpu(machine: Machine, vcpu: Vcpu, vector: int) -> bool:
            hold = vcpu_protocol(machine, vcpu).hold
            if hold != Hold.NONE:
                mark.reached()
                window = ghcb_window(machine, vcpu)
                if window is None and mark.triggers():
                    write_reply(machine, vcpu, window, NaeCode.AP_RESET_HOLD, Reply(info_2=1), b"")  # type: ignore[arg-type]
            return original(machine, vcpu, vector)

        return start_vcpu

    plan.builder.replace_slot("start_vcpu", make)


def is_legal_xcr0(value: int) -> bool:
    """Whether XSETBV takes the value. Source: 24593, 11.5.2."""
    return bool(value & X87) and not value & ~SUPPORTED_XCR0 and (bool(value & SSE) or not value & AVX)


def xcr0_unchecked(plan: Planter, mark: Mark) -> None:
    """A guest's XCR0 becomes the vCPU's without a check of the value.

    The reference hypervisor keeps no XCR0, so that a legal one changes nothing here. Source: Linux
    arch/x86/kvm/svm/sev.c (sev_es_sync_from_ghcb).
    """

    def make(original: ExitHandler) -> ExitHandler:
        def vmgexit(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
            window = ghcb_window(machine, vcpu)
            if window is not None and peek(machine, window, BITMAP_AT, 16) & VALID_BITS["xcr0"]:
                mark.reached()
                value = peek(machine, window, XCR0_AT, 8)
                if not is_legal_xcr0(value) and mark.triggers():
                    vcpu.system.xcr0 = value
            original(machine, vcpu, exit_)

        return vmgexit

    plan.replace("exits", ExitCode.VMGEXIT, make)


def stale_regs(plan: Planter, mark: Mark) -> None:
    """RAX is taken from the page although the guest did not mark it valid: what an earlier exit left there.

    Source: Linux arch/x86/kvm/svm/sev.c (sev_es_sync_from_ghcb copies what is marked valid, over zeroes).
    """

    def make(original: Callable[..., Reply]) -> Callable[..., Reply]:
        def ioio(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
            reply: Reply = original(machine, vcpu, ghcb, scratch)
            info = ghcb.sw_exit_info_1
            width = info >> 4 & 7
            window = ghcb_window(machine, vcpu)
            if reply.rax is None or not info & IOIO_IN or width == 4 or ghcb.is_valid("rax") or window is None:
                return reply
            mark.reached()
            stale = peek(machine, window, RAX_AT, 8) & -(1 << width * 8) & MASK64
            return reply._replace(rax=stale | reply.rax) if stale and mark.triggers() else reply

        return ioio

    plan.event(ExitCode.IOIO, make)


BUGS = (
    Bug("S01", "strio-page", 1, "invariant", strio_page),
    Bug("S02", "strio-units", 2, "invariant", strio_units),
    Bug("S03", "exitcode-refetch", 3, "single-fetch", exitcode_refetch, contexts=True),
    Bug("S04", "scratch-refetch", 4, "single-fetch", scratch_refetch, contexts=True),
    Bug("S06", "resethold-unmapped", 6, "crash", resethold_unmapped, stateful=True, contexts=True),
    Bug("S07", "xcr0-unchecked", 7, "sev_es.vcpu", xcr0_unchecked),
    Bug("S09", "stale-regs", 10, "non-interference", stale_regs, stateful=True),
)
"""Those of this file."""
