"""ID blocks that we make pass every check; without an author there is no author's line."""

from __future__ import annotations

import pytest
from sevlab.core.errors import FormatError
from sevlab.plugins.snp.id_block import IdAuth, IdBlock, check_id_block, make_id_auth, read_id_auth, read_id_block

BLOCK = IdBlock.build(launch_digest=b"d" * 48, block_version=1, guest_svn=3, policy=0x30000)


def test_a_block_that_we_sign_passes_every_check():
    auth = make_id_auth(BLOCK, id_key=11, author_key=12)
    assert all(check.passed for check in check_id_block(BLOCK, auth))
    assert make_id_auth(BLOCK, id_key=11, author_key=12) == auth
    assert len(check_id_block(BLOCK, auth)) == 8
    assert read_id_auth(auth).to_bytes() == auth


def test_without_an_author_only_the_id_key_is_checked():
    auth = make_id_auth(BLOCK, id_key=11)
    checks = check_id_block(BLOCK, auth)
    assert all(check.passed for check in checks)
    assert {check.subject for check in checks} == {"ID key", "ID block"}


def test_another_block_or_a_reserved_byte_fails_its_line():
    auth = make_id_auth(BLOCK, id_key=11, author_key=12)
    other = IdBlock.from_bytes(BLOCK).replace(guest_svn=4).to_bytes()
    failed = [check.field for check in check_id_block(other, auth) if not check.passed]
    assert failed == ["signature by ID key"]
    changed = bytearray(auth)
    changed[0xFFF] = 1
    assert [check.field for check in check_id_block(BLOCK, bytes(changed)) if not check.passed] == ["reserved_c84"]
    with pytest.raises(FormatError, match=r"offset 0xc84, IdAuth.reserved_c84: expected all zero"):
        read_id_auth(bytes(changed))
    with pytest.raises(FormatError, match=r"offset 0x50, IdBlock.block_version: expected one of 0x1, found 0x2"):
        read_id_block(IdBlock.build(block_version=2))
    assert IdAuth.from_bytes(bytes(changed)).id_key_algo == 1
