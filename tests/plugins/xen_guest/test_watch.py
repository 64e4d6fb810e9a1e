"""A small guest that calls Xen, plain and encrypted: what the watch sees, and what it does for a kernel."""

from __future__ import annotations

import pytest
from sevlab.plugins.engines import Feature, Symbols, boot, compose
from sevlab.plugins.engines.launch import c_bit_mask
from sevlab.plugins.engines.loaders.load import load_guest
from sevlab.plugins.io import devices
from sevlab.plugins.xen import Errno, Evtchnop, Memop, Nr, Vcpuop, domain_of, hypercall_page
from sevlab.plugins.xen.arguments import AddToPhysmap, FeatureInfo, RegisterVcpuInfo
from sevlab.plugins.xen.numbers import Domid, Version
from sevlab.plugins.xen_guest import XenGuestWatch
from sevlab.plugins.xen_guest.breaks import Reason

pytest.importorskip("unicorn", reason="the engine unicorn is not installed (extra emu)")
MEMORY = 16 << 20
CODE, STUB, FEATURES, PHYSMAP, REGISTER, INFO, SHARED, STACK = (
    0x10_0000,
    0x10_0800,
    0x10_1000,
    0x10_1100,
    0x10_1200,
    0x10_2000,
    0x10_3000,
    0x10_5000,
)
WC_VERSION = SHARED + 3072
VMMCALL, RET, OUT_F4, WRMSR = b"\x0f\x01\xd9", b"\xc3", b"\xe7\xf4", b"\x0f\x30"
PAGE = 0x10_6000
REGISTERS = {"eax": 0xB8, "ecx": 0xB9, "edx": 0xBA, "esp": 0xBC, "esi": 0xBE, "edi": 0xBF}
SECRET = b"a secret of the guest's, beside it"


def load(register, value):
    return bytes((REGISTERS[register],)) + value.to_bytes(4, "little")


def program():
    """Calls through a stub, as a kernel makes them; at the end it shows shared_info's wc_version."""
    code = load("esp", STACK)
    code += load("ecx", 0x4000_0000) + load("edx", 0) + load("eax", PAGE) + WRMSR
    for number, first, second, third in (
        (Nr.XEN_VERSION, Version.GET_FEATURES, FEATURES, 0),
        (Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP, PHYSMAP, 0),
        (Nr.VCPU_OP, Vcpuop.REGISTER_VCPU_INFO, 0, REGISTER),
    ):
        code += load("edi", first) + load("esi", second) + load("edx", third) + load("eax", number)
        code += b"\xe8" + (STUB - CODE - len(code) - 5).to_bytes(4, "little", signed=True)
    code += b"\x8b\x04\x25" + WC_VERSION.to_bytes(4, "little") + OUT_F4
    image = bytearray(0x7000)
    pieces = {
        CODE: code,
        STUB: VMMCALL + RET,
        FEATURES: FeatureInfo.build(submap_idx=0),
        PHYSMAP: AddToPhysmap.build(domid=Domid.SELF, space=0, idx=0, gpfn=SHARED >> 12),
        REGISTER: RegisterVcpuInfo.build(mfn=INFO >> 12, page_offset=64),
        INFO + 128: SECRET,
    }
    for gpa, data in pieces.items():
        image[gpa - CODE : gpa - CODE + len(data)] = data
    return bytes(image)


def watched(tmp_path, feature, *, adapt=False):
    file = tmp_path / "guest.bin"
    file.write_bytes(program())
    machine = compose(memory_bytes=MEMORY, plugins=("xen", "xen_guest"), options={"xen": {"adapt": adapt}})
    image = load_guest(
        file, memory_bytes=MEMORY - 0x4000, encrypted=feature.encrypted, c_bit_mask=c_bit_mask(machine, feature)
    )
    booted = boot(machine, image, feature)
    symbols = Symbols([(CODE, "kernel"), (STUB, "hypercall_stub")])
    watch = XenGuestWatch(booted, adapt=adapt, symbols=symbols)
    return watch, booted, booted.execution.run()


def results(watch):
    return {step["step"]: step["result"] for step in watch.summary()["steps"] if step["result"] is not None}


def reasons(watch):
    return {step.name: set(step.broken) for step in watch.steps.values()}


NAMES = ("xen_version get_features", "memory_op add_to_physmap", "vcpu_op register_vcpu_info")


def test_a_plain_guest_has_its_steps_noted_where_they_are_made(tmp_path):
    watch, _, ended = watched(tmp_path, Feature.PLAIN)
    assert ended == ("debug exit with status 9", True)  # version 4 of the date: the page latched the width
    assert results(watch) == dict.fromkeys(NAMES, 0)
    assert not any(reasons(watch).values())
    page, first = watch.summary()["steps"][:2]
    assert (page["step"], page["symbol"].split("+")[0], page["breaks"]) == ("hypercall page", "kernel", [])
    assert (first["symbol"], first["count"], first["breaks"]) == ("hypercall_stub", 1, [])
    assert first["caller_symbol"].startswith("kernel+0x")


def test_an_sev_guest_has_every_linear_buffer_refused(tmp_path):
    watch, _, ended = watched(tmp_path, Feature.SEV)
    assert ended != ("debug exit with status 9", True)
    assert results(watch) == dict.fromkeys(NAMES, -Errno.EFAULT)
    assert {name: reasons(watch)[name] for name in NAMES} == {key: {Reason.LINEAR} for key in NAMES}
    assert reasons(watch)["hypercall page"] == {Reason.HYPERCALL_PAGE}
    assert "as it did here" in "\n".join(watch.lines())


def test_an_adapted_sev_guest_gets_through_and_is_told_all_that_was_done_for_it(tmp_path):
    watch, booted, ended = watched(tmp_path, Feature.SEV, adapt=True)
    assert ended == ("debug exit with status 9", True)
    assert results(watch) == dict.fromkeys(NAMES, 0)
    assert reasons(watch) == {
        **{key: {Reason.LINEAR} for key in NAMES},
        "hypercall page": {Reason.HYPERCALL_PAGE},
        "shared_info": {Reason.PRIVATE},
        "vcpu_info": {Reason.OWN_PAGE},
    }
    read = booted.machine.access.guest_read
    assert read(booted.execution.vcpu, FEATURES + 4, 4) != bytes(4)  # Xen's answer, in the guest's own memory
    assert read(booted.execution.vcpu, INFO + 128, len(SECRET)) == SECRET
    assert read(booted.execution.vcpu, PAGE, 4096) == hypercall_page()
    lines = "\n".join(watch.lines())
    assert "hypercall_stub" in lines
    assert "set_memory_decrypted" in lines


def test_pages_become_shared_only_where_xen_uses_them(tmp_path):
    _, booted, _ = watched(tmp_path, Feature.SEV, adapt=True)
    machine, vm = booted.machine, booted.vm
    assert SECRET in machine.memory.read(vm.memory_spa + INFO, 4096, None)  # the whole page: that is what it costs
    assert FeatureInfo.build(submap_idx=0) != machine.memory.read(vm.memory_spa + FEATURES, 8, None)
    domain = domain_of(machine, booted.execution.vcpu)
    assert machine.memory.read(domain.vcpus[0].info_spa, 1, None)[0] == 1  # Xen's upcall flag


def test_the_local_apic_is_on_as_firmware_leaves_it(tmp_path):
    _, booted, _ = watched(tmp_path, Feature.PLAIN)
    assert devices(booted.machine, booted.execution.vcpu).lapics[0].enabled


def test_every_kind_of_call_of_a_guest_has_a_row():
    from sevlab.plugins.xen_guest.breaks import row_of

    assert row_of(Nr.EVENT_CHANNEL_OP, Evtchnop.SEND).name == "event_channel_op send"
    assert row_of(Nr.MEMORY_OP, Memop.ADD_TO_PHYSMAP | 5 << 6).name == "memory_op add_to_physmap"  # preempted
    assert row_of(Nr.VM_ASSIST, 0).name == "vm_assist"
    assert row_of(3, 0) is None
