#if defined(__has_include) && __has_include("libcflat.h")

/*
 * In kvm-unit-tests: an SEV-ES or SNP guest, started by firmware that set up the GHCB. Put the file into x86/ and
 * its name into the list of tests.
 */
#include "libcflat.h"

enum { MSR_GHCB = 0xc0010130 };

static uint64_t ghcb_msr(void)
{
	uint32_t low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(MSR_GHCB));
	return (uint64_t)high << 32 | low;
}

static void vmgexit(uint64_t msr)
{
	__asm__ volatile("wrmsr\n\trep; vmmcall" : : "c"(MSR_GHCB), "a"((uint32_t)msr), "d"((uint32_t)(msr >> 32)) : "memory");
}

int main(void)
{
	uint64_t firmware = ghcb_msr();

	for (size_t step = 0; step < STEPS; step++) {
		uint64_t msr = steps[step].msr(firmware);

		if (steps[step].fill) {
			uint8_t *page = (uint8_t *)(uintptr_t)msr;
			uint64_t info[2];

			memset(page, 0, GHCB_BYTES);
			steps[step].fill(page, firmware);
			vmgexit(msr);
			memcpy(info, page + 0x398, sizeof(info));
			report_info("%s: sw_exit_info_1 %#lx, sw_exit_info_2 %#lx", steps[step].name,
				    (unsigned long)info[0], (unsigned long)info[1]);
		} else {
			vmgexit(msr);
			report_info("%s: GHCB MSR %#lx", steps[step].name, (unsigned long)ghcb_msr());
		}
	}
	vmgexit(firmware & ~0xfffull); /* leaves the MSR as firmware had it */
	report(1, "the host answered every VMGEXIT");
	return report_summary();
}

#else

/* On its own: write each step's MSR (8 bytes, little-endian) and page (4096) to standard output. */
#include <stdio.h>

int main(void)
{
	for (size_t step = 0; step < STEPS; step++) {
		uint8_t page[GHCB_BYTES] = { 0 }, msr[8];

		ghcb_put(msr, 0, sizeof(msr), steps[step].msr(MODEL_GHCB_GPA));
		if (steps[step].fill)
			steps[step].fill(page, MODEL_GHCB_GPA);
		if (fwrite(msr, sizeof(msr), 1, stdout) != 1 || fwrite(page, sizeof(page), 1, stdout) != 1)
			return 1;
	}
	return 0;
}

#endif
