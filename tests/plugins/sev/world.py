"""A machine with a guest in any state, an owner whose keys the test knows, and a valid buffer for every command."""

from __future__ import annotations

from sevlab.core.config import GuestConfig
from sevlab.core.events import AspCommand, AspStatus
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, GuestState, Policy, Status, crypto, driver
from sevlab.plugins.sev.certificates import Usage
from sevlab.plugins.sev.chain import make_certificate
from sevlab.plugins.sev.crypto import Context, Point, TransportKeys
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, CHAIN_BYTES, PacketHeader

PAGE = 4096
PLAINTEXT = bytes(range(256)) * 16
VMSA = bytes(range(255, -1, -1)) * 16
KEYS = TransportKeys(b"owner's TEK 0016", b"owner's TIK 0016")
OWNER_SCALAR = 0x1234567
MEMORY = GuestConfig(memory_bytes=1 << 20)


def quiet(machine):
    """Everything but the mailbox registers and the page with the command buffer."""
    state, memory = machine.snapshot()
    command_page = driver.scratch_page(machine) // PAGE
    return (
        [(name, image) for name, image in state.values if name != "asp"],
        memory.keys,
        [(pfn, page) for pfn, page in memory.pages if pfn != command_page],
    )


def rejected(machine, command, **fields):
    """Run a command that must fail; returns the status after asserting that nothing else happened."""
    driver.scratch_page(machine)
    before = quiet(machine)
    status = sev.run(machine, command, **fields).status
    assert status, f"{command.name} succeeded"
    assert quiet(machine) == before, f"{command.name} failed with {Status(status).name} and changed something"
    return status


class World:
    """One machine with VM 0 as guest; `place(n)` is the n-th page of the driver's memory (0: the command buffer)."""

    def __init__(self, policy=Policy.ES, **settings):
        self.machine = make_machine("sev", guests=(MEMORY, MEMORY), **settings)
        self.policy = policy
        self.handle = 0
        self.guest = None
        sev.initialise(self.machine, es=True)
        self.vm = self.machine.hypervisor.vms[0]
        self.vmsa_spa = self.machine.hypervisor.allocate_pages(1)

    def place(self, number):
        return driver.scratch_page(self.machine) + number * PAGE

    def run(self, command, **fields):
        return sev.run(self.machine, command, **fields)

    def need(self, command, **fields):
        return sev.need(self.machine, command, **fields)

    def put(self, number, data):
        driver.put(self.machine, self.place(number), data)
        return self.place(number)

    def export(self):
        """The platform's PDH certificate and its chain."""
        self.need(
            Command.PDH_CERT_EXPORT,
            pdh_spa=self.place(12),
            pdh_bytes=CERTIFICATE_BYTES,
            chain_spa=self.place(13),
            chain_bytes=CHAIN_BYTES,
        )
        return (
            driver.get(self.machine, self.place(12), CERTIFICATE_BYTES),
            driver.get(self.machine, self.place(13), CHAIN_BYTES),
        )

    def session(self, policy, keys=KEYS):
        """(certificate, session buffer) of an owner who gives the platform these keys."""
        pdh = sev.sev_state(self.machine).identity.pdh
        own = crypto.public_point(OWNER_SCALAR)
        certificate = make_certificate(Usage.PDH, Point(*own), api=(1, 55)).to_bytes()
        shared = crypto.ecdh(OWNER_SCALAR, crypto.public_point(pdh))
        return certificate, crypto.wrap_session(shared, b"nonce of session", b"iv of the wrap..", keys, policy)

    def start_fields(self, policy=None, keys=KEYS):
        policy = self.policy if policy is None else policy
        certificate, session = self.session(policy, keys)
        return {
            "policy": policy,
            "dh_spa": self.put(10, certificate),
            "dh_bytes": len(certificate),
            "session_spa": self.put(11, session),
            "session_bytes": len(session),
        }

    def reach(self, state):
        """Bring VM 0 to `state`; a launched guest has data at guest-physical 0 and a VMSA."""
        machine, es = self.machine, bool(self.policy & Policy.ES)
        if state is GuestState.RUPDATE:
            self.handle = self.need(Command.RECEIVE_START, **self.start_fields()).handle
            self.guest = driver.activate(machine, 0, self.handle, es=es)
            return self
        certificate, session = self.session(self.policy)
        self.guest = sev.begin_launch(machine, 0, policy=self.policy, dh_certificate=certificate, session=session)
        self.handle = self.guest.handle
        driver.load(machine, self.vm, self.guest, 0, PLAINTEXT)
        if es:
            driver.put(machine, self.vmsa_spa, VMSA)
            self.need(Command.LAUNCH_UPDATE_VMSA, handle=self.handle, spa=self.vmsa_spa, length=PAGE)
        for step, command, fields in (
            (GuestState.LSECRET, Command.LAUNCH_MEASURE, None),
            (GuestState.RUNNING, Command.LAUNCH_FINISH, None),
            (GuestState.SUPDATE, Command.SEND_START, None),
            (GuestState.SENT, Command.SEND_FINISH, None),
        ):
            if state < step and state is not GuestState.SENT:
                break
            self.need(command, **(fields or self.fields(command)))
        return self

    def packet(self, context, plaintext, measure=b""):
        guest = sev.sev_state(self.machine).guests.get(self.handle)
        keys = KEYS if guest is None else guest.keys
        header, ciphertext = crypto.seal_packet(keys, context, plaintext, iv=b"iv of the packet", measure=measure)
        return {
            "header_spa": self.put(4, header),
            "header_bytes": PacketHeader.SIZE,
            "guest_bytes": len(plaintext),
            "transport_spa": self.put(5, ciphertext),
            "transport_bytes": len(ciphertext),
        }

    def fields(self, command):
        """A buffer with which `command` succeeds for VM 0's guest, if the states allow it."""
        spa = self.vm.memory_spa
        guest = {"handle": self.handle}
        blob = {"spa": self.place(6), "length": PAGE}
        match command:
            case Command.INIT | Command.INIT_EX:
                tmr = self.machine.components["sev.driver"].tmr_spa
                extra = {"length": 0x24} if command is Command.INIT_EX else {}
                return {"es": 1, "tmr_spa": tmr, "tmr_bytes": 1 << 20} | extra
            case Command.PEK_CSR | Command.GET_ID:
                return blob
            case Command.PDH_CERT_EXPORT:
                return {
                    "pdh_spa": self.place(6),
                    "pdh_bytes": CERTIFICATE_BYTES,
                    "chain_spa": self.place(7),
                    "chain_bytes": CHAIN_BYTES,
                }
            case Command.LAUNCH_START | Command.RECEIVE_START:
                return self.start_fields()
            case Command.ACTIVATE:
                return guest | {"asid": 7 if self.policy & Policy.ES else 300}
            case Command.ACTIVATE_EX:
                ids = self.put(6, (0).to_bytes(4, "little"))
                return guest | {"length": 0x18, "asid": 8, "id_count": 1, "ids_spa": ids}
            case Command.COPY:
                return guest | {"length": PAGE, "source_spa": spa, "destination_spa": spa + 8 * PAGE}
            case Command.LAUNCH_UPDATE_DATA:
                return guest | {"spa": spa + 2 * PAGE, "length": PAGE}
            case Command.LAUNCH_UPDATE_VMSA:
                return guest | {"spa": spa + 3 * PAGE, "length": PAGE}
            case Command.LAUNCH_MEASURE:
                return guest | {"spa": self.place(6), "length": 0x30}
            case Command.LAUNCH_SECRET:
                context = sev.sev_state(self.machine).guests.get(self.handle)
                measure = bytes(32) if context is None else context.measure
                packet = self.packet(Context.LAUNCH_SECRET, PLAINTEXT[:64], measure)
                return guest | {"guest_spa": spa + 4 * PAGE} | packet
            case Command.ATTESTATION:
                return guest | {"spa": self.place(6), "length": 0xD0, "mnonce": b"caller's nonce 1"}
            case Command.SEND_START:
                pdh, _ = self.export()
                return guest | {
                    "pdh_spa": self.put(6, pdh),
                    "pdh_bytes": len(pdh),
                    "session_spa": self.place(8),
                    "session_bytes": 0x80,
                }
            case Command.SEND_UPDATE_DATA | Command.SEND_UPDATE_VMSA:
                vmsa = command is Command.SEND_UPDATE_VMSA
                return guest | {
                    "header_spa": self.place(4),
                    "header_bytes": PacketHeader.SIZE,
                    "guest_spa": self.vmsa_spa if vmsa else spa,
                    "guest_bytes": PAGE,
                    "transport_spa": self.place(5),
                    "transport_bytes": PAGE,
                }
            case Command.RECEIVE_UPDATE_DATA | Command.RECEIVE_UPDATE_VMSA:
                vmsa = command is Command.RECEIVE_UPDATE_VMSA
                where = {"guest_spa": self.vmsa_spa if vmsa else spa}
                return guest | where | self.packet(Context.DATA, VMSA if vmsa else PLAINTEXT)
            case Command.DBG_DECRYPT:
                return guest | {"source_spa": spa, "destination_spa": self.place(6), "length": 256}
            case Command.DBG_ENCRYPT:
                return guest | {"source_spa": self.place(6), "destination_spa": spa + 5 * PAGE, "length": 256}
            case Command.SWAP_OUT | Command.SWAP_IN:
                places = {"mdata_spa": self.place(9)}
                if command is Command.SWAP_OUT:
                    return guest | places | {"source_spa": spa, "destination_spa": self.place(7)}
                return guest | places | {"source_spa": self.place(7), "destination_spa": spa + 6 * PAGE}
            case Command.RING_BUFFER:
                return {"low_commands_spa": self.place(8), "low_statuses_spa": self.place(9), "low_pages": 1}
            case _:
                layout = driver.BUFFERS[command]
                return guest if layout is not None and "handle" in layout.FIELDS else {}


def raw(machine, command, spa, data=b""):
    """Status of a command with any bytes as buffer at any address."""
    answer = machine.apply(AspCommand("sev", command, spa, data)).first(AspStatus)
    return None if answer is None else answer.status
