/* An SEV-ES guest whose #VC handler is fuzzed: it checks what a hypervisor tells it, except where WEAK plants a fault.
   It does once each thing that raises #VC, at symbols where a campaign can begin: at_cpuid, at_in, at_out, at_outs,
   at_lapic, at_private (an access to memory of its own, which raises none), and at CPL 3 user_cpuid, user_out.
   Built with -DWEAK=n; 0 is the correct handler. Source: 56421 (GHCB) 2.3, 2.6, 4.1; CVE-2024-25742; edk2 85b8eac59b. */
#include "vc.h"

#ifndef WEAK
#define WEAK 0
#endif
enum { CORRECT, TRUSTS_THE_CODE, PRIVATE_MMIO, NO_CPL_CHECK, COPIES_TOO_MUCH, WHOLE_REGISTER, WAITS_FOR_EVER, TRUSTS_A_LENGTH };
enum { EXIT_NPF = 0x400, MMIO_READ = 0x80000001, MMIO_WRITE = 0x80000002, LAPIC = 0xFEE00000 };

asm(".section .start, \"ax\"\n.globl _start\n_start:\n lea stack_top(%rip), %rsp\n call main\n1: hlt\n jmp 1b\n.text\n");
static u8 stack[16384] __attribute__((aligned(4096), used)), fault_stack[16384] __attribute__((aligned(4096), used));
static u8 user_stack[4096] __attribute__((aligned(4096), used));
asm(".set stack_top, stack + 12288\n"); /* the rest lies above it */
asm(".macro entry name, handler, error=0\n.globl \\name\n\\name:\n .if \\error == 0\n push $0\n .endif\n"
    " push %rax\n push %rcx\n push %rdx\n push %rbx\n push %rbp\n push %rsi\n push %rdi\n push %r8\n push %r9\n push %r10\n"
    " push %r11\n push %r12\n push %r13\n push %r14\n push %r15\n cld\n mov %rsp, %rdi\n mov %rsp, %rbp\n and $-16, %rsp\n"
    " call \\handler\n mov %rbp, %rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %r11\n pop %r10\n pop %r9\n pop %r8\n"
    " pop %rdi\n pop %rsi\n pop %rbp\n pop %rbx\n pop %rdx\n pop %rcx\n pop %rax\n add $8, %rsp\n iretq\n.endm\n"
    "entry vc_entry, checked_vc, 1\nentry gp_entry, gp_handler, 1\nentry end_entry, end_handler\n");
extern char vc_entry[], gp_entry[], end_entry[], user_start[];

static u64 pml4[512] __attribute__((aligned(4096))), pdpt[512] __attribute__((aligned(4096)));
static u64 pd[512] __attribute__((aligned(4096))), pd3[512] __attribute__((aligned(4096))), pt[512] __attribute__((aligned(4096)));
static u8 ghcb_page[4096] __attribute__((aligned(4096)));
static struct gate { u16 low, selector; u8 ist, type; u16 middle; u32 high, zero; } idt[256] __attribute__((aligned(16)));
static struct __attribute__((packed)) { u16 limit; u64 base; } table;
static u64 gdt[8] = {0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF};
static struct __attribute__((packed)) { u32 zero; u64 rsp0, more[11]; u16 zero2, io_map; } tss = {.io_map = 0xFFFF};
static u64 c_bit;
static volatile u64 own[512] __attribute__((aligned(4096))) = {1, 2, 3, 4, 5, 6, 7, 8}; /* a page of its own */
static const char string[64] = "a string in one exchange, and what lies behind it";

static void refuse(void) { give_up(5); }

static int is_private(u64 address) { /* by our own tables */
  if (address < 2 << 20) return (pt[address >> 12] & c_bit) != 0;
  if (address < 16 << 20) return (pd[address >> 21] & c_bit) != 0;
  return address >> 21 != LAPIC >> 21;
}
static u32 valid(int offset) { return ghcb[GHCB_VALID + offset / 64] >> offset / 8 % 8 & 1; }
static u64 reply(int offset) {
  if (!valid(offset)) refuse();
  return get(offset) & 0xFFFFFFFF;
}
static int length_of(const u8 *p, u64 code) { /* of an instruction that raises this code, 0: it does not */
  if (code == EXIT_CPUID) return p[0] == 0x0F && p[1] == 0xA2 ? 2 : 0;
  if (code == EXIT_IOIO) return p[0] == 0xEE || p[0] == 0xEC ? 1 : p[0] == 0xF3 && p[1] == 0x6E ? 2 : 0;
  if (code == EXIT_NPF) return (p[0] == 0x8B || p[0] == 0x89) && p[1] == 3 ? 2 : 0; /* mov (%rbx), %eax and back */
  return 0;
}
static void ask(u64 code, u64 info_1, u64 info_2) {
  by_page(code, info_1, info_2);
  if (WEAK == WAITS_FOR_EVER) while (get(GHCB_INFO2) >> 63);
}

static void do_cpuid(struct frame *f) {
  start_request();
  put(GHCB_RAX, f->rax & 0xFFFFFFFF), put(GHCB_RCX, f->rcx & 0xFFFFFFFF);
  ask(EXIT_CPUID, 0, 0);
  f->rax = reply(GHCB_RAX), f->rbx = reply(GHCB_RBX), f->rcx = reply(GHCB_RCX), f->rdx = reply(GHCB_RDX);
}
static void do_io(struct frame *f, const u8 *p) {
  u64 info = (f->rdx & 0xFFFF) << 16 | 1 << 4 | 1 << 9;
  start_request();
  if (p[0] == 0xEE) {
    put(GHCB_RAX, f->rax & 0xFF);
    ask(EXIT_IOIO, info, 0);
  } else if (p[0] == 0xEC) {
    put(GHCB_RAX, 0);
    ask(EXIT_IOIO, info | 1, 0);
    f->rax = WEAK == WHOLE_REGISTER ? get(GHCB_RAX) : (f->rax & ~0xFFul) | (reply(GHCB_RAX) & 0xFF);
  } else {
    u64 count = f->rcx < 2032 ? f->rcx : 2032, copied = WEAK == COPIES_TOO_MUCH ? (count + 64) & ~63ul : count;
    for (u64 i = 0; i < copied && i < 2032; i++) ghcb[GHCB_BUFFER + i] = ((u8 *)f->rsi)[i];
    put(GHCB_SCRATCH, (u64)ghcb + GHCB_BUFFER);
    ask(EXIT_IOIO, info | 1 << 2 | 1 << 3, count);
    if (WEAK == TRUSTS_A_LENGTH && get(GHCB_INFO2)) ((u8 *)f->rsp)[get(GHCB_INFO2) & 0xFF] ^= 1;
    f->rsi += count, f->rcx -= count;
    if (f->rcx) f->rip -= 2;
  }
}
static void do_mmio(struct frame *f, const u8 *p) {
  u64 address = f->rbx;
  if (WEAK != PRIVATE_MMIO && is_private(address)) refuse();
  start_request();
  put(GHCB_SCRATCH, (u64)ghcb + GHCB_BUFFER);
  if (p[0] == 0x89) *(volatile u32 *)(ghcb + GHCB_BUFFER) = f->rax;
  ask(p[0] == 0x8B ? MMIO_READ : MMIO_WRITE, address, 4);
  if (p[0] == 0x8B) f->rax = *(volatile u32 *)(ghcb + GHCB_BUFFER);
}

void checked_vc(struct frame *f) {
  const u8 *p = (const u8 *)f->rip;
  u64 code = f->code;
  int length = length_of(p, code);
  if (!ghcb && code == EXIT_CPUID && length) { vc_cpuid(f); return; }
  if (f->cs & 3 && code != EXIT_CPUID && WEAK != NO_CPL_CHECK) refuse();
  if (!length && WEAK != TRUSTS_THE_CODE) refuse();
  if (code == EXIT_CPUID) do_cpuid(f);
  else if (code == EXIT_IOIO) do_io(f, p);
  else if (code == EXIT_NPF) do_mmio(f, p);
  else refuse();
  f->rip += length;
}
void gp_handler(struct frame *f) { /* at CPL 3 as a kernel would: the instruction is left out */
  if (!(f->cs & 3)) refuse();
  f->rip++;
}
void end_handler(struct frame *f) {
  asm volatile("outb %%al, %%dx" : : "a"((u8)(f->cs & 3 ? 0x10 : 0x11)), "d"(0xF4));
}

static void gate(int vector, char *entry, u8 type) {
  u64 at = (u64)entry;
  idt[vector] = (struct gate){at, 8, 0, type, at >> 16, at >> 32, 0};
}
static void load_tables(void) {
  u64 at = (u64)&tss;
  gdt[5] = (at & 0xFFFFFF) << 16 | (sizeof tss - 1) | 0x89ul << 40 | (at >> 24 & 0xFF) << 56, gdt[6] = at >> 32;
  tss.rsp0 = (u64)fault_stack + 12288;
  table.limit = sizeof gdt - 1, table.base = (u64)gdt;
  asm volatile("lgdt %0\n pushq $8\n lea 1f(%%rip), %%rax\n pushq %%rax\n lretq\n1: mov $16, %%eax\n mov %%eax, %%ss\n"
               " mov %%eax, %%ds\n mov %%eax, %%es\n mov $40, %%eax\n ltr %%ax" : : "m"(table) : "rax", "memory");
  table.limit = sizeof idt - 1, table.base = (u64)idt;
  gate(29, vc_entry, 0x8E), gate(13, gp_entry, 0x8E), gate(0x80, end_entry, 0xEE);
  asm volatile("lidt %0" : : "m"(table));
}

#define POINT(name) "jmp " name "\n.globl " name "\n" name ": "
asm(".globl user_start\nuser_start:\n mov $1, %eax\n xor %ecx, %ecx\n " POINT("user_cpuid") "cpuid\n"
    " mov $0x3F8, %edx\n mov $0x58, %eax\n " POINT("user_out") "out %al, %dx\n int $0x80\n");

void main(void) {
  u32 a = 0x8000001F, b, c = 0, d;
  load_tables();
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (!(a & 2)) asm volatile("hlt");
  c_bit = 1ul << (b & 63);
  if ((by_msr(2) >> 24 & 0xFF) != (b & 63)) give_up(1);
  u64 flags = c_bit | 0x67;
  pml4[0] = (u64)pdpt | flags, pdpt[0] = (u64)pd | flags, pdpt[3] = (u64)pd3 | flags;
  for (u64 n = 1; n < 8; n++) pd[n] = n << 21 | flags | 0x80;
  pd[0] = (u64)pt | flags, pd3[LAPIC >> 21 & 511] = LAPIC | 0xE3;
  for (u64 n = 0; n < 512; n++) pt[n] = n << 12 | flags;
  pt[(u64)ghcb_page >> 12] &= ~c_bit;
  asm volatile("mov %0, %%cr3" : : "r"((u64)pml4 | c_bit) : "memory");
  ghcb = ghcb_page;
  for (int n = 0; n < 512; n++) ((volatile u64 *)ghcb)[n] = 0;

  a = 1, c = 0;
  asm volatile(POINT("at_cpuid") "cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  asm volatile(POINT("at_in") "in %%dx, %%al" : "=a"(a) : "d"(0x3FD));
  asm volatile(POINT("at_out") "out %%al, %%dx" : : "a"(0x2E), "d"(0x3F8));
  const char *p = string;
  u64 count = 24;
  asm volatile(POINT("at_outs") "rep outsb" : "+S"(p), "+c"(count) : "d"(0x3F8) : "memory");
  asm volatile(POINT("at_lapic") "mov (%%rbx), %%eax" : "=a"(a) : "b"((u64)LAPIC + 0x30) : "memory");
  asm volatile(POINT("at_private") "mov (%%rbx), %%eax" : "=a"(a) : "b"((u64)own) : "memory");
  asm volatile("pushq $0x1B\n pushq %0\n pushq $2\n pushq $0x23\n pushq %1\n iretq"
               : : "r"((u64)user_stack + 4096 - 64), "r"((u64)user_start) : "memory");
}
