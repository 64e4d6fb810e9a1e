"""A plugin with a fault, for tests: WBINVD by the GHCB reads past its window."""

from __future__ import annotations

from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.sev_es import ghcb_window

REQUIRES = ("sev_es",)
WBINVD = 0x89


@hookimpl
def sevlab_register(builder):
    def make(event):
        def run(machine, vcpu, ghcb, scratch):
            if ghcb.sw_exit_info_2 & 1:
                ghcb_window(machine, vcpu).read(4090, 8)
            return event.handler(machine, vcpu, ghcb, scratch)

        return event._replace(handler=run)

    builder.nae_events.replace(WBINVD, make)
