/* A flat guest: plain or SEV-ES, as it finds itself. Own page tables with the C-bit, an IDT, a shared GHCB; it prints
   through port 3F8h, answers a timer-less HLT, and ends through the debug exit at port F4h. Loaded at 1 MiB. */
#include "vc.h"

asm(".section .start, \"ax\"\n.globl _start\n_start:\n lea stack_top(%rip), %rsp\n call main\n1: hlt\n jmp 1b\n.text\n");
static u8 stack[16384] __attribute__((aligned(16), used));
asm(".set stack_top, stack + 16384\n");
asm(".macro entry name, handler\n.globl \\name\n\\name:\n"
    " push %rax\n push %rcx\n push %rdx\n push %rbx\n push %rbp\n push %rsi\n push %rdi\n push %r8\n push %r9\n push %r10\n"
    " push %r11\n push %r12\n push %r13\n push %r14\n push %r15\n cld\n mov %rsp, %rdi\n mov %rsp, %rbp\n and $-16, %rsp\n"
    " call \\handler\n mov %rbp, %rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %r11\n pop %r10\n pop %r9\n pop %r8\n"
    " pop %rdi\n pop %rsi\n pop %rbp\n pop %rbx\n pop %rdx\n pop %rcx\n pop %rax\n add $8, %rsp\n iretq\n.endm\n"
    "entry vc_entry, vc_handler\nentry pf_entry, pf_handler\n");
extern char vc_entry[], pf_entry[];

static u64 pml4[512] __attribute__((aligned(4096))), pdpt[512] __attribute__((aligned(4096)));
static u64 pd[512] __attribute__((aligned(4096))), pt[512] __attribute__((aligned(4096)));
static u8 ghcb_page[4096] __attribute__((aligned(4096)));
static struct gate { u16 low, selector; u8 ist, type; u16 middle; u32 high, zero; } idt[32] __attribute__((aligned(16)));
static struct __attribute__((packed)) { u16 limit; u64 base; } idt_register;
static volatile u64 page_faults;
volatile u64 iterations = 0, mode = 0; /* for benchmarks */

void pf_handler(struct frame *f) { page_faults++; f->rip += 3; }

static void out(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "d"(port)); }
static u8 in(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "d"(port)); return v; }
static void print(const char *s) { while (*s) out(0x3F8, *s++); }
static void hex(u64 v, int digits) { while (digits--) out(0x3F8, "0123456789abcdef"[v >> digits * 4 & 15]); }
static void cpuid(u32 leaf, u32 *r) {
  asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(0));
}
static void gate(int vector, char *entry) {
  u64 at = (u64)entry;
  u16 cs;
  asm("mov %%cs, %0" : "=r"(cs));
  idt[vector] = (struct gate){at, cs, 0, 0x8E, at >> 16, at >> 32, 0};
}

void main(void) {
  u32 r[4];
  u64 c_bit = 0;
  gate(29, vc_entry);
  gate(14, pf_entry);
  idt_register.limit = sizeof idt - 1, idt_register.base = (u64)idt;
  asm volatile("lidt %0" : : "m"(idt_register));
  cpuid(0x8000001F, r); /* the MSR protocol, when it is #VC */
  u64 status = r[0] & 2 ? read_msr(MSR_SEV_STATUS) : 0;
  if (status & 1) c_bit = 1ul << (r[1] & 63);
  if (status & 2 && (by_msr(2) >> 24 & 0xFF) != (r[1] & 63)) give_up(1);
  u64 flags = c_bit | 0x63;
  pml4[0] = (u64)pdpt | flags, pdpt[0] = (u64)pd | flags;
  for (u64 n = 1; n < 8; n++) pd[n] = n << 21 | flags | 0x80;
  pd[0] = (u64)pt | flags;
  for (u64 n = 0; n < 512; n++) pt[n] = n << 12 | flags;
  if (status & 2) pt[(u64)ghcb_page >> 12] &= ~c_bit;
  asm volatile("mov %0, %%cr3" : : "r"((u64)pml4 | c_bit) : "memory");
  if (status & 2) {
    ghcb = ghcb_page;
    for (int n = 0; n < 512; n++) ((volatile u64 *)ghcb)[n] = 0;
  }
  cpuid(0, r);
  print("hello from "), print(status & 2 ? "an SEV-ES" : status & 1 ? "an SEV" : "a plain"), print(" guest, vendor ");
  for (int n = 0; n < 12; n++) out(0x3F8, r[n < 4 ? 1 : n < 8 ? 3 : 2] >> n % 4 * 8);
  print(", status "), hex(status, 4), print("\n");
  static const char string[] = "rep outsb: a string in one exchange\n";
  const char *p = string;
  u64 n = sizeof string - 1;
  if (!(status & 1) || status & 2) asm volatile("rep outsb" : "+S"(p), "+c"(n) : "d"(0x3F8));
  asm volatile("movb $1, (%0)\n nop" : : "r"(0x40000000ul) : "memory"); /* 3 bytes, not mapped */
  print("page faults "), hex(page_faults, 1), print(", line status "), hex(in(0x3FD), 2), print("\n");
  if (mode == 1) for (u64 i = 0; i < iterations; i++) cpuid(0, r);
  if (mode == 2) for (u64 i = 0; i < iterations; i++) asm volatile("");
  if (mode == 3) for (u64 i = 0; i < iterations; i++) ((volatile u64 *)0x400000)[i & 0x1FFFF]++;
  out(0xF4, 0x10);
}
