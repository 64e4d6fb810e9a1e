"""Bugs of Xen's hypercalls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.seeded.planting import Bug
from sevlab.plugins.xen import HYPERV_FLAG, HvCall, HvStatus, VpMask

if TYPE_CHECKING:
    from typing import Any

    from sevlab.plugins.seeded.planting import Mark, Planter
    from sevlab.plugins.xen import HvContext

BANKS = 64
SPARSE_AT = {HvCall.SEND_IPI_EX: (8, 16), HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX: (16, 24)}
"""Offsets of the format and of the mask of banks. Source: TLFS, HV_VP_SET in each call."""

KNOWN_BANKS = 2
"""Banks that a domain can have: 128 virtual processors."""


def hcall_mask(plan: Planter, mark: Mark) -> None:
    """The banks of a sparse set of processors are stored without a bound on their number.

    Source: CVE-2025-58147 and CVE-2025-58148, XSA-475 (Xen 36e90c4ef1, cc64c24502).
    """

    def make(format_at: int, mask_at: int) -> Any:
        def around(original: Any) -> Any:
            def handler(context: HvContext) -> Any:
                answer = original(context)
                if answer[0] is not HvStatus.SUCCESS:
                    return answer
                machine = context.machine
                spa = machine.access.translate_gpa(context.vcpu, context.input.first_gpa)
                if spa is None:
                    return answer

                def word(offset: int) -> int:
                    return int.from_bytes(machine.memory.read(spa + offset, 8, None), "little")

                if not word(format_at):
                    mark.reached()
                    banks = word(mask_at)
                    if banks >> KNOWN_BANKS and mark.triggers():
                        processors = VpMask()
                        for bank in range(BANKS):
                            if banks >> bank & 1:
                                processors.put(bank, 0)
                return answer

            return handler

        return around

    for call, (format_at, mask_at) in SPARSE_AT.items():
        plan.replace("hypercalls", HYPERV_FLAG | call, make(format_at, mask_at))


BUGS = (Bug("S13", "hcall-mask", 25, "invariant", hcall_mask),)
"""Those of this file."""
