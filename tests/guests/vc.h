/* #VC handler and GHCB protocol of the test guest. Source: 56421 (GHCB) 2.3, 2.6 and 4.1. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { GHCB_RAX = 0x1F8, GHCB_RCX = 0x308, GHCB_RDX = 0x310, GHCB_RBX = 0x318, GHCB_CODE = 0x390, GHCB_INFO1 = 0x398,
       GHCB_INFO2 = 0x3A0, GHCB_SCRATCH = 0x3A8, GHCB_VALID = 0x3F0, GHCB_BUFFER = 0x800, GHCB_VERSION = 0xFFA };
enum { MSR_GHCB = 0xC0010130, MSR_SEV_STATUS = 0xC0010131 };
enum { EXIT_CPUID = 0x72, EXIT_IOIO = 0x7B, EXIT_MSR = 0x7C };

struct frame { u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax, code, rip, cs, rflags, rsp, ss; };

static u8 *ghcb; /* null until it is shared */

static inline u64 read_msr(u32 msr) {
  u32 low, high;
  asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
  return low | (u64)high << 32;
}
static inline void write_msr(u32 msr, u64 value) {
  asm volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}
static inline void vmgexit(void) { asm volatile("rep; vmmcall" : : : "memory"); }

static u64 by_msr(u64 request) {
  write_msr(MSR_GHCB, request);
  vmgexit();
  return read_msr(MSR_GHCB);
}
static void give_up(u64 reason) {
  for (;;) by_msr(0x100 | reason << 16);
}

static void put(int offset, u64 value) {
  *(volatile u64 *)(ghcb + offset) = value;
  ghcb[GHCB_VALID + offset / 64] |= 1 << offset / 8 % 8;
}
static u64 get(int offset) { return *(volatile u64 *)(ghcb + offset); }
static void start_request(void) { ((volatile u64 *)(ghcb + GHCB_VALID))[0] = ((volatile u64 *)(ghcb + GHCB_VALID))[1] = 0; }
static void by_page(u64 code, u64 info_1, u64 info_2) {
  put(GHCB_CODE, code);
  put(GHCB_INFO1, info_1);
  put(GHCB_INFO2, info_2);
  *(volatile u16 *)(ghcb + GHCB_VERSION) = 2;
  write_msr(MSR_GHCB, (u64)ghcb);
  vmgexit();
  if (get(GHCB_INFO1) & 0xFFFFFFFF) give_up(2);
}

static void vc_cpuid(struct frame *f) {
  if (!ghcb) {
    u64 answer[4];
    for (u64 n = 0; n < 4; n++) {
      answer[n] = by_msr(4 | n << 30 | (f->rax & 0xFFFFFFFF) << 32);
      if ((answer[n] & 0xFFF) != 5) give_up(3);
    }
    f->rax = answer[0] >> 32, f->rbx = answer[1] >> 32, f->rcx = answer[2] >> 32, f->rdx = answer[3] >> 32;
  } else {
    start_request();
    put(GHCB_RAX, f->rax & 0xFFFFFFFF);
    put(GHCB_RCX, f->rcx & 0xFFFFFFFF);
    by_page(EXIT_CPUID, 0, 0);
    f->rax = get(GHCB_RAX), f->rbx = get(GHCB_RBX), f->rcx = get(GHCB_RCX), f->rdx = get(GHCB_RDX);
  }
  f->rip += 2;
}

static void vc_ioio(struct frame *f) {
  u8 *p = (u8 *)f->rip;
  int rep = *p == 0xF3, at = rep, size = 1;
  if (!ghcb) give_up(4);
  if (p[at] == 0x66) size = 2, at++;
  u8 op = p[at];
  if (size == 1 && op & 1) size = 4;
  u64 port = op < 0xE8 && op >= 0xE4 ? p[at + 1] : (u16)f->rdx;
  int string = (op & 0xFC) == 0x6C, in = string ? !(op & 2) : !(op & 2);
  u64 info = port << 16 | in | string << 2 | rep << 3 | (u64)size << 4 | 1 << 9;
  start_request();
  if (string) {
    u64 left = rep ? f->rcx : 1, count = left < 2032 / size ? left : 2032 / size;
    if (in) give_up(5);
    for (u64 i = 0; i < count * size; i++) ghcb[GHCB_BUFFER + i] = ((u8 *)f->rsi)[i];
    put(GHCB_SCRATCH, (u64)ghcb + GHCB_BUFFER);
    by_page(EXIT_IOIO, info, count);
    f->rsi += count * size;
    if (rep && (f->rcx -= count)) return;
  } else {
    u64 mask = size == 4 ? 0xFFFFFFFF : (1ul << size * 8) - 1;
    put(GHCB_RAX, in ? 0 : f->rax & mask);
    by_page(EXIT_IOIO, info, 0);
    if (in) f->rax = size == 4 ? get(GHCB_RAX) & mask : (f->rax & ~mask) | (get(GHCB_RAX) & mask);
  }
  f->rip += at + 1 + (op >= 0xE4 && op < 0xE8);
}

void vc_handler(struct frame *f) {
  if (f->code == EXIT_CPUID) vc_cpuid(f);
  else if (f->code == EXIT_IOIO) vc_ioio(f);
  else give_up(f->code & 0xFF);
}
