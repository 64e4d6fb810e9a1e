"""A guest's driver: every access is an exit that goes through `Machine.apply`, as a real one would."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.determinism import TSC_HZ
from sevlab.core.events import AdvanceClock, CpuExit, Injected, SetRegisters, Stopped
from sevlab.core.svm import ExitCode, NpfError
from sevlab.core.testing import make_machine
from sevlab.plugins import io

MOV_LOAD, MOV_STORE = b"\x67\x66\x8b\x07", b"\x67\x66\x89\x07"  # mov eax,[edi]; mov [edi],eax in 16-bit code
NPF = NpfError.U | NpfError.FINAL
INTERRUPTS_ON, INTERRUPTS_OFF = 0x202, 0x2


class Driver:
    """Code on one vCPU of a machine with one guest; interrupts that reach it are kept as vectors."""

    def __init__(self, machine=None, vcpu=0, vcpus=1):
        self.machine = machine or make_machine("io", guests=(GuestConfig(memory_bytes=1 << 20, vcpus=vcpus),))
        self.vcpu_id = vcpu
        self.vectors = []
        self.stopped = None

    @property
    def vcpu(self):
        return self.machine.vcpus[self.vcpu_id]

    @property
    def board(self):
        return io.devices(self.machine, self.vcpu)

    def other(self, vcpu):
        return Driver(self.machine, vcpu)

    def set(self, **values):
        self.machine.apply(SetRegisters(self.vcpu_id, tuple(values.items())))

    def _exit(self, code, info1, info2, insn):
        outcome = self.machine.apply(CpuExit(self.vcpu_id, code, info1, info2, insn, 0))
        for record in outcome.records:
            if isinstance(record, Injected) and record.vcpu == self.vcpu_id:
                self.vectors.append(record.event & 0xFF)
            if isinstance(record, Stopped):
                self.stopped = record.reason
        return outcome

    def out(self, port, value, width=1):
        self.set(rax=value)
        return self._exit(ExitCode.IOIO, io.ioio_word(port, width, is_in=False), 1, b"\xee")

    def in_(self, port, width=1):
        self.set(rax=(1 << 64) - 1)
        self._exit(ExitCode.IOIO, io.ioio_word(port, width, is_in=True), 1, b"\xec")
        return self.vcpu.regs.rax & (1 << width * 8) - 1

    def load(self, gpa):
        self.set(rdi=gpa)
        self._exit(ExitCode.NPF, NPF, gpa, MOV_LOAD)
        return self.vcpu.regs.rax

    def store(self, gpa, value):
        self.set(rdi=gpa, rax=value)
        self._exit(ExitCode.NPF, NPF | NpfError.W, gpa, MOV_STORE)

    def rdmsr(self, number):
        """The value; None for #GP."""
        self.set(rcx=number, rax=0, rdx=0)
        outcome = self._exit(ExitCode.MSR, 0, 0, b"\x0f\x32")
        if outcome.first(Injected) is not None and self.vectors[-1] == 13:
            self.vectors.pop()
            return None
        return self.vcpu.regs.rdx << 32 | self.vcpu.regs.rax

    def wrmsr(self, number, value):
        """Whether it was taken."""
        self.set(rcx=number, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
        self._exit(ExitCode.MSR, 1, 0, b"\x0f\x30")
        if self.vectors and self.vectors[-1] == 13:
            self.vectors.pop()
            return False
        return True

    def wait(self, ticks):
        """Time passes while the guest runs; then an interrupt of the host makes it exit."""
        self.machine.apply(AdvanceClock(ticks))
        self.enter()

    def wait_seconds(self, seconds):
        self.wait(int(seconds * TSC_HZ))

    def enter(self):
        """The vCPU leaves the guest for an interrupt of the host, and is entered again."""
        self._exit(ExitCode.INTR, 0, 0, b"")

    def interrupts(self, on=True):
        self.set(rflags=INTERRUPTS_ON if on else INTERRUPTS_OFF)

    def taken(self):
        """The vectors since the last call."""
        taken, self.vectors = self.vectors, []
        return taken

    def init_pics(self, unmasked=(), master=0x20, slave=0x28):
        """What Linux' init_8259A writes, with other bases."""
        self.out(0x21, 0xFF)
        for port, value in ((0x20, 0x11), (0x21, master), (0x21, 4), (0x21, 1)):
            self.out(port, value)
        for port, value in ((0xA0, 0x11), (0xA1, slave), (0xA1, 2), (0xA1, 1)):
            self.out(port, value)
        mask = 0xFFFF
        for irq in unmasked:
            mask &= ~(1 << irq)
            if irq >= 8:
                mask &= ~(1 << 2)
        self.out(0x21, mask & 0xFF)
        self.out(0xA1, mask >> 8)
