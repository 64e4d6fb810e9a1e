"""Error roots, by blame.

Three kinds of things can go wrong and each has its own form:

1. What the architecture rejects is a *value* (a firmware status, a GHCB reason, a `Fault`): no class here.
2. What the user of sevlab got wrong is a `SevlabError`: it says what, where and what was expected.
3. What must never happen is an `InvariantViolation`: our bug, or what an oracle looks for.

This module imports nothing, so that everything may import it.
"""


class SevlabError(Exception):
    """The user's side is wrong; the message says what, where, and what was expected."""


class ConfigError(SevlabError):
    """A machine configuration or a command-line value cannot be used."""


class PluginError(SevlabError):
    """A plugin cannot be loaded or registers something that it may not."""


class LayoutError(SevlabError):
    """A layout is declared or used against its own rules."""


class FormatError(SevlabError):
    """Bytes that the user gave are not what they should be: which file, offset, field, what was expected and found."""

    def __init__(self, name: str, offset: int, field: str, *, expected: str, found: str) -> None:
        super().__init__(f"{name}: offset {offset:#x}, {field}: expected {expected}, found {found}")
        self.name = name
        self.offset = offset
        self.field = field
        self.expected = expected
        self.found = found


class TraceFormatError(SevlabError):
    """A trace or a record cannot be read."""


class TraceDivergence(SevlabError):
    """A replay gave another outcome than the trace recorded."""


class CampaignError(SevlabError):
    """A fuzzing campaign cannot be opened or continued."""


class InvariantViolation(Exception):
    """A rule of the model was broken: our bug, or the finding of an oracle.

    Arguments: `rule` is the short stable name that findings are grouped by, `message` what happened.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message
