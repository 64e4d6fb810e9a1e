"""The demo chapter of Xen."""

from __future__ import annotations

from collections.abc import Callable

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.cpu import CONTROL_SEV
from sevlab.core.events import AspCommand, AspStatus, CacheOp, HostMsr
from sevlab.core.machine import Machine
from sevlab.plugins.xen.assess import SURVIVAL, Fate
from sevlab.plugins.xen.call import Abi
from sevlab.plugins.xen.guest import XenGuest
from sevlab.plugins.xen.guest_store import XenstoreClient
from sevlab.plugins.xen.numbers import Domid, Errno, Evtchnop, Nr, Version
from sevlab.plugins.xen.startup import enter_long_mode
from sevlab.plugins.xen.state import xen
from sevlab.plugins.xen.xenstore.wire import XsType

BOUNCE = 0x10000
HOSTS = (("none", Abi.LEGACY), ("physical", Abi.PHYSICAL), ("fast", Abi.FAST))


def _machine(abi: str) -> Machine:
    config = MachineConfig(
        plugins=("sme", "sev", "io", "xen"),
        guests=(GuestConfig(memory_bytes=4 << 20),),
        options={"xen": {"abi": abi, "start": "long"}},
    )
    return Machine(config)


def _result(value: int) -> str:
    return str(value) if value >= 0 else f"-{Errno(-value).name}"


INIT, DF_FLUSH, ACTIVATE, LAUNCH_START, LAUNCH_UPDATE_DATA, LAUNCH_MEASURE, LAUNCH_FINISH = (
    0x01,
    0x0A,
    0x21,
    0x30,
    0x31,
    0x33,
    0x35,
)
SYSCFG, MEM_ENCRYPTION = 0xC001_0010, 1 << 23
COMMANDS_SPA, MEASUREMENT_SPA = 0x10_0000, 0x10_1000


def _encrypt(machine: Machine) -> None:
    """Launch the guest with the mailbox commands of SEV, and give it private page tables around a shared page.

    Source: 55766, the buffers of the commands; the chapter of SEV shows them one by one.
    """
    vm, asid = machine.hypervisor.vms[0], 100

    def run(command: int, buffer: bytes) -> bytes:
        answer = machine.apply(AspCommand("sev", command, COMMANDS_SPA, buffer)).first(AspStatus)
        assert answer is not None
        assert not answer.status, f"command {command:#x}: status {answer.status:#x}"
        return answer.buffer

    machine.apply(HostMsr(SYSCFG, True, MEM_ENCRYPTION))
    run(INIT, bytes(20))
    machine.apply(CacheOp("wbinvd", 0))
    run(DF_FLUSH, b"")
    handle = run(LAUNCH_START, bytes(36))[:4]
    run(ACTIVATE, handle + asid.to_bytes(4, "little"))
    run(LAUNCH_UPDATE_DATA, handle + bytes(4) + vm.memory_spa.to_bytes(8, "little") + (4096).to_bytes(4, "little"))
    run(LAUNCH_MEASURE, handle + bytes(4) + MEASUREMENT_SPA.to_bytes(8, "little") + (48).to_bytes(4, "little"))
    run(LAUNCH_FINISH, handle)
    vcpu = machine.vcpus[0]
    vm.c_bit_mask = 1 << machine.config.part.c_bit
    vcpu.vmcb.guest_asid = asid
    vcpu.vmcb.encryption_control |= CONTROL_SEV
    enter_long_mode(machine, vcpu, shared=(BOUNCE,))


def chapter(say: Callable[[str], object]) -> None:
    """One guest calls in three ABIs, plain and under SEV."""
    for encrypted in (False, True):
        say(f"   {'An SEV' if encrypted else 'A plain'} guest asks for Xen's features and for an event channel:")
        for option, abi in HOSTS:
            machine = _machine(option)
            if encrypted:
                _encrypt(machine)
            guest = XenGuest(machine, abi=abi, bounce_gpa=BOUNCE)
            features = guest.invoke(Nr.XEN_VERSION, Version.GET_FEATURES, submap_idx=0)
            port = guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.ALLOC_UNBOUND, dom=Domid.SELF, remote_dom=Domid.SELF)
            say(f"     {abi.value:<9} get_features {_result(features.result):<8} alloc_unbound {_result(port.result)}")
    guest.console_write(b"Hello from an encrypted guest.")
    say(f"   The console ring needs no hypercall but the event: {xen(machine).domains[1].console_output!r}")
    _, name = XenstoreClient(guest).ask(XsType.READ, "name")
    say(f"   So does the xenstore ring; the guest's name there is {name!r}\n")
    fates = {fate: sum(row.fate is fate for row in SURVIVAL) for fate in Fate}
    say("   What becomes of each call of the legacy ABI under encryption:")
    for fate, count in fates.items():
        say(f"     {count:>3}  {fate.value}")
