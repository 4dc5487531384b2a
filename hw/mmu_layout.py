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
E_MARKED = 0x80  # stores through this entry are logged in the CPU's guest write buffer
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
R_SOFTWARE, R_SMEP = 48, 49  # a miss traps and software fills the TLB; CR4.SMEP
# Guest write buffer: the bit of a leaf entry that marks it (0: there is no buffer), whether the
# last translation was a marked one, room for records, how it behaves (`write_buffer`), a latch.
R_MARK, R_MARKED, R_LOG_SIZE = 50, 51, 52
R_LOG_COMBINES, R_LOG_LOSES, R_LOG_LATE, R_LATCHED, R_LATCHED_BYTES = 53, 54, 55, 56, 57
# The CPU counts records and losses, and those of them whose store is made; the reader what it took.
R_LOG_HEAD, R_LOG_LOST, R_LOG_DONE, R_LOST_DONE, R_LOG_TAIL = 58, 59, 60, 61, 62
# Nested paging: machine address of the second-level table (0: none), reads of it, whether the last
# leaf there was writable, and the guest-physical page it lacks | 1 (0: none).
R_SECOND, R_SECOND_READS, R_SECOND_W, R_VIOLATION = 63, 64, 65, 66
R_DEVICE = 67  # the frame that is a window of device registers (0: there is none)
REG_WORDS = 68
R_LOG = REG_WORDS  # the ring of records follows the registers: physical address, bytes

# In R_FAULT_ERROR where software manages the TLB: it has no entry; one without D; one with too few
# rights.
MISS_NONE, MISS_CLEAN, MISS_RIGHTS = -1, -2, -3

MAX_RUN_COUNT = (1 << 26) - 1

TLB_SET_MASK, TLB_WAYS, TLB_N, TLB_LARGE, TLB_PSC, TLB_PSC_BASE = 0, 1, 2, 3, 4, 5
TLB_PIECES = 6  # whether any entry is an E_PIECE
TLB_TAGS = 8
TAG_SHIFT, LEVEL_SHIFT = 36, 60
VPN_MASK = (1 << TAG_SHIFT) - 1

REASON_DONE, REASON_FAULT, REASON_WATCHED, REASON_BUDGET, REASON_BUFFER_FULL = 0, 1, 2, 3, 4
REASON_DEVICE = 5  # the next run is on a page of device registers
