"""Guest messages, sequence numbers, ID blocks and certificate tables against answers that were made elsewhere."""

from __future__ import annotations

import pytest
from sevlab.core.errors import FormatError
from sevlab.plugins.sev import Status
from sevlab.plugins.snp.cert_table import GUIDS, build_cert_table, page_count, parse_cert_table
from sevlab.plugins.snp.id_block import IdAuth, IdBlock, check_id_block, key_digest, read_id_auth, read_id_block
from sevlab.plugins.snp.messages import AAD, HEADER_BYTES, MessageHeader, nonce, open_message, seal

from tests.plugins.snp.support import ask, context, running, snp_machine
from tests.vectors import load_json, vector_set

MESSAGES = load_json(vector_set("snp") / "guest_messages.json")
FOLDER = vector_set("snp")
ID = load_json(FOLDER / "idblock/expected.json")
TABLES = load_json(FOLDER / "cert_table.json")
SEQUENCES = load_json(vector_set("snp") / "sequence.json")
FLIPS = {
    "guest_messages.json": ("layout", "plaintext", "message", "expect", "aad", "iv"),
    "sequence.json": ("accept", "firmware_count_before", "request"),
    "idblock/expected.json": ("id_key_digest", "author_key_digest", "launch_digest", "id_block_sig_ok"),
    "cert_table.json": ("guid", "offset", "length", "data", "npages"),
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


# ID blocks and certificate tables -----------------------------------------------------------------------------------


def results(block, auth):
    """What the expected file says, from the checks."""
    checks = {(check.subject, check.field): check for check in check_id_block(block, auth)}
    keys = IdAuth.from_bytes(auth)
    return {
        "id_key_algo": keys.id_key_algo,
        "auth_key_algo": keys.auth_key_algo,
        "id_key_curve": int(checks["ID key", "curve"].got),
        "author_key_curve": int(checks["author key", "curve"].got),
        "id_block_sig_ok": checks["ID block", "signature by ID key"].passed,
        "id_key_sig_ok": checks["ID key", "signature by author key"].passed,
        "id_key_digest": key_digest(keys.id_key).hex(),
        "author_key_digest": key_digest(keys.author_key).hex(),
    }


@pytest.mark.parametrize("layout", ["id_block", "id_auth"])
def test_offsets_are_those_of_the_vectors(layout):
    expected = dict(ID[f"layout_{layout}"])
    size = expected.pop("size", None)
    names = {"ld": "launch_digest", "version": "block_version"}
    cls = {"id_block": IdBlock, "id_auth": IdAuth}[layout]
    assert size in {None, cls.SIZE}
    for name, (offset, length) in expected.items():
        info = cls.FIELDS[names.get(name, name)]
        assert (info.offset, info.length_bytes) == (offset, length), name


@pytest.mark.parametrize("case", ID["cases"], ids=lambda case: case["id"])
def test_id_blocks_and_their_authentication(case):
    block = bytes.fromhex(case["id_block"])
    auth = (FOLDER / "idblock" / case["id_auth_file"]).read_bytes()
    assert read_id_block(block).launch_digest.hex() == case["launch_digest"]
    assert read_id_auth(auth).to_bytes() == auth
    assert results(block, auth) == case["expected"]
    assert all(check.passed for check in check_id_block(block, auth))


@pytest.mark.parametrize("case", ID["cases"], ids=lambda case: case["id"])
def test_changed_id_blocks(case):
    auth = (FOLDER / "idblock" / case["id_auth_file"]).read_bytes()
    for mutation in case["mutations"]:
        images = {"id_block": bytearray.fromhex(case["id_block"]), "id_auth": bytearray(auth)}
        images[mutation["where"]][int(mutation["offset"], 16)] ^= mutation["xor"]
        got = results(bytes(images["id_block"]), bytes(images["id_auth"]))
        for name in ("id_block_sig_ok", "id_key_sig_ok"):
            assert name not in mutation or got[name] == mutation[name], mutation
        checks = check_id_block(bytes(images["id_block"]), bytes(images["id_auth"]))
        assert not all(check.passed for check in checks), mutation


def test_the_published_id_block():
    case = ID["published"]
    block = bytes.fromhex(case["id_block"])
    auth = (FOLDER / "idblock" / case["id_auth_file"]).read_bytes()
    assert read_id_block(block).launch_digest.hex() == case["launch_digest"]
    assert results(block, auth) == case["computed_check_of_published_auth_block"]
    keys = IdAuth.from_bytes(auth)
    assert key_digest(keys.id_key).hex() == case["id_key_digest"]
    assert key_digest(keys.author_key).hex() == case["auth_key_digest"]


@pytest.mark.parametrize("case", TABLES["cases"], ids=range(len(TABLES["cases"])))
def test_certificate_tables(case):
    blob = bytes.fromhex(case["blob"])
    entries = parse_cert_table(blob)
    got = [
        {
            "kind": entry.kind or "x",
            "guid": entry.guid,
            "offset": entry.offset,
            "length": len(entry.data),
            "data": entry.data.hex(),
        }
        for entry in entries
    ]
    assert got == case["entries"]
    assert build_cert_table((entry.guid, entry.data) for entry in entries) == blob
    assert page_count(blob) == case["npages"]


@pytest.mark.parametrize("case", TABLES["must_reject"], ids=lambda case: case["why"])
def test_malformed_certificate_tables_are_refused(case):
    with pytest.raises(FormatError, match="f: offset 0x"):
        parse_cert_table(bytes.fromhex(case["blob"]), "f")


def test_the_guids_of_the_entries():
    assert TABLES["guids"] == GUIDS
