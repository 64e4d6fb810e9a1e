"""Numbers of the hypercall ABI: calls, sub-operations, errors, domain ids, VIRQs, parameters.

Source: Xen xen/include/public/{xen,errno,memory,event_channel,grant_table,sched,vcpu,version,physdev}.h,
hvm/{hvm_op,params}.h; numbers 43 and the flag 0x40000000 from Vates's series (not upstream).
"""

from __future__ import annotations

from enum import IntEnum


class Nr(IntEnum):
    """Hypercall numbers."""

    SET_TRAP_TABLE = 0
    MMU_UPDATE = 1
    SET_GDT = 2
    STACK_SWITCH = 3
    SET_CALLBACKS = 4
    FPU_TASKSWITCH = 5
    SCHED_OP_COMPAT = 6
    PLATFORM_OP = 7
    SET_DEBUGREG = 8
    GET_DEBUGREG = 9
    UPDATE_DESCRIPTOR = 10
    MEMORY_OP = 12
    MULTICALL = 13
    UPDATE_VA_MAPPING = 14
    SET_TIMER_OP = 15
    EVENT_CHANNEL_OP_COMPAT = 16
    XEN_VERSION = 17
    CONSOLE_IO = 18
    PHYSDEV_OP_COMPAT = 19
    GRANT_TABLE_OP = 20
    VM_ASSIST = 21
    UPDATE_VA_MAPPING_OTHERDOMAIN = 22
    IRET = 23
    VCPU_OP = 24
    SET_SEGMENT_BASE = 25
    MMUEXT_OP = 26
    XSM_OP = 27
    NMI_OP = 28
    SCHED_OP = 29
    CALLBACK_OP = 30
    XENOPROF_OP = 31
    EVENT_CHANNEL_OP = 32
    PHYSDEV_OP = 33
    HVM_OP = 34
    SYSCTL = 35
    DOMCTL = 36
    KEXEC_OP = 37
    TMEM_OP = 38
    ARGO_OP = 39
    XENPMU_OP = 40
    DM_OP = 41
    HYPFS_OP = 42
    COCO_OP = 43
    ARCH_0 = 48
    ARCH_1 = 49


STUBS = 128
"""Slots of a hypercall page."""

ABI_FLAG = 0x4000_0000
"""The physical-address ABI or FastABI instead of the legacy one; both series claim the same bit."""
HYPERV_FLAG = 0x8000_0000
"""With Hyper-V leaves, numbers with this bit are Hyper-V's."""


class Errno(IntEnum):
    """Xen's errors; a hypercall returns them negated."""

    EPERM = 1
    ENOENT = 2
    ESRCH = 3
    EIO = 5
    ENXIO = 6
    E2BIG = 7
    EAGAIN = 11
    ENOMEM = 12
    EACCES = 13
    EFAULT = 14
    EBUSY = 16
    EEXIST = 17
    EXDEV = 18
    ENODEV = 19
    EINVAL = 22
    ENOSPC = 28
    EDOM = 33
    ERANGE = 34
    ENOSYS = 38
    ENODATA = 61
    EOVERFLOW = 75
    EILSEQ = 84
    ERESTART = 85
    EMSGSIZE = 90
    EOPNOTSUPP = 95
    ENOBUFS = 105
    ETIMEDOUT = 110


class Gntst(IntEnum):
    """The status of one grant operation; negated in memory."""

    OKAY = 0
    GENERAL_ERROR = 1
    BAD_DOMAIN = 2
    BAD_GNTREF = 3
    BAD_HANDLE = 4
    BAD_VIRT_ADDR = 5
    BAD_DEV_ADDR = 6
    NO_DEVICE_SPACE = 7
    PERMISSION_DENIED = 8
    BAD_PAGE = 9
    BAD_COPY_ARG = 10
    ADDRESS_TOO_BIG = 11
    EAGAIN = 12
    NO_SPACE = 13


class Domid(IntEnum):
    """Domain ids that name no domain in particular."""

    SELF = 0x7FF0
    IO = 0x7FF1
    XEN = 0x7FF2
    COW = 0x7FF3
    INVALID = 0x7FF4
    ANY = 0x7FF5
    IDLE = 0x7FFF


class Virq(IntEnum):
    """Virtual interrupts that have a name."""

    TIMER = 0
    DEBUG = 1
    CONSOLE = 2
    DOM_EXC = 3
    TBUF = 4
    DEBUGGER = 6
    XENOPROF = 7
    CON_RING = 8
    PCPU_STATE = 9
    MEM_EVENT = 10
    ARGO = 11
    ENOMEM = 12
    XENPMU = 13


NR_VIRQS = 24
PER_VCPU_VIRQS = frozenset((Virq.TIMER, Virq.DEBUG, Virq.XENOPROF, Virq.XENPMU))
DOMAIN_VIRQS = frozenset((Virq.ARGO,))
"""All others are global: they belong to the control domain. Source: xen/common/event_channel.c, get_virq_type."""


class Memop(IntEnum):
    """Operations of memory_op."""

    INCREASE_RESERVATION = 0
    DECREASE_RESERVATION = 1
    MAXIMUM_RAM_PAGE = 2
    CURRENT_RESERVATION = 3
    MAXIMUM_RESERVATION = 4
    MACHPHYS_MFN_LIST = 5
    POPULATE_PHYSMAP = 6
    ADD_TO_PHYSMAP = 7
    MEMORY_MAP = 9
    MACHINE_MEMORY_MAP = 10
    EXCHANGE = 11
    MACHPHYS_MAPPING = 12
    SET_MEMORY_MAP = 13
    MAXIMUM_GPFN = 14
    REMOVE_FROM_PHYSMAP = 15
    SET_POD_TARGET = 16
    GET_POD_TARGET = 17
    ACCESS_OP = 21
    SHARING_OP = 22
    ADD_TO_PHYSMAP_BATCH = 23
    CLAIM_PAGES = 24
    GET_VNUMAINFO = 26
    RESERVED_DEVICE_MEMORY_MAP = 27
    ACQUIRE_RESOURCE = 28


MEMOP_EXTENT_SHIFT = 6
"""Bits of a memory_op command above this are the start extent of a continuation."""


class MapSpace(IntEnum):
    """What add_to_physmap maps."""

    SHARED_INFO = 0
    GRANT_TABLE = 1
    GMFN = 2
    GMFN_RANGE = 3
    GMFN_FOREIGN = 4
    DEV_MMIO = 5


MAP_STATUS_FRAMES = 1 << 31
"""Index bit of MapSpace.GRANT_TABLE: status frames."""


class Evtchnop(IntEnum):
    """Operations of event_channel_op."""

    BIND_INTERDOMAIN = 0
    BIND_VIRQ = 1
    BIND_PIRQ = 2
    CLOSE = 3
    SEND = 4
    STATUS = 5
    ALLOC_UNBOUND = 6
    BIND_IPI = 7
    BIND_VCPU = 8
    UNMASK = 9
    RESET = 10
    INIT_CONTROL = 11
    EXPAND_ARRAY = 12
    SET_PRIORITY = 13
    RESET_CONT = 14


class Gnttabop(IntEnum):
    """Operations of grant_table_op."""

    MAP_GRANT_REF = 0
    UNMAP_GRANT_REF = 1
    SETUP_TABLE = 2
    DUMP_TABLE = 3
    TRANSFER = 4
    COPY = 5
    QUERY_SIZE = 6
    UNMAP_AND_REPLACE = 7
    SET_VERSION = 8
    GET_STATUS_FRAMES = 9
    GET_VERSION = 10
    SWAP_GRANT_REF = 11
    CACHE_FLUSH = 12


class Gtf(IntEnum):
    """Flags of a grant entry."""

    PERMIT_ACCESS = 1
    ACCEPT_TRANSFER = 2
    TRANSITIVE = 3
    TYPE_MASK = 3
    READONLY = 1 << 2
    READING = 1 << 3
    WRITING = 1 << 4
    SUB_PAGE = 1 << 8


class Gntmap(IntEnum):
    """Flags of a grant mapping."""

    DEVICE_MAP = 1
    HOST_MAP = 2
    READONLY = 4
    APPLICATION_MAP = 8
    CONTAINS_PTE = 16


COPY_SOURCE_GREF, COPY_DEST_GREF = 1, 2


class Schedop(IntEnum):
    """Operations of sched_op."""

    YIELD = 0
    BLOCK = 1
    SHUTDOWN = 2
    POLL = 3
    REMOTE_SHUTDOWN = 4
    SHUTDOWN_CODE = 5
    WATCHDOG = 6
    PIN_OVERRIDE = 7


SHUTDOWN_REASONS = ("poweroff", "reboot", "suspend", "crash", "watchdog", "soft reset")


class Vcpuop(IntEnum):
    """Operations of vcpu_op."""

    INITIALISE = 0
    UP = 1
    DOWN = 2
    IS_UP = 3
    GET_RUNSTATE_INFO = 4
    REGISTER_RUNSTATE_MEMORY_AREA = 5
    SET_PERIODIC_TIMER = 6
    STOP_PERIODIC_TIMER = 7
    SET_SINGLESHOT_TIMER = 8
    STOP_SINGLESHOT_TIMER = 9
    REGISTER_VCPU_INFO = 10
    SEND_NMI = 11
    GET_PHYSID = 12
    REGISTER_VCPU_TIME_MEMORY_AREA = 13
    REGISTER_RUNSTATE_PHYS_AREA = 14
    REGISTER_VCPU_TIME_PHYS_AREA = 15


class Hvmop(IntEnum):
    """Operations of hvm_op."""

    SET_PARAM = 0
    GET_PARAM = 1
    FLUSH_TLBS = 5
    PAGETABLE_DYING = 9
    GET_TIME = 10
    XENTRACE = 11
    GET_MEM_TYPE = 15
    SET_EVTCHN_UPCALL_VECTOR = 23
    GUEST_REQUEST_VM_EVENT = 24
    ALTP2M = 25


class Param(IntEnum):
    """HVM parameters."""

    CALLBACK_IRQ = 0
    STORE_PFN = 1
    STORE_EVTCHN = 2
    PAE_ENABLED = 4
    IOREQ_PFN = 5
    BUFIOREQ_PFN = 6
    VIRIDIAN = 9
    TIMER_MODE = 10
    HPET_ENABLED = 11
    IDENT_PT = 12
    DM_DOMAIN = 13
    ACPI_S_STATE = 14
    VM86_TSS = 15
    VPT_ALIGN = 16
    CONSOLE_PFN = 17
    CONSOLE_EVTCHN = 18
    ACPI_IOPORTS_LOCATION = 19
    MEMORY_EVENT_CR0 = 20
    MEMORY_EVENT_CR3 = 21
    MEMORY_EVENT_CR4 = 22
    MEMORY_EVENT_INT3 = 23
    NESTEDHVM = 24
    MEMORY_EVENT_SINGLE_STEP = 25
    BUFIOREQ_EVTCHN = 26
    MEMORY_EVENT_MSR = 30
    TRIPLE_FAULT_REASON = 31
    IOREQ_SERVER_PFN = 32
    NR_IOREQ_SERVER_PAGES = 33
    VM_GENERATION_ID_ADDR = 34
    ALTP2M = 35
    X87_FIP_WIDTH = 36
    VM86_TSS_SIZED = 37
    MCA_CAP = 38


NR_PARAMS = 39


class Version(IntEnum):
    """Operations of xen_version."""

    VERSION = 0
    EXTRAVERSION = 1
    COMPILE_INFO = 2
    CAPABILITIES = 3
    CHANGESET = 4
    PLATFORM_PARAMETERS = 5
    GET_FEATURES = 6
    PAGESIZE = 7
    GUEST_HANDLE = 8
    COMMANDLINE = 9
    BUILD_ID = 10
    EXTRAVERSION2 = 11
    CAPABILITIES2 = 12
    CHANGESET2 = 13
    COMMANDLINE2 = 14


class Physdevop(IntEnum):
    """Operations of physdev_op that a guest may try."""

    IRQ_STATUS_QUERY = 5
    EOI = 12
    MAP_PIRQ = 13
    UNMAP_PIRQ = 14
    SETUP_GSI = 21
    GET_FREE_PIRQ = 23
    PCI_MMCFG_RESERVED = 24
    PCI_DEVICE_ADD = 25
    PCI_DEVICE_REMOVE = 26
    DBGP_OP = 29
    PCI_DEVICE_RESET = 32


class HvCall(IntEnum):
    """Hyper-V call codes that Xen knows. Source: xen/arch/x86/include/asm/guest/hyperv-tlfs.h."""

    FLUSH_VIRTUAL_ADDRESS_SPACE = 0x02
    FLUSH_VIRTUAL_ADDRESS_LIST = 0x03
    NOTIFY_LONG_SPIN_WAIT = 0x08
    SEND_IPI = 0x0B
    FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x13
    FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x14
    SEND_IPI_EX = 0x15
    EXT_CALL_QUERY_CAPABILITIES = 0x8001


class HvStatus(IntEnum):
    """Results of Hyper-V calls."""

    SUCCESS = 0
    INVALID_HYPERCALL_CODE = 2
    INVALID_HYPERCALL_INPUT = 3
    INVALID_PARAMETER = 5
