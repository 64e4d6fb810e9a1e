"""Guest messages and sequence numbers against messages that were sealed elsewhere."""

from __future__ import annotations

import pytest
from sevlab.plugins.sev import Status
from sevlab.plugins.snp.messages import AAD, HEADER_BYTES, MessageHeader, nonce, open_message, seal

from tests.plugins.snp.support import ask, context, running, snp_machine
from tests.vectors import load_json, vector_set

MESSAGES = load_json(vector_set("snp") / "guest_messages.json")
SEQUENCES = load_json(vector_set("snp") / "sequence.json")
FLIPS = {
    "guest_messages.json": ("layout", "plaintext", "message", "expect", "aad", "iv"),
    "sequence.json": ("accept", "firmware_count_before", "request"),
}


def test_the_header_is_the_published_one():
    names = {"authtag": "authtag"} | {name: name for name in MessageHeader.FIELDS}
    for name, (offset, length) in MESSAGES["layout"].items():
        if name.startswith("rsvd") or name == "payload":
            continue
        info = MessageHeader.FIELDS[names[name]]
        assert (info.offset, info.length_bytes) == (offset, length), name
    assert MESSAGES["layout"]["payload"] == [HEADER_BYTES, None]
    assert [int(edge, 16) for edge in MESSAGES["aad_range"]] == [AAD.start, AAD.stop]
    assert MESSAGES["tag_len"] == 16


@pytest.mark.parametrize("case", MESSAGES["messages"], ids=lambda case: case["id"])
def test_a_message_opens_or_is_refused(case):
    key, message = bytes.fromhex(case["vmpck"]), bytes.fromhex(case["message"])
    payload = bytes.fromhex(case["plaintext"])
    header = MessageHeader.from_bytes(message[:HEADER_BYTES])
    opened = open_message(key, message)
    if case["expect"] == "reject":
        assert opened is None
        return
    assert opened.payload == payload
    if case["expect"] == "unauthenticated_field":
        return
    assert case["expect"] == "ok"
    assert (header.msg_seqno, header.msg_type, header.msg_version) == (
        case["msg_seqno"],
        case["msg_type"],
        case["msg_version"],
    )
    assert header.msg_vmpck == case["vmpck_id"]
    assert nonce(header.msg_seqno).hex() == case["iv"]
    assert message[AAD].hex() == case["aad"]
    ours = seal(
        key,
        payload,
        seqno=case["msg_seqno"],
        kind=case["msg_type"],
        vmpck=case["vmpck_id"],
        version=case["msg_version"],
    )
    assert ours == message


@pytest.fixture(scope="module")
def guest_machine():
    machine = snp_machine()
    guest = running(machine)
    machine.mark()
    return machine, guest


@pytest.mark.parametrize("sequence", SEQUENCES["sequences"], ids=lambda sequence: sequence["vmpck"][:8])
def test_the_firmware_takes_each_number_once_and_in_order(guest_machine, sequence):
    machine, guest = guest_machine
    machine.reset()
    state, number = context(machine, guest), sequence["vmpck_id"]
    keys = list(state.vmpcks)
    keys[number] = bytes.fromhex(sequence["vmpck"])
    state.vmpcks = tuple(keys)
    for step in sequence["steps"]:
        assert state.message_counts[number] == step["firmware_count_before"]
        status, response = ask(machine, guest, bytes.fromhex(step["request"]))
        assert (status == Status.SUCCESS) is step["accept"], step["kind"]
        if step["accept"]:
            header = MessageHeader.from_bytes(response[:HEADER_BYTES])
            assert (header.msg_seqno, header.msg_type) == (step["msg_seqno"] + 1, 6)
            assert open_message(keys[number], response) is not None
        else:
            assert status in (Status.AEAD_OFLOW, Status.BAD_MEASUREMENT)
