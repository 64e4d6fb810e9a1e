"""The dictionary of a target for other engines: what layouts and messages declare, in libFuzzer's and AFL's form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sevlab.core.layout_tools import dictionary
from sevlab.core.payload import Payload
from sevlab.fuzz.codec import Codec


def tokens(payloads: Iterable[Payload], codec: Codec) -> Iterator[bytes]:
    """Byte strings worth trying, each once: values of fields, numbers of messages, words."""
    found: dict[bytes, None] = {}
    for payload in payloads:
        layouts = dict.fromkeys(message.layout for message in payload.messages if message.layout is not None)
        for layout in layouts:
            found |= dict.fromkeys(dictionary(layout))
        for message in payload.messages:
            found[message.number.to_bytes(8, "little").rstrip(b"\0") or b"\0"] = None
    found |= dict.fromkeys(bytes((number,)) for number in range(len(codec.kinds)))
    yield from (token for token in found if token)


def write_dictionary(payloads: Iterable[Payload], codec: Codec) -> str:
    """The text of a dictionary file. Source: LLVM, libFuzzer documentation, dictionaries."""
    lines = ['"' + "".join(f"\\x{byte:02x}" for byte in token) + '"' for token in tokens(payloads, codec)]
    return "\n".join(lines) + "\n"
