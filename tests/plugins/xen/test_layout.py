"""Sizes and offsets against numbers typed from the compiled public headers (64-bit and -m32)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.testing import assert_offsets
from sevlab.plugins.xen import arguments as args
from sevlab.plugins.xen import layout
from sevlab.plugins.xen.state import CHANNEL

SHARED = [
    (layout.SharedInfo, 3136, {"evtchn_pending": (2048, 512), "evtchn_mask": (2560, 512), "wc_version": (3072, 4)}),
    (layout.SharedInfo32, 2344, {"evtchn_pending": (2048, 128), "evtchn_mask": (2176, 128), "wc_sec_hi": (2340, 4)}),
    (
        layout.VcpuInfo,
        64,
        {"evtchn_upcall_mask": (1, 1), "evtchn_pending_sel": (8, 8), "cr2": (16, 8), "time": (32, 32)},
    ),
    (layout.VcpuInfo32, 64, {"evtchn_pending_sel": (4, 4), "cr2": (8, 4), "time": (32, 32)}),
    (
        layout.VcpuTimeInfo,
        32,
        {"tsc_timestamp": (8, 8), "system_time": (16, 8), "tsc_shift": (28, 1), "flags": (29, 1)},
    ),
    (layout.VcpuRunstateInfo, 48, {"state_entry_time": (8, 8), "time": (16, 32)}),
    (layout.VcpuRunstateInfo32, 44, {"state_entry_time": (4, 8), "time": (12, 32)}),
    (layout.MulticallEntry, 64, {"result": (8, 8), "args": (16, 48)}),
    (layout.MulticallEntry32, 32, {"result": (4, 4), "args": (8, 24)}),
    (layout.XenconsInterface, 3092, {"output": (1024, 2048), "in_cons": (3072, 4), "out_prod": (3084, 4)}),
    (layout.XenstoreInterface, 2080, {"rsp": (1024, 1024), "rsp_prod": (2060, 4), "evtchn_port": (2076, 4)}),
    (layout.XsdSockmsg, 16, {"len": (12, 4)}),
    (layout.GrantEntryV1, 8, {"domid": (2, 2), "frame": (4, 4)}),
    (layout.GrantEntryV2, 16, {"page_off_or_trans_domid": (4, 2), "length": (6, 2), "frame": (8, 8)}),
    (layout.FifoControlBlock, 72, {"ready": (0, 4), "head": (8, 64)}),
    (layout.HvmStartInfo, 56, {"modlist_paddr": (16, 8), "rsdp_paddr": (32, 8), "memmap_entries": (48, 4)}),
    (layout.Ioreq, 32, {"count": (16, 4), "size": (20, 4), "vp_eport": (24, 4), "type": (31, 1)}),
]
ARGUMENTS = [
    (args.MemoryReservation, 32, {"nr_extents": (8, 8), "mem_flags": (20, 4), "domid": (24, 2)}),
    (args.MemoryReservation32, 20, {"nr_extents": (4, 4), "mem_flags": (12, 4), "domid": (16, 2)}),
    (args.AddToPhysmap, 24, {"size_pages": (2, 2), "space": (4, 4), "idx": (8, 8), "gpfn": (16, 8)}),
    (args.AddToPhysmap32, 16, {"idx": (8, 4), "gpfn": (12, 4)}),
    (args.AddToPhysmapBatch, 32, {"foreign_domid": (6, 2), "idxs": (8, 8), "errs": (24, 8)}),
    (args.AddToPhysmapBatch32, 20, {"idxs": (8, 4), "errs": (16, 4)}),
    (args.RemoveFromPhysmap, 16, {"gpfn": (8, 8)}),
    (args.RemoveFromPhysmap32, 8, {"gpfn": (4, 4)}),
    (args.MemoryMap, 16, {"buffer_handle": (8, 8)}),
    (args.MemoryMap32, 8, {"buffer_handle": (4, 4)}),
    (args.SetMemoryMap, 24, {"nr_entries": (8, 4), "buffer_handle": (16, 8)}),
    (args.SetMemoryMap32, 12, {"nr_entries": (4, 4), "buffer_handle": (8, 4)}),
    (args.E820Entry, 20, {"length": (8, 8), "type": (16, 4)}),
    (args.MapGrantRef, 32, {"flags": (8, 4), "ref": (12, 4), "dom": (16, 2), "status": (18, 2), "handle": (20, 4)}),
    (args.UnmapGrantRef, 24, {"dev_bus_addr": (8, 8), "handle": (16, 4), "status": (20, 2)}),
    (args.SetupTable, 24, {"nr_frames": (4, 4), "status": (8, 2), "frame_list": (16, 8)}),
    (args.SetupTable32, 16, {"status": (8, 2), "frame_list": (12, 4)}),
    (args.GrantCopy, 40, {"dest": (16, 8), "dest_domid": (24, 2), "len": (32, 2), "flags": (34, 2), "status": (36, 2)}),
    (args.GrantCopy32, 24, {"dest": (8, 4), "len": (16, 2), "status": (20, 2)}),
    (args.QuerySize, 16, {"max_nr_frames": (8, 4), "status": (12, 2)}),
    (args.SwapGrantRef, 12, {"ref_b": (4, 4), "status": (8, 2)}),
    (args.BindInterdomain, 12, {"remote_port": (4, 4), "local_port": (8, 4)}),
    (args.BindVirq, 12, {"vcpu": (4, 4), "port": (8, 4)}),
    (args.EvtchnStatus, 24, {"port": (4, 4), "status": (8, 4), "vcpu": (12, 4), "u": (16, 4), "u_port": (20, 4)}),
    (args.AllocUnbound, 8, {"remote_dom": (2, 2), "port": (4, 4)}),
    (args.InitControl, 24, {"page_offset": (8, 4), "vcpu": (12, 4), "link_bits": (16, 1)}),
    (args.ExpandArray, 8, {"array_gfn": (0, 8)}),
    (args.Poll, 24, {"nr_ports": (8, 4), "timeout": (16, 8)}),
    (args.Poll32, 16, {"nr_ports": (4, 4), "timeout": (8, 8)}),
    (args.SingleshotTimer, 16, {"flags": (8, 4)}),
    (args.SingleshotTimer32, 12, {"flags": (8, 4)}),
    (args.RegisterVcpuInfo, 16, {"page_offset": (8, 4)}),
    (args.VcpuHvmContext, 128, {"mode": (0, 4), "rax": (8, 8), "rip": (72, 8), "efer": (112, 8)}),
    (args.HvmParam, 16, {"index": (4, 4), "value": (8, 8)}),
    (args.GetMemType, 16, {"mem_type": (2, 2), "pfn": (8, 8)}),
    (args.UpcallVector, 8, {"vector": (4, 1)}),
    (args.MapPirq, 40, {"type": (4, 4), "pirq": (12, 4), "table_base": (32, 8)}),
    (args.MapPirq32, 36, {"entry_nr": (24, 4), "table_base": (28, 8)}),
    (args.CompileInfo, 144, {"compile_by": (64, 16), "compile_date": (112, 32)}),
    (args.HvFlushEx, 32, {"set_format": (16, 8), "valid_bank_mask": (24, 8)}),
    (args.HvSendIpi, 16, {"target_vtl": (4, 1), "vcpu_mask": (8, 8)}),
    (args.HvSendIpiEx, 24, {"set_format": (8, 8), "valid_bank_mask": (16, 8)}),
    (args.PlatformStatus, 24, {"platform_flags": (4, 4), "version_minor": (20, 4)}),
]


@pytest.mark.parametrize(
    ("cls", "size", "fields"), SHARED + ARGUMENTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_sizes_and_offsets_are_the_headers(cls, size, fields):
    assert_offsets(cls, fields, size)


@given(st.sampled_from((*layout.LAYOUTS, *args.LAYOUTS)), st.data())
def test_any_bytes_make_the_round_trip(cls, data):
    raw = data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE))
    assert cls.from_bytes(raw).to_bytes() == raw


def test_both_widths_of_a_shape_have_the_same_fields():
    for wide, narrow in (
        (args.MemoryReservation, args.MemoryReservation32),
        (args.AddToPhysmap, args.AddToPhysmap32),
        (args.GrantCopy, args.GrantCopy32),
        (args.Poll, args.Poll32),
        (args.MapPirq, args.MapPirq32),
        (args.SingleshotTimer, args.SingleshotTimer32),
        (layout.MulticallEntry, layout.MulticallEntry32),
    ):
        assert list(wide.FIELDS) == list(narrow.FIELDS)


def test_the_channel_machine_has_a_way_to_every_state():
    assert not CHANNEL.unreachable()
