"""SME: memory encryption for the host with one key per boot.

Documents: 24593 (APM volume 2) revision 3.42, section 7.10; Linux arch/x86/mm/mem_encrypt_identity.c for the
procedure that encrypts memory in place.

What you may touch: `SysCfg` (the SYSCFG register), `encrypt_in_place` and `decrypt_in_place` (the procedure as a
driver does it, step by step), `install_key` and `remove_key` (the memory controller's key slots, which features that
encrypt guests fill). The plugin owns the slot `key_of`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cliapi import DemoChapter
from sevlab.core.config import Option
from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.sme.handlers import install_key, register, remove_key
from sevlab.plugins.sme.inplace import decrypt_in_place, encrypt_in_place
from sevlab.plugins.sme.layout import SYSCFG, SmeCpuid, SysCfg
from sevlab.plugins.sme.states import PAGE_IN_PLACE, SmeState, sme_state

if TYPE_CHECKING:
    from typing import Any

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.layout import Layout
    from sevlab.core.statemachine import StateMachine

REQUIRES: tuple[str, ...] = ()

__all__ = [
    "PAGE_IN_PLACE",
    "SYSCFG",
    "SmeCpuid",
    "SmeState",
    "SysCfg",
    "decrypt_in_place",
    "encrypt_in_place",
    "install_key",
    "remove_key",
    "sme_state",
]


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return (Option(name="enabled", default=False, doc="SYSCFG.MemEncryptionModEn is already set when the host starts"),)


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    register(builder)


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (SysCfg, SmeCpuid)


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (PAGE_IN_PLACE,)


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (
        DemoChapter(
            "sme",
            "SME: a page encrypted in place, and what each side sees of it",
            10,
            "sevlab.plugins.sme.demo:chapter",
        ),
    )
