"""Page walks; the ratio is to reading the same number of entries from the same dictionary."""

from __future__ import annotations

from sevlab.core import paging as pg
from sevlab.core.nested import NestedTables, nested_walk
from sevlab.core.svm import NpfError

from tests.bench.harness import Bench, Row

C_BIT = 1 << 51
TABLE = 0x67  # P, W, U, A, D
GVA = 0x4123


def guest(levels):
    """Entries that map `GVA` by `levels` tables of 8-byte entries, root at 0x1000."""
    entries = {0x1000 * n: 0x1000 * (n + 1) | TABLE for n in range(1, levels)}
    entries[0x1000 * levels + 4 * 8] = 0x9000 | TABLE | C_BIT
    return entries


def walks(bench: Bench) -> list[Row]:
    cr0, efer = pg.CR0_PG | pg.CR0_WP, pg.EFER_LMA | pg.EFER_NXE
    rows: list[Row] = []
    for name, levels, cr4 in (("4-level", 4, pg.CR4_PAE), ("5-level", 5, pg.CR4_PAE | pg.CR4_LA57)):
        entries = guest(levels)

        def read(gpa, width, entries=entries):
            return entries.get(gpa, 0)

        def reads(entries=entries, read=read):
            for place in entries:
                read(place, 8)

        context = pg.paging_context(cr0, 0x1000, cr4, efer, C_BIT)
        bare = bench(reads)
        for what, gva, access in (
            ("read", GVA, 0),
            ("user write", GVA, pg.WalkAccess.WRITE | pg.WalkAccess.USER),
            ("not present", GVA + 0x1000, 0),
        ):
            walked = bench(
                lambda context=context, gva=gva, access=access: pg.walk(context, gva, access, read_entry=read)
            )
            rows.append((f"{name} walk, {what}", walked / bare, f"{walked:.2f} us (target 4)"))
    again = bench(lambda: pg.paging_context(cr0, 0x1000, pg.CR4_PAE, efer, C_BIT))
    rows.append(("context of known registers, to 5 entry reads", again / bare, f"{again:.2f} us"))
    fresh = bench(lambda: pg.paging_context.__wrapped__(cr0, 0x1000, pg.CR4_PAE, efer, C_BIT))
    rows.append(("context of new registers, to 5 entry reads", fresh / bare, f"{fresh:.2f} us"))
    words: dict[int, int] = {}
    pages = iter(range(0x1000, 1 << 40, 0x1000))
    tables = NestedTables(lambda: next(pages), lambda spa: words.get(spa, 0), words.__setitem__, c_bit_mask=C_BIT)
    tables.map(0x4000, 0x9000, 0x1000)

    def entry(spa):
        return words.get(spa, 0)

    nested = bench(
        lambda: nested_walk(tables.root_spa, 0x4000, 0, read_entry=entry, phase=NpfError.FINAL, c_bit_mask=C_BIT)
    )
    rows.append(("nested walk, to 5 entry reads", nested / bare, f"{nested:.2f} us"))
    return rows


GROUPS = (walks,)
