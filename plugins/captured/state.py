"""What the model learns of a captured machine while its log is replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sevlab.core.state import StateDict, Stateful, new

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class Captured(Stateful):
    """Registers and configuration that the log has shown once: from then on the model knows them."""

    step: Any = None
    """The `GuestExit` that is being served."""
    answered: int = 0
    """How many of its answers have been taken."""
    cpuid: StateDict[tuple[int, int, int], tuple[int, int, int, int]] = new(StateDict)
    """By vCPU, leaf, sub-leaf."""
    msrs: StateDict[tuple[int, int], int] = new(StateDict)
    """What the guest wrote, by vCPU and MSR."""
    refused: StateDict[tuple[int, bool], bool] = new(StateDict)
    """Whether the processor refuses an MSR, by number and direction."""
    requested: StateDict[int, int] = new(StateDict)
    """IRR by vCPU: what arrived according to the log and was not taken yet."""
    rtc_index: int = 0
    rtc: StateDict[int, int] = new(StateDict)
    pci_address: int = 0
    pci_present: int = -1
    """-1 unknown, else whether CF8h reads back."""
    pci: StateDict[int, int] = new(StateDict)
    """Configuration bytes by function (bdf << 8) and offset."""
    pci_sizes: StateDict[int, int] = new(StateDict)
    """What a base address register reads after all ones were written to it."""
    pci_sizing: StateDict[int, bool] = new(StateDict)

    def answer(self) -> int | None:
        """The next value that the world outside gave, if there is one."""
        answers = self.step.answers
        if self.answered >= len(answers):
            return None
        self.answered += 1
        return cast("int", answers[self.answered - 1])


def captured(machine: Machine) -> Captured:
    """The plugin's state."""
    return cast("Captured", machine.components["captured"])
