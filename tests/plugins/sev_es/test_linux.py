"""Against a real Linux: the reference guest asks what the kernel asked, and the reference hypervisor accepts it."""

from __future__ import annotations

from functools import cache

import pytest
from sevlab.core.builder import Msr as MsrHandlers
from sevlab.core.hookspecs import hookimpl
from sevlab.core.svm import ExitCode
from sevlab.plugins.sev_es import (
    VALID_BITS,
    GhcbReply,
    GuestReply,
    MsrExit,
    MsrReply,
    Outcome,
    PageExit,
    Vmgexit,
    before_setup,
    handle,
    jump_table_request,
)

from tests.plugins.sev_es.capture import Msr, Page, exchanges
from tests.plugins.sev_es.guests import encrypted_machine

COUNTS = {"vc": 75_307, "page": 75_301, "msr": 29}
"""Of the capture's README."""
SPREAD = 97
"""Of a long run of like requests, the fast sample takes every so many."""
RARE = 40
"""The first so many requests of each kind are all in the sample."""


def sample(everything):
    """(#VC, requests, whether a GHCB is set up); all of them, or a spread sample that has every kind."""
    seen, ghcb = {}, False
    for index, (vc, requests) in enumerate(exchanges()):
        ghcb = ghcb or any(isinstance(request, Page) for request in requests)
        kind = (vc.code, ghcb, *(type(request).__name__ for request in requests))
        if requests and isinstance(requests[-1], Page):
            kind += (requests[-1].qwords.get(0x398, 0),)
        seen[kind] = seen.get(kind, 0) + 1
        if everything or seen[kind] <= RARE or index % SPREAD == 0:
            yield vc, requests, ghcb


@cache
def spread():
    """The sample, read once."""
    return list(sample(everything=False))


def asked(request):
    """A request of the reference guest as the capture has one."""
    if isinstance(request, MsrExit):
        return request.value
    fields = {"sw_exit_code": request.code, "sw_exit_info_1": request.info_1, "sw_exit_info_2": request.info_2}
    return {**request.fields, **fields}, request.data


def recorded(request):
    """The same of a recorded request."""
    return request.request if isinstance(request, Msr) else (request.fields(), request.data)


def answer(request):
    """The recorded reply: device data are inputs, fed and not compared."""
    if isinstance(request, Msr):
        return request.reply
    after = request.qwords | request.reply
    return GuestReply(after.get(0x398, 0), after.get(0x3A0, 0), request.reply_registers(), request.reply_data)


def differences(handler, requests):
    """Where a handler asks something else than was recorded, and the requests that it does not make."""
    found, left = [], list(requests)
    try:
        request = next(handler)
        while left:
            theirs = left.pop(0)
            if asked(request) != recorded(theirs):
                found.append((theirs.number, asked(request), recorded(theirs)))
            request = handler.send(answer(theirs))
        found.append(("asks more", request, None))
    except StopIteration as end:
        if end.value.outcome is not Outcome.DONE:
            found.append((end.value, None, None))
    return found, left


def compare(everything):
    """All differences; the two requests that belong to no #VC are the kernel's own, and have functions of their own."""
    found, counts = [], dict.fromkeys(COUNTS, 0)
    for vc, requests, ghcb in sample(everything=True) if everything else spread():
        counts["vc"] += 1
        counts["page"] += sum(isinstance(request, Page) for request in requests)
        counts["msr"] += sum(isinstance(request, Msr) for request in requests)
        context = vc.context(ghcb=ghcb)
        more, left = differences(handle(context), requests)
        found += more
        if left:
            own = before_setup(0, snp=False) if isinstance(left[0], Msr) else jump_table_request(context)
            more, rest = differences(own, left)
            found += more + rest
    return found, counts


@pytest.mark.slow
def test_the_reference_guest_asks_what_linux_asked():
    found, counts = compare(everything=False)
    assert not found
    assert counts["vc"] > 1000


@pytest.mark.long
def test_the_reference_guest_asks_what_linux_asked_in_every_request():
    found, counts = compare(everything=True)
    assert not found
    assert counts == COUNTS


@pytest.mark.slow
def test_the_reference_hypervisor_accepts_every_request_of_linux():
    accept(everything=False)


@pytest.mark.long
def test_the_reference_hypervisor_accepts_every_request_of_linux_without_exception():
    accept(everything=True)


def accept(*, everything):
    """Every request gets an answer without error or exception, and with it the guest's handler is done."""
    numbers = {
        request.fields()["rcx"]
        for vc, requests, _ in spread()
        for request in requests
        if vc.code == ExitCode.MSR and isinstance(request, Page)
    }
    known = set(encrypted_machine().tables.guest_msrs)

    class Recorded:
        """What the composed machine lacks: the range of CPUID leaves, and MSRs, whose values are inputs."""

        @staticmethod
        @hookimpl
        def sevlab_register(builder):
            builder.cpuid_bits(0x8000_0000, eax=0x8000_001F)
            for number in numbers - known:
                builder.guest_msrs.add(number, MsrHandlers(lambda *_: 0, lambda *_: None))

    machine = encrypted_machine(memory_bytes=512 << 20, given={"recorded": Recorded()})
    refused = []
    for vc, requests, ghcb in sample(everything=True) if everything else spread():
        handler = handle(vc.context(ghcb=ghcb))
        next(handler)
        for request in requests:
            reply = given_to(machine, request)
            try:
                handler.send(reply)
            except StopIteration as end:
                if end.value.outcome is not Outcome.DONE or (isinstance(reply, GuestReply) and reply.info_1):
                    refused.append((request, reply, end.value))
                handler = iter_done()
                next(handler)
    assert not refused


def iter_done():
    """What stands for the kernel's own requests after a #VC: any answer will do."""
    while True:
        yield


def given_to(machine, request):
    """The machine's answer to a recorded request, as the guest reads it."""
    if isinstance(request, Msr):
        return machine.apply(Vmgexit(0, request.request, b"")).first(MsrReply).value
    reply = machine.apply(Vmgexit(0, request.gpa, request.image())).first(GhcbReply)
    valid = int.from_bytes(reply.valid, "little")
    registers = {name: getattr(reply, name) for name in ("rax", "rbx", "rcx", "rdx") if valid & VALID_BITS[name]}
    return GuestReply(reply.info_1, reply.info_2, registers, reply.data)


def test_a_wrong_register_or_code_is_noticed():
    vc, requests, ghcb = next(item for item in spread() if item[2] and item[0].code == 0x72)
    wrong = vc._replace(regs=(vc.regs[0] ^ 1, *vc.regs[1:]))
    assert differences(handle(wrong.context(ghcb=ghcb)), requests)[0]
    assert isinstance(requests[0], Page)
    assert isinstance(next(handle(vc.context(ghcb=True))), PageExit)
