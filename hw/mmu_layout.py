"""Where the MMU keeps things: words of the register file, a TLB array, an entry's rights.

    tlb[0..7]    geometry, see `TLB_*`
    tags         n = sets x ways keys, each set in LRU order, most recent first
    entries      n values:  pfn << 12 | rights
    psc          per upper level `psc_slots` keys, then as many values: direct-mapped

A key is `page number | tag << 36 | level << 60`; -1 is empty.
"""

# Rights in a TLB entry's value.
E_P, E_W, E_U, E_D, E_G, E_X = 0x1, 0x2, 0x4, 0x40, 0x100, 0x200
E_R, E_INVALID = 0x10, 0x20  # RISC-V: readable; and a cached entry that maps nothing
E_PIECE = 0x800  # 4 KiB of a larger page, whose frames a second level scatters

# Words of the register file `reg`.
R_ROOT, R_WP, R_PSE, R_PGE, R_NXE, R_PG = 0, 1, 2, 3, 4, 5
R_TAG, R_GTAG, R_FRAMES, R_SPURIOUS = 6, 7, 8, 9
R_FAULT_GVA, R_FAULT_ERROR, R_REASON = 10, 11, 12
R_PROGRESS, R_LIMIT = 13, 14
R_REFERENCES, R_MISSES, R_WALKS, R_WALK_READS, R_PSC_HITS, R_AD_WRITES = 16, 17, 18, 19, 20, 21
R_MAPPED = 22  # walks start from guest-physical addresses and go through a frame map
R_LEVEL, R_RIGHTS = 23, 15  # of the leaf the last `resolve` found
R_PATH = 24  # addresses of the entries of the walk under way, by level
R_ENTRY = 32  # and their values
R_TOP = 40  # top-level entries, in formats that hold them in registers
# RISC-V: sstatus.SUM and MXR; whether hardware sets A and D; whether it caches invalid entries.
R_SUM, R_MXR, R_SETS_AD, R_KEEPS_INVALID = 44, 45, 46, 47
# Nested paging: machine address of the second-level table (0: none), reads of it, whether the last
# leaf there was writable, and the guest-physical page it lacks | 1 (0: none).
R_SECOND, R_SECOND_READS, R_SECOND_W, R_VIOLATION = 56, 57, 58, 59
REG_WORDS = 60

MAX_RUN_COUNT = (1 << 26) - 1

TLB_SET_MASK, TLB_WAYS, TLB_N, TLB_LARGE, TLB_PSC, TLB_PSC_BASE = 0, 1, 2, 3, 4, 5
TLB_PIECES = 6  # whether any entry is an E_PIECE
TLB_TAGS = 8
TAG_SHIFT, LEVEL_SHIFT = 36, 60
VPN_MASK = (1 << TAG_SHIFT) - 1

REASON_DONE, REASON_FAULT, REASON_WATCHED, REASON_BUDGET = 0, 1, 2, 3
