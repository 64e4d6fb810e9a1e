"""How a NAE event and a request of the MSR protocol are declared: by this plugin, and by everybody else.

The tables `builder.nae_events` and `builder.msr_protocol` hold these. The declaration is what the event reads (a
handler that reads another field fails), what it answers, since when it exists, and how it answers wrong inputs; the
checks before the handler, the documentation's matrix and the tests of every field are made from it.

```python
builder.nae_events.add(
    0x8000_1234,
    NaeEvent("frob", frob, required=("rax",), outputs=("rbx",), source="your document", example={"rax": 1}),
)
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.layout import Layout
from sevlab.core.svm import EventType, Vector, event
from sevlab.plugins.sev_es.ghcb import Ghcb, Reason, Result
from sevlab.plugins.sev_es.msr_layout import NoArgument

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.sev_es.order import Broken
    from sevlab.plugins.sev_es.scratch import Scratch


class Reply(NamedTuple):
    """What a hypervisor puts into the GHCB; a register that is None is not marked valid.

    The protocol itself returns no other registers; `more` are those that a hypercall ABI of the hypervisor's own
    returns, by name. Source: 56421, section 4; Linux arch/x86/kvm/svm/sev.c (sev_es_sync_to_ghcb).
    """

    info_1: int = 0
    info_2: int = 0
    rax: int | None = None
    rbx: int | None = None
    rcx: int | None = None
    rdx: int | None = None
    more: tuple[tuple[str, int], ...] = ()


DONE = Reply()


def malformed(reason: Reason) -> Reply:
    """The request is refused for `reason`. Source: 56421, 4.1."""
    return Reply(Result.MALFORMED, reason)


def exception(vector: int, error_code: int | None = None) -> Reply:
    """The guest shall take an exception. Source: 56421, 4.1 (EVENTINJ format)."""
    return Reply(Result.EXCEPTION, event(vector, EventType.EXCEPTION, error_code))


GENERAL_PROTECTION = exception(Vector.GP)
"""8000030Dh: no error-code bit, the guest uses code 0. Source: Linux arch/x86/kvm/svm/svm.c."""

MISSING_INPUT = malformed(Reason.MISSING_INPUT)
INVALID_INPUT = malformed(Reason.INVALID_INPUT)
INVALID_SCRATCH = malformed(Reason.INVALID_SCRATCH)
INVALID_EVENT = malformed(Reason.INVALID_EVENT)

NaeHandler = Callable[["Machine", "Vcpu", Ghcb, "Scratch | None"], Reply | None]
"""Gets the declared fields of one snapshot and the scratch area if the event uses one; None: no answer now."""

MsrHandler = Callable[["Machine", "Vcpu", int], int | None]
"""Gets the MSR's value and returns the new one; None: it stays as it is."""


OrderRule = Callable[["Machine", "Vcpu", "Ghcb | int"], Iterable["Broken"]]
"""What legal order demands of an event's or a request's own state: gets the page or the MSR's value, and only looks."""


class Need(NamedTuple):
    """Fields that are required when `test` says so of the request; `when` says it in words."""

    fields: tuple[str, ...]
    when: str
    test: Callable[[Ghcb], bool]


class Case(NamedTuple):
    """One input field of an event with one value, and the exact result: SW_EXITINFO1 and 2.

    `kind` is "absent" (not marked valid), "zero", "limit", "past" (the first beyond it) or "reserved". `given` are
    other fields that differ from the event's example. `expect` None: there is no answer, `note` says why. `returns`
    names the registers marked valid (None: those that `expect` names, else the event's outputs when it is done).
    """

    field: str
    kind: str
    value: int | None
    expect: Reply | None
    given: Mapping[str, int] = {}
    note: str = ""
    returns: tuple[str, ...] | None = None


class NaeEvent(NamedTuple):
    """One NAE event: what it reads, what it returns, how it refuses.

    `required` and `optional` name GHCB fields besides the exit code and the two infos, which all events have; an
    optional one that is not valid reads 0. `context` names what else the handler reads that has no valid bit or always
    is valid (the version, the exit code). `scratch` gives the length in bytes of the scratch area that a request
    needs (0: none). `feature`: bit number of the hypervisor feature behind which the event stands. `order`: a rule of
    legal order that only this event knows.
    """

    name: str
    handler: NaeHandler
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    outputs: tuple[str, ...] = ()
    scratch: Callable[[Ghcb], int] | None = None
    since: int = 1
    snp_only: bool = False
    feature: int | None = None
    example: Mapping[str, int] = {}
    cases: tuple[Case, ...] = ()
    order: OrderRule | None = None
    source: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every GHCB field that the event reads."""
        more = [name for need in self.needs for name in need.fields]
        scratch = ("sw_scratch",) if self.scratch is not None else ()
        named = ("sw_exit_info_1", "sw_exit_info_2", *self.required, *self.optional, *more, *scratch)
        return tuple(dict.fromkeys(named))


class MsrRequest(NamedTuple):
    """One request of the MSR protocol; `request` is the layout of the value, reserved bits included."""

    name: str
    handler: MsrHandler
    request: type[Layout] = NoArgument
    response: int | None = None
    since: int = 1
    snp_only: bool = False
    order: OrderRule | None = None
    source: str = ""
