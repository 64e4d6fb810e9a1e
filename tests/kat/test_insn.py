"""Instruction decode and execution against two independent decoders and an independent processor."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from sevlab.plugins.io.decode import Insn, Undecodable, decode, effective_address

from tests.vectors import load_json, vector_set

FLIPS = {
    "decode.jsonl": ("len", "mnemonic", "operands", "memory", "io"),
    "exec.jsonl": ("trace", "regs_changed", "rip_after"),
    "negative.jsonl": ("expect", "len"),
}

FOLDER = vector_set("insn")
DECODE = [json.loads(line) for line in (FOLDER / "decode.jsonl").read_text().splitlines()]
NEGATIVE = [json.loads(line) for line in (FOLDER / "negative.jsonl").read_text().splitlines()]
REGISTERS = load_json(FOLDER / "regfile.json")
GPRS = {name: int(value, 16) for name, value in REGISTERS["gpr"].items()}
BASES = {name: int(value, 16) for name, value in REGISTERS["segment_base"].items()}
RIP = int(REGISTERS["rip"], 16)

ALIASES = {"AX": "RAX", "CX": "RCX", "DX": "RDX", "BX": "RBX", "SP": "RSP", "BP": "RBP", "SI": "RSI", "DI": "RDI"}


def register(name):
    if name in GPRS:
        return GPRS[name]
    if name.startswith("R"):
        return GPRS[name[:-1]] & {"D": 0xFFFF_FFFF, "W": 0xFFFF}[name[-1]]
    return GPRS["R" + name[1:]] & 0xFFFF_FFFF if name.startswith("E") else GPRS[ALIASES[name]] & 0xFFFF


def base(mode):
    def of(segment):
        if mode == 64 and segment in ("ES", "CS", "SS", "DS"):
            return 0
        return BASES[segment]

    return of


def memory_of(insn, mode):
    found = []
    for operand in insn.memory:
        offset, linear = effective_address(operand, register, base(mode), mode)
        found.append(
            {
                "segment": operand.segment,
                "base": operand.base or None,
                "rip_relative": operand.rip_relative,
                "index": operand.index_register or None,
                "scale": operand.scale,
                "displacement": hex(operand.displacement),
                "address_size": operand.address_size,
                "size": operand.size,
                "access": operand.access,
                "ea_offset": hex(offset),
                "ea_linear": hex(linear),
            }
        )
    return found


def operand_of(operand):
    found = {"kind": operand.kind, "access": operand.access}
    if operand.kind == "imm":
        return found | {"imm": hex(operand.immediate), "iced_kind": operand.immediate_kind}
    if operand.kind == "reg":
        found |= {"reg": operand.register}
    return found | {"size": operand.size}


def io_of(insn):
    port = insn.io
    dx = GPRS["RDX"]
    noseg = port.exit_info_1(dx, with_segment=False)
    handler = noseg
    if port.string:  # edk2 and Linux: ES for INS, DS for OUTS, whatever the override
        handler |= (0 if port.is_in else 3) << 10
    return {
        "direction": "in" if port.is_in else "out",
        "string": port.string,
        "size": port.size,
        "port": hex(noseg >> 16),
        "port_source": "dx" if port.port is None else "imm8",
        "rep": port.rep,
        "address_size": port.address_size,
        "segment": port.segment or None,
        "exitinfo1_noseg": hex(noseg),
        "seg_effective": port.exit_info_1(dx) >> 10 & 7 if port.string else None,
        "exitinfo1_guest_handler": hex(handler),
    }


def decoded(case):
    insn = decode(bytes.fromhex(case["hex"]), case["mode"], RIP)
    assert isinstance(insn, Insn), insn
    found = {
        "mode": insn.mode,
        "len": insn.length,
        "mnemonic": insn.mnemonic,
        "code": insn.code,
        "prefixes": list(insn.prefixes),
        "segment_override": insn.segment_override or None,
        "operands": [operand_of(operand) for operand in insn.operands],
        "memory": memory_of(insn, case["mode"]),
    }
    return found | ({"io": io_of(insn)} if insn.io else {})


@pytest.mark.parametrize("group", sorted({case["group"] for case in DECODE}))
@pytest.mark.parametrize("mode", [16, 32, 64])
def test_decoding_agrees_in_every_field(group, mode):
    cases = [case for case in DECODE if (case["group"], case["mode"]) == (group, mode)]
    ours = ("hex", "text", "group", "capstone", "id")
    wrong = {}
    for case in cases:
        expected = {name: value for name, value in case.items() if name not in ours}
        found = decoded(case)
        if found != expected:
            wrong[case["id"]] = {
                name: (found.get(name), expected.get(name))
                for name in expected | found
                if found.get(name) != expected.get(name)
            }
    print(f"{group} {mode}-bit: {len(cases)} instructions")
    assert not wrong, dict(list(wrong.items())[:5])


def test_truncated_invalid_and_long_instructions_are_told_apart():
    counts = Counter()
    wrong = []
    for case in NEGATIVE:
        insn = decode(bytes.fromhex(case["hex"]), case["mode"], RIP)
        if case["expect"] == "valid":
            right = isinstance(insn, Insn) and (insn.length, insn.mnemonic) == (case["len"], case["mnemonic"])
        else:
            right = insn == Undecodable(case["expect"])
        counts[case["expect"]] += 1
        if not right:
            wrong.append((case, insn))
    print(dict(counts))
    assert not wrong, wrong[:5]
    assert sum(counts.values()) == len(NEGATIVE)


# Execution --------------------------------------------------------------------------------------------------------

EXEC = [json.loads(line) for line in (FOLDER / "exec.jsonl").read_text().splitlines()]


class TraceBus:
    """Gives the recorded input and writes down every access as the vectors do.

    The processor that made the vectors stores zeros to the destination of INS before it takes the datum; what that
    shows is that the destination is checked first, which is what `probe` is.
    """

    def __init__(self, case):
        self.inputs = [entry for entry in case["trace"] if entry["t"] in ("mem_read", "io_in")]
        self.trace = []

    def _input(self, kind):
        assert self.inputs, f"an access too many: {kind}"
        assert self.inputs[0]["t"] == kind
        return int.from_bytes(bytes.fromhex(self.inputs.pop(0)["data"]), "little")

    def _log(self, kind, where, address, size, value):
        data = value.to_bytes(size, "little").hex()
        self.trace.append({"t": kind, where: hex(address), "size": size, "data": data})

    def read(self, linear, size):
        value = self._input("mem_read")
        self._log("mem_read", "addr", linear, size, value)
        return value

    def write(self, linear, size, value):
        self._log("mem_write", "addr", linear, size, value)

    def probe(self, linear, size):
        self._log("mem_write", "addr", linear, size, 0)

    def port_in(self, port, size):
        value = self._input("io_in")
        self._log("io_in", "port", port, size, value)
        return value

    def port_out(self, port, size, value):
        self._log("io_out", "port", port, size, value)


def executed(case):
    from sevlab.core.cpu import Registers, SystemRegisters
    from sevlab.plugins.io.emulate import Executed, execute

    wide = case["mode"] == 64
    start = {name.lower(): value if wide else value & 0xFFFF_FFFF for name, value in GPRS.items()}
    registers = Registers(**start, rip=RIP)
    segments = {name.lower(): (0, 0, 0, BASES[name] if wide else 0) for name in BASES}
    bus = TraceBus(case)
    insn = decode(bytes.fromhex(case["hex"]), case["mode"], RIP)
    result = execute(insn, registers, SystemRegisters(**segments), bus)
    assert isinstance(result, Executed), (case["text"], result)
    changed = {
        name.upper(): hex(getattr(registers, name))
        for name, value in start.items()
        if getattr(registers, name) != value
    }
    return {"trace": bus.trace, "regs_changed": changed, "rip_after": hex(registers.rip)}


@pytest.mark.parametrize("group", ["io", "mmio"])
@pytest.mark.parametrize("mode", [32, 64])
def test_execution_agrees_in_accesses_registers_and_rip(group, mode):
    cases = [case for case in EXEC if case["mode"] == mode and case["id"].startswith(f"{group}-")]
    wrong = []
    for case in cases:
        found = executed(case)
        if found != {name: case[name] for name in found}:
            wrong.append((case["id"], case["text"], found, {name: case[name] for name in found}))
    print(f"{group} {mode}-bit: {len(cases)} executed")
    assert not wrong, (len(wrong), wrong[:3])
    assert cases


# Counts -----------------------------------------------------------------------------------------------------------


def test_every_vector_of_every_class_is_read(capsys):
    """The parametrised tests above partition the files: what they take adds up to the whole."""
    decoded_by = Counter(f"{case['group']}, {case['mode']}-bit" for case in DECODE)
    executed_by = Counter(f"{case['id'].partition('-')[0]}, {case['mode']}-bit" for case in EXEC)
    refused_by = Counter(case["expect"] for case in NEGATIVE)
    with capsys.disabled():
        print()
        for name, counts in (("decode", decoded_by), ("exec", executed_by), ("negative", refused_by)):
            print(f"insn/{name}: {counts.total()} ({', '.join(f'{key} {n}' for key, n in sorted(counts.items()))})")
    assert (decoded_by.total(), executed_by.total(), refused_by.total()) == (2090, 1143, 218)
    assert {key.partition(", ")[0] for key in executed_by} == {"io", "mmio"}
    assert {key.partition(", ")[2] for key in executed_by} == {"32-bit", "64-bit"}
