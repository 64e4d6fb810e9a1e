"""The board of a VM: which devices there are, which ports and windows lead to them, and their interrupt lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sevlab.core.builder import MmioWindow, Port
from sevlab.core.state import StateDict, Stateful, new
from sevlab.plugins.io.devices import acpi_pm, debug, fw_cfg, ioapic, lapic, messages, pci, pic, pit, rtc, uart
from sevlab.plugins.io.devices.registers import markdown_table as registers_table
from sevlab.plugins.io.devices.registers import ones

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.hypervisor import Vm
    from sevlab.core.machine import Machine


class Devices(Stateful):
    """The devices of one VM; a local APIC for each vCPU."""

    uart: uart.Uart = new(uart.Uart)
    pics: pic.PicPair = new(pic.PicPair)
    pit: pit.Pit = new(pit.Pit)
    rtc: rtc.Rtc = new(rtc.Rtc)
    pci: pci.Pci = new(pci.Pci)
    debug: debug.DebugPorts = new(debug.DebugPorts)
    fw_cfg: fw_cfg.FwCfg = new(fw_cfg.FwCfg)
    ioapic: ioapic.IoApic = new(ioapic.IoApic)
    pm: acpi_pm.AcpiPm = new(acpi_pm.AcpiPm)
    lapics: StateDict[int, lapic.Lapic] = new(StateDict)
    """By vCPU id."""
    boot_vcpu: int = 0
    rtc_line: int = 0
    """Bit IRQ of the RTC's status C as the interrupt line shows it."""

    def set_irq(self, machine: Machine, irq: int, *, level: bool) -> None:
        """Interrupt line `irq` (0 to 15) has this level, at the PICs and at the I/O APIC."""
        self.pics.set_line(irq, level=level)
        pin = ioapic.PIT_PIN if irq == pit.PIT_IRQ else irq
        self.ioapic.set_line(pin, level=level, deliver=self.router(machine))

    def router(self, machine: Machine) -> Callable[[int], None]:
        """What the I/O APIC calls with a redirection entry."""
        return lambda entry: messages.deliver(
            machine,
            self,
            messages.Message(
                entry & 0xFF,
                entry >> 8 & 7,
                entry >> 56,
                bool(entry & messages.LOGICAL),
                bool(entry & ioapic.LEVEL),
            ),
        )

    def tick(self, machine: Machine) -> None:
        """Let what is due happen; every entry into a guest asks, so a timer that is not armed is not called."""
        tsc = machine.tsc()
        if self.pit.channel_0.loaded and self.pit.due(tsc):
            self.set_irq(machine, pit.PIT_IRQ, level=False)
            self.set_irq(machine, pit.PIT_IRQ, level=True)
        clock = self.rtc
        if clock.seen != tsc:
            clock.tick(tsc)
        if clock.status_c & rtc.C_IRQ != self.rtc_line:
            self.rtc_line = clock.status_c & rtc.C_IRQ
            self.set_irq(machine, rtc.RTC_IRQ, level=bool(self.rtc_line))
        for apic in self.lapics.values():
            if apic.initial or apic.deadline:
                apic.tick(tsc)

    def next_event(self, tsc: int) -> int | None:
        """The TSC at which the next timer interrupts; None: time alone changes nothing.

        For whoever runs real guests: with every vCPU asleep, the clock may be advanced to there.
        """
        times = [self.pit.next_event(), self.rtc.next_event(tsc), *(apic.next_event() for apic in self.lapics.values())]
        return min((time for time in times if time is not None), default=None)


class IoState(Stateful):
    """The plugin's state: devices by VM."""

    vms: StateDict[int, Devices] = new(StateDict)


def devices(machine: Machine, vcpu: Vcpu) -> Devices:
    """The devices of the VM that `vcpu` belongs to; made when a VM is new."""
    vms: StateDict[int, Devices] = machine.components["io"].vms  # type: ignore[union-attr]  # asked at every entry
    found = vms.get(vcpu.vm_id)
    if found is None:
        found = vms[vcpu.vm_id] = new_devices(machine.vm_of(vcpu))
    return found


def next_event(machine: Machine, vcpu: Vcpu) -> int | None:
    """The TSC at which the next timer of a device or of the hypervisor is due for the VM of `vcpu`; None: no timer."""
    due = devices(machine, vcpu).next_event(machine.tsc())
    own = None if machine.slots.next_timer is None else machine.slots.next_timer(machine, vcpu)
    return min((time for time in (due, own) if time is not None), default=None)


def new_devices(vm: Vm) -> Devices:
    """The board of a fresh VM."""
    board = Devices(boot_vcpu=vm.vcpu_ids[0])
    board.fw_cfg.install(ram_bytes=vm.memory_bytes, cpus=len(vm.vcpu_ids))
    board.pci.add(pci.HOST_BRIDGE_BDF, pci.HOST_BRIDGE)
    for apic_id, vcpu_id in enumerate(vm.vcpu_ids):
        base = lapic.LAPIC_GPA | lapic.BASE_ENABLE | (lapic.BASE_BSP if apic_id == 0 else 0)
        board.lapics[vcpu_id] = lapic.Lapic(apic_id=apic_id, base=base)
    return board


def make_boards(machine: Machine) -> None:
    """Give every VM that exists at boot its board."""
    for vm in machine.hypervisor.vms.values():
        devices(machine, machine.vcpus[vm.vcpu_ids[0]])


# Ports ------------------------------------------------------------------------------------------------------------


def register(builder: PluginBuilder) -> None:
    """Register ports and windows."""
    builder.at_boot(make_boards)
    serial = Port(_read_uart, _write_uart, 1, _write_uart_string)
    for port in range(uart.COM1_PORT, uart.COM1_PORT + 8):
        builder.ports.add(port, serial)
    controller = Port(
        lambda m, v, port, _: devices(m, v).pics.read(port),
        lambda m, v, port, _, value: devices(m, v).pics.write(port, value),
        1,
    )
    for start in (pic.MASTER_PORT, pic.SLAVE_PORT, pic.ELCR_PORT):
        builder.ports.add(start, controller)
        builder.ports.add(start + 1, controller)
    timer = Port(
        lambda m, v, port, _: devices(m, v).pit.read(port, m.tsc()),
        lambda m, v, port, _, value: devices(m, v).pit.write(port, value, m.tsc()),
        1,
    )
    for port in (*range(pit.PIT_PORT, pit.PIT_PORT + 4), pit.GATE_PORT):
        builder.ports.add(port, timer)
    clock = Port(
        _read_rtc,
        lambda m, v, port, _, value: devices(m, v).rtc.write(port, value, m.tsc()),
        1,
    )
    builder.ports.add(rtc.RTC_PORT, clock)
    builder.ports.add(rtc.RTC_PORT + 1, clock)
    configuration = Port(
        lambda m, v, port, width: devices(m, v).pci.read(port, width),
        lambda m, v, port, width, value: devices(m, v).pci.write(port, width, value),
    )
    for port in range(pci.ADDRESS_PORT, pci.DATA_PORT + 4):
        builder.ports.add(port, configuration)
    says = Port(lambda m, v, port, _: devices(m, v).debug.read(port), _write_debug, 1, _write_console_string)
    for port in (debug.POST_PORT, debug.CONSOLE_PORT):
        builder.ports.add(port, says)
    leaves = says._replace(width=debug.EXIT_BYTES, write_string=None)
    for port in range(debug.EXIT_PORT, debug.EXIT_PORT + debug.EXIT_BYTES):
        builder.ports.add(port, leaves)
    firmware = Port(lambda m, v, port, width: devices(m, v).fw_cfg.read(port, width), _write_fw_cfg)
    for port in range(fw_cfg.SELECTOR_PORT, fw_cfg.DMA_PORT + 8):
        builder.ports.add(port, firmware)
    power = Port(
        lambda m, v, port, width: devices(m, v).pm.read(port - acpi_pm.PM_PORT, width, m.tsc()),
        _write_pm,
    )
    for port in range(acpi_pm.PM_PORT, acpi_pm.PM_PORT + 12):
        builder.ports.add(port, power)
    _register_windows(builder)


def _register_windows(builder: PluginBuilder) -> None:
    builder.mmio(
        MmioWindow(
            ioapic.IOAPIC_GPA,
            ioapic.IOAPIC_BYTES,
            _words(lambda m, v, offset: devices(m, v).ioapic.read(offset)),
            _store_words(_write_ioapic),
        )
    )
    builder.mmio(
        MmioWindow(lapic.LAPIC_GPA, lapic.LAPIC_BYTES, _words(_read_apic_window), _store_words(_write_apic_window)),
    )
    builder.mmio(
        MmioWindow(
            pci.ECAM_GPA,
            pci.ECAM_BYTES,
            lambda m, v, offset, width: devices(m, v).pci.read_ecam(offset, width),
            lambda m, v, offset, width, value: devices(m, v).pci.write_ecam(offset, width, value),
        )
    )


WordRead = Callable[["Machine", "Vcpu", int], int]
WordWrite = Callable[["Machine", "Vcpu", int, int], None]


def _words(read: WordRead) -> Callable[[Machine, Vcpu, int, int], int]:
    """A window of 32-bit registers: a narrower read takes part of a register, a wider one what follows as well."""

    def windowed(machine: Machine, vcpu: Vcpu, offset: int, width: int) -> int:
        first = offset & ~3
        value = 0
        for place in range(first, offset + width, 4):
            value |= read(machine, vcpu, place) << (place - first) * 8
        return value >> (offset - first) * 8 & ones(width)

    return windowed


def _store_words(write: WordWrite) -> Callable[[Machine, Vcpu, int, int, int], None]:
    """A window of 32-bit registers: only aligned accesses of 4 (or twice 4) bytes write."""

    def windowed(machine: Machine, vcpu: Vcpu, offset: int, width: int, value: int) -> None:
        if offset & 3 or width < 4:
            return
        for index in range(0, width, 4):
            write(machine, vcpu, offset + index, value >> index * 8 & 0xFFFF_FFFF)

    return windowed


# Serial port ------------------------------------------------------------------------------------------------------


def _read_uart(machine: Machine, vcpu: Vcpu, port: int, _width: int) -> int:
    board = devices(machine, vcpu)
    value = board.uart.read(port & 7)
    board.set_irq(machine, uart.COM1_IRQ, level=board.uart.interrupt)
    return value


def _write_uart(machine: Machine, vcpu: Vcpu, port: int, _width: int, value: int) -> None:
    board = devices(machine, vcpu)
    board.uart.write(port & 7, value)
    board.set_irq(machine, uart.COM1_IRQ, level=board.uart.interrupt)


def _write_uart_string(machine: Machine, vcpu: Vcpu, port: int, width: int, data: bytes) -> None:
    board = devices(machine, vcpu)
    if port & 7 or not board.uart.connected:
        for byte in data:
            _write_uart(machine, vcpu, port, width, byte)
        return
    board.uart.send(data)
    board.set_irq(machine, uart.COM1_IRQ, level=board.uart.interrupt)


def _read_rtc(machine: Machine, vcpu: Vcpu, port: int, _width: int) -> int:
    board = devices(machine, vcpu)
    value = board.rtc.read(port, machine.tsc())
    board.tick(machine)  # reading status C lowers the line
    return value


# What a write does beyond the device ------------------------------------------------------------------------------


def _write_debug(machine: Machine, vcpu: Vcpu, port: int, _width: int, value: int) -> None:
    board = devices(machine, vcpu)
    board.debug.write(port, value)
    if debug.EXIT_PORT <= port < debug.EXIT_PORT + debug.EXIT_BYTES:
        machine.hypervisor.stop(machine, vcpu.vm_id, f"debug exit with status {board.debug.exit_status}")


def _write_console_string(machine: Machine, vcpu: Vcpu, port: int, width: int, data: bytes) -> None:
    board = devices(machine, vcpu)
    if port == debug.CONSOLE_PORT and width == 1:
        board.debug.text.append(data)
    elif data:
        board.debug.write(port, data[-width])


def _write_pm(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    board = devices(machine, vcpu)
    board.pm.write(port - acpi_pm.PM_PORT, width, value)
    if board.pm.power_off:
        machine.hypervisor.stop(machine, vcpu.vm_id, "ACPI power off")


def _write_fw_cfg(machine: Machine, vcpu: Vcpu, port: int, width: int, value: int) -> None:
    device = devices(machine, vcpu).fw_cfg

    def dma(gpa: int) -> None:
        window = machine.access.shared_window(vcpu, gpa, fw_cfg.DmaDescriptor.SIZE)
        if window is None:
            return
        control = device.transfer(
            fw_cfg.DmaDescriptor.snapshot(window), lambda at, data: _write_memory(machine, vcpu, at, data)
        )
        window.write(0, control.to_bytes(4, "big"))

    device.write(port, width, value, dma)


def _write_memory(machine: Machine, vcpu: Vcpu, gpa: int, data: bytes) -> bool:
    """The device's write to guest memory, as the hypervisor reaches it."""
    window = machine.access.shared_window(vcpu, gpa, len(data))
    if window is None:
        return False
    window.write(0, data)
    return True


# Interrupt controllers --------------------------------------------------------------------------------------------


def _write_ioapic(machine: Machine, vcpu: Vcpu, offset: int, value: int) -> None:
    board = devices(machine, vcpu)
    board.ioapic.write(offset, value, board.router(machine))


REGISTER_SPACING = 16
"""The APIC's registers lie 16 bytes apart; the 12 bytes behind each are nothing."""


def _read_apic_window(machine: Machine, vcpu: Vcpu, offset: int) -> int:
    """In x2APIC mode, or with the APIC off, there is nothing at its window."""
    if not devices(machine, vcpu).lapics[vcpu.vcpu_id].mapped:
        return ones(4)
    return 0 if offset % REGISTER_SPACING else read_lapic(machine, vcpu, offset)


def _write_apic_window(machine: Machine, vcpu: Vcpu, offset: int, value: int) -> None:
    if devices(machine, vcpu).lapics[vcpu.vcpu_id].mapped and not offset % REGISTER_SPACING:
        write_lapic(machine, vcpu, offset, value)


def read_lapic(machine: Machine, vcpu: Vcpu, offset: int) -> int:
    """Read the register at `offset` of the vCPU's own APIC."""
    return devices(machine, vcpu).lapics[vcpu.vcpu_id].read(offset, machine.tsc())


def write_lapic(machine: Machine, vcpu: Vcpu, offset: int, value: int) -> None:
    """Write the register at `offset` of the vCPU's own APIC; EOI, task priority and the command reach beyond it."""
    board = devices(machine, vcpu)
    apic = board.lapics[vcpu.vcpu_id]
    if offset == lapic.EOI:
        vector = apic.end_of_interrupt()
        if vector is not None and apic.tmr >> vector & 1:
            board.ioapic.end_of_interrupt(vector, board.router(machine))
    elif offset == lapic.ICR_LOW:
        apic.icr = apic.icr >> 32 << 32 | value
        messages.send_ipi(machine, board, apic)
    else:
        apic.write(offset, value, machine.tsc())
        if offset == lapic.TPR:
            vcpu.system.cr8 = value >> 4 & 0xF


def markdown_tables() -> str:
    """Every device's registers for documentation."""
    modules = (uart, pic, pit, rtc, pci, debug, fw_cfg, lapic, ioapic, acpi_pm)
    return "\n\n".join(
        f"{(module.__doc__ or '').splitlines()[0]}\n\n{registers_table(module.REGISTERS)}" for module in modules
    )
