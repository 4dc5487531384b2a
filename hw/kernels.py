"""The MMU: TLB look-up, page walk and the access-block loop, one source for two engines.

This file is a template: `penumbra.hw.compiled` executes it once per paging format and engine, as a
module of its own, with two names set beforehand: `SPEC`, the format whose tables are frozen in the
functions, and `JIT`, numba's `njit` or the identity. A module, and not a closure, because numba's
cache on disk cannot recognise a closure over compiled functions. Compiled or plain over memoryviews
of the same arrays, the results are equal bit for bit; so every value is a signed 64-bit integer and
no expression may leave that range.

What a processor may do is the SDM's (vol. 3, 4.5-4.10): entries with P=0 are never cached, A is set
before an entry is cached, D at the first write through a copy with D=0, and a rights miss in a
cached entry walks again before it faults (delivering the spurious fault is a switch, `R_SPURIOUS`).
With `R_SOFTWARE` nothing here walks: what the TLB cannot answer is noted for software to answer.
A fault drops what was cached for its page, upper levels included, so it never recurs for a reason
that is gone from memory.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penumbra.hw.formats import IA32, FormatSpec
from penumbra.hw.mmu_layout import (
    E_D,
    E_G,
    E_INVALID,
    E_MARKED,
    E_P,
    E_PIECE,
    E_R,
    E_U,
    E_W,
    E_X,
    LEVEL_SHIFT,
    MISS_CLEAN,
    MISS_NONE,
    MISS_RIGHTS,
    R_AD_WRITES,
    R_DEVICE,
    R_ENTRY,
    R_FAULT_ERROR,
    R_FAULT_GVA,
    R_FRAMES,
    R_GTAG,
    R_KEEPS_INVALID,
    R_LATCHED,
    R_LATCHED_BYTES,
    R_LEVEL,
    R_LIMIT,
    R_LOG,
    R_LOG_COMBINES,
    R_LOG_DONE,
    R_LOG_HEAD,
    R_LOG_LATE,
    R_LOG_LOSES,
    R_LOG_LOST,
    R_LOG_SIZE,
    R_LOG_TAIL,
    R_LOST_DONE,
    R_MAPPED,
    R_MARK,
    R_MARKED,
    R_MISSES,
    R_MXR,
    R_NXE,
    R_PATH,
    R_PG,
    R_PGE,
    R_PROGRESS,
    R_PSC_HITS,
    R_PSE,
    R_REASON,
    R_REFERENCES,
    R_RIGHTS,
    R_ROOT,
    R_SECOND,
    R_SECOND_READS,
    R_SECOND_W,
    R_SETS_AD,
    R_SMEP,
    R_SOFTWARE,
    R_SPURIOUS,
    R_SUM,
    R_TAG,
    R_TOP,
    R_VIOLATION,
    R_WALK_READS,
    R_WALKS,
    R_WP,
    REASON_BUDGET,
    REASON_BUFFER_FULL,
    REASON_DEVICE,
    REASON_DONE,
    REASON_FAULT,
    REASON_WATCHED,
    TLB_LARGE,
    TLB_N,
    TLB_PIECES,
    TLB_PSC,
    TLB_PSC_BASE,
    TLB_SET_MASK,
    TLB_TAGS,
    TLB_WAYS,
    VPN_MASK,
)

SPEC: FormatSpec = globals().get("SPEC", IA32)
JIT: Callable[[Any], Any] = globals().get("JIT", lambda function: function)

TOP = SPEC.top
WIDE = SPEC.entry_bytes == 8
WIDTH_SHIFT = 3 if WIDE else 2
SHIFTS = tuple(level.shift for level in SPEC.levels)
INDEX_MASK = tuple(level.n_entries - 1 for level in SPEC.levels)
LARGE = tuple(level.large for level in SPEC.levels)
# Bit 63 (NX) is the sign here and is tested apart, so these masks stay below it.
RESERVED = tuple(level.reserved for level in SPEC.levels)
RESERVED_LARGE = tuple(level.reserved_large for level in SPEC.levels)
FRAME_SHIFT = SPEC.frame_shift
FRAME_BITS = SPEC.frame_mask >> FRAME_SHIFT
RWX, A_BIT, D_BIT = SPEC.rwx, SPEC.a, SPEC.d
READABLE = E_R if RWX else 0
# What the paging-structure cache keeps of the levels above; a global RISC-V table is one of it.
CACHED_RIGHTS = E_W | E_U | E_X | (E_G if RWX else 0)
DROPS_UPPER = SPEC.page_flush_drops_upper
NEEDS_PSE, PSE36, HAS_NX = SPEC.large_needs_pse, SPEC.pse36, SPEC.has_nx
PAGE_MASK = (1 << (SPEC.va_bits - 12)) - 1
ANY_LARGE = any(LARGE)
# With the top level in registers, a walk neither narrows rights there, nor sets A, nor caches it.
ROOT_REGISTERS = SPEC.root_registers > 0
TOP_IN_RAM = TOP - 1 if ROOT_REGISTERS else TOP


@JIT
def second(ram64, reg, gpa, write):
    """Walk the second-level table; return the machine address of a guest-physical one.

    -1 is a violation, noted in R_VIOLATION: no entry, or none that may be written. Four levels of
    512 entries with R, W and X in bits 2:0, in machine RAM.

    Source: SDM vol. 3, 29.3 (EPT).
    """
    base = reg[R_SECOND]
    writable = 2
    for shift in (39, 30, 21, 12):
        e = ram64[(base >> 3) + ((gpa >> shift) & 511)] + 0
        reg[R_SECOND_READS] += 1
        writable &= e
        if e & 7 == 0 or (write and writable == 0):
            reg[R_VIOLATION] = (gpa >> 12 << 12) | 1
            return -1
        base = ((e >> 12) & 0xFFFFFFFFFF) << 12
    reg[R_SECOND_W] = writable
    return base | (gpa & 0xFFF)


@JIT
def read_entry(ram64, ram32, reg, fmap, pa):
    """Read one entry; all ones beyond RAM. With R_MAPPED or R_SECOND, `pa` is guest-physical."""
    reg[R_WALK_READS] += 1
    if reg[R_SECOND] != 0:
        pa = second(ram64, reg, pa, False)
        if pa < 0:
            return 0
    inside = pa >> 12 < reg[R_FRAMES]
    if inside and reg[R_MAPPED] != 0:
        frame = fmap[pa >> 12]
        inside = frame >= 0
        pa = (frame << 12) | (pa & 0xFFF)
    if not inside:
        return -1 if WIDE else 0xFFFFFFFF
    if WIDE:
        return ram64[pa >> 3] + 0
    return ram32[pa >> 2] + 0


@JIT
def write_entry(ram64, ram32, reg, pa, value):
    """Write an entry just read; nothing beyond RAM, or where the second level forbids it."""
    if reg[R_SECOND] != 0:
        reads = reg[R_SECOND_READS]
        pa = second(ram64, reg, pa, True)
        reg[R_SECOND_READS] = reads  # the walk that has read the entry found it
        if pa < 0:
            return
    if pa >> 12 < reg[R_FRAMES]:
        reg[R_AD_WRITES] += 1
        if WIDE:
            ram64[pa >> 3] = value
        else:
            ram32[pa >> 2] = value


@JIT
def insert(tlb, key, entry):
    """Put `entry` first in its set; the least recently used one falls out (A40 [0019])."""
    ways = tlb[TLB_WAYS]
    first = TLB_TAGS + ((key & VPN_MASK) & tlb[TLB_SET_MASK]) * ways
    n = tlb[TLB_N]
    at = first
    while at < first + ways - 1 and tlb[at] != key:
        at += 1
    if tlb[at] >> LEVEL_SHIFT > 0 and tlb[at] != key:
        tlb[TLB_LARGE] -= 1
    if key >> LEVEL_SHIFT > 0 and tlb[at] != key:
        tlb[TLB_LARGE] += 1
    while at > first:
        tlb[at] = tlb[at - 1]
        tlb[at + n] = tlb[at + n - 1]
        at -= 1
    tlb[first] = key
    tlb[first + n] = entry


@JIT
def find(tlb, key):
    """Return the entry under `key` and make it most recent, or 0."""
    ways = tlb[TLB_WAYS]
    first = TLB_TAGS + ((key & VPN_MASK) & tlb[TLB_SET_MASK]) * ways
    n = tlb[TLB_N]
    at = first
    while at < first + ways and tlb[at] != key:
        at += 1
    if at == first + ways:
        return 0
    entry = tlb[at + n]
    while at > first:
        tlb[at] = tlb[at - 1]
        tlb[at + n] = tlb[at + n - 1]
        at -= 1
    tlb[first] = key
    tlb[first + n] = entry
    return entry


@JIT
def denied(reg, rights, kind, user):
    """Tell whether rights, and the modes at the time of use, forbid an access.

    Source: SDM vol. 3, 4.6; RISC-V privileged specification, 4.3.1.
    """
    if RWX:
        if user and rights & E_U == 0:
            return True
        if not user and rights & E_U != 0 and (kind == 2 or reg[R_SUM] == 0):
            return True
        if kind == 0:
            return rights & E_R == 0 and (rights & E_X == 0 or reg[R_MXR] == 0)
        return rights & (E_W if kind == 1 else E_X) == 0
    if user and rights & E_U == 0:
        return True
    if kind == 1 and rights & E_W == 0 and (user or reg[R_WP] != 0):
        return True
    if kind != 2:
        return False
    if not user and rights & E_U != 0 and reg[R_SMEP] != 0:
        return True
    return rights & E_X == 0 and reg[R_NXE] != 0


@JIT
def resolve_rwx(ram64, ram32, reg, fmap, gva, kind, user, level, base, rights):
    """Do what `resolve` does where entries are RISC-V's; the fault's code is its cause.

    Source: RISC-V privileged specification, 4.3.2.
    """
    reg[R_FAULT_GVA] = gva
    reg[R_FAULT_ERROR] = 12 if kind == 2 else (15 if kind == 1 else 13)
    reg[R_WALKS] += 1
    rights &= E_G
    while True:
        pa = base + (((gva >> SHIFTS[level]) & INDEX_MASK[level]) << WIDTH_SHIFT)
        e = read_entry(ram64, ram32, reg, fmap, pa)
        reg[R_LEVEL] = level
        reg[R_PATH + level] = pa
        reg[R_ENTRY + level] = e
        leaf = e & 10 != 0
        if e & 1 == 0 or e & 6 == 4 or e < 0 or (not leaf and level == 0):
            return 0
        if e & (RESERVED_LARGE[level] if leaf else RESERVED[level]) != 0:
            return 0
        frame = (e >> FRAME_SHIFT) & FRAME_BITS
        rights = narrow(rights, e)
        if leaf:
            break
        base = frame << 12
        level -= 1
    reg[R_RIGHTS] = rights
    if denied(reg, rights, kind, user) or frame & ((1 << (SHIFTS[level] - 12)) - 1) != 0:
        return 0
    if reg[R_SETS_AD] == 0 and (e & A_BIT == 0 or (kind == 1 and e & D_BIT == 0)):
        return 0
    return 1


@JIT
def resolve(ram64, ram32, reg, fmap, gva, kind, user, level, base, rights):
    """Walk from `level` down and check the rights, changing nothing; 1, or 0 with the fault noted.

    On success R_LEVEL is the leaf's level, R_RIGHTS the AND of all levels, R_PATH + l the address
    and R_ENTRY + l the value of the entry read at level l. The VMM walks a guest's tables with it:
    R_MAPPED says that addresses are guest-physical and `fmap[gfn]` holds their frames.

    Source: SDM vol. 3, 4.3, 4.5, 4.6, 4.7; A40 Fig. 2B.
    """
    if RWX:
        return resolve_rwx(ram64, ram32, reg, fmap, gva, kind, user, level, base, rights)
    write = kind == 1
    fetch = kind == 2
    nxe = HAS_NX and reg[R_NXE] != 0
    error = 0
    if write:
        error |= 2
    if user:
        error |= 4
    if fetch and (nxe or reg[R_SMEP] != 0):
        error |= 16
    reg[R_FAULT_GVA] = gva
    reg[R_WALKS] += 1
    while True:
        index = (gva >> SHIFTS[level]) & INDEX_MASK[level]
        pa = base + (index << WIDTH_SHIFT)
        if ROOT_REGISTERS and level == TOP:
            e = reg[R_TOP + index]
        else:
            e = read_entry(ram64, ram32, reg, fmap, pa)
        reg[R_LEVEL] = level
        reg[R_PATH + level] = pa
        reg[R_ENTRY + level] = e
        if e & 1 == 0:
            reg[R_FAULT_ERROR] = error
            return 0
        if ROOT_REGISTERS and level == TOP:
            base = ((e >> 12) & FRAME_BITS) << 12
            level -= 1
            continue
        big = LARGE[level] and e & 0x80 != 0 and (not NEEDS_PSE or reg[R_PSE] != 0)
        bad = RESERVED_LARGE[level] if big else RESERVED[level]
        if e & bad != 0 or (HAS_NX and e < 0 and not nxe):
            reg[R_FAULT_ERROR] = error | 9
            return 0
        rights = narrow(rights, e)
        if big or level == 0:
            break
        base = ((e >> 12) & FRAME_BITS) << 12
        level -= 1
    reg[R_RIGHTS] = rights
    if denied(reg, rights, kind, user):
        reg[R_FAULT_ERROR] = error | 1
        return 0
    return 1


@JIT
def narrow(rights, e):
    """AND one entry's W, U and NX into `rights`; RISC-V's are the leaf's own, G excepted."""
    if RWX:
        rights &= E_G
        if e & 2 != 0:
            rights |= E_R
        if e & 4 != 0:
            rights |= E_W
        if e & 8 != 0:
            rights |= E_X
        if e & 16 != 0:
            rights |= E_U
        if e & 32 != 0:
            rights |= E_G
        return rights
    if e & 2 == 0:
        rights &= ~E_W
    if e & 4 == 0:
        rights &= ~E_U
    if HAS_NX and e < 0:
        rights &= ~E_X
    return rights


@JIT
def leaf_frame(leaf, level):
    """Return the first 4 KiB frame of the page a leaf at `level` maps."""
    frame = (leaf >> FRAME_SHIFT) & FRAME_BITS
    if level > 0:
        frame &= ~((1 << (SHIFTS[level] - 12)) - 1)
        if PSE36:
            frame = (((leaf >> 22) << 10) & 0xFFFFF) | (((leaf >> 13) & 0xFF) << 20)
    return frame


@JIT
def walk(ram64, ram32, reg, tlb, gva, kind, user, use_psc):
    """Walk as the processor does; return `pfn << 12 | rights` of the 4 KiB page, or 0 on a fault.

    On success A (and D for a write) are set in memory, then TLB and PSC are filled. On a fault
    nothing is changed. With `use_psc` 0 it starts at the root.

    Source: SDM vol. 3, 4.8, 4.10.
    """
    vpn = (gva >> 12) & PAGE_MASK
    rights = E_W | E_U | E_X
    base = reg[R_ROOT]
    started = TOP
    slots = tlb[TLB_PSC]
    if use_psc and slots > 0:
        for upper in range(1, TOP + 1):
            part = vpn >> (SHIFTS[upper] - 12)
            slot = tlb[TLB_PSC_BASE] + (upper - 1) * 2 * slots + (part & (slots - 1))
            if tlb[slot] == part | reg[R_TAG] | (upper << LEVEL_SHIFT):
                cached = tlb[slot + slots]
                base = (cached >> 12) << 12
                rights = cached & CACHED_RIGHTS
                started = upper - 1
                reg[R_PSC_HITS] += 1
                break
    down = rights
    if resolve(ram64, ram32, reg, tlb, gva, kind, user, started, base, rights) == 0:
        if (
            RWX
            and reg[R_VIOLATION] == 0
            and reg[R_KEEPS_INVALID] != 0
            and reg[R_ENTRY + reg[R_LEVEL]] & 1 == 0
        ):
            insert(tlb, vpn | reg[R_TAG], E_INVALID)
        return 0
    level = reg[R_LEVEL]
    part = vpn >> (SHIFTS[level] - 12)
    frame = leaf_frame(reg[R_ENTRY + level], level)
    clean = 0  # rights the second level takes away until a write has been seen
    piece = 0
    if reg[R_SECOND] != 0:
        # Neighbours in a large guest page are none in machine memory: 4 KiB of it are cached.
        frame = second(ram64, reg, (frame + vpn - (part << (SHIFTS[level] - 12))) << 12, kind == 1)
        if frame < 0:
            return 0
        frame >>= 12
        clean = 0 if reg[R_SECOND_W] != 0 else E_D
        piece = E_PIECE if level > 0 else 0
    # Permitted: A in every entry read, D in the leaf, before anything is cached. The leaf comes
    # last: in a table that maps itself it may be the same word as an upper entry.
    for at in range(level if RWX else min(started, TOP_IN_RAM), level - 1, -1):
        e = reg[R_ENTRY + at]
        want = e | A_BIT
        if at == level and kind == 1:
            want |= D_BIT
        if want != e:
            write_entry(ram64, ram32, reg, reg[R_PATH + at], want)
            if reg[R_VIOLATION] != 0:
                return 0
            reg[R_ENTRY + at] = want
    leaf = reg[R_ENTRY + level]
    entry = (frame << 12) | reg[R_RIGHTS] | E_P | piece
    if leaf & D_BIT != 0:
        entry |= E_D & ~clean
    if leaf & reg[R_MARK] != 0:
        entry |= E_MARKED
    tag = reg[R_TAG]
    # RISC-V's E_G is among the rights, from whichever level has it.
    if entry & E_G != 0 if RWX else (leaf & 0x100 != 0 and reg[R_PGE] != 0):
        entry |= E_G
        tag = reg[R_GTAG]
    if reg[R_SECOND] != 0:
        tlb[TLB_PIECES] |= 1 if piece != 0 else 0
        insert(tlb, vpn | tag, entry)
    else:
        insert(tlb, part | tag | (level << LEVEL_SHIFT), entry)
    if slots > 0:
        for at in range(min(started, TOP_IN_RAM), level, -1):
            e = reg[R_ENTRY + at]
            down = narrow(down, e)
            upper_part = vpn >> (SHIFTS[at] - 12)
            slot = tlb[TLB_PSC_BASE] + (at - 1) * 2 * slots + (upper_part & (slots - 1))
            tlb[slot] = upper_part | reg[R_TAG] | (at << LEVEL_SHIFT)
            tlb[slot + slots] = (((e >> FRAME_SHIFT) & FRAME_BITS) << 12) | down
    if reg[R_SECOND] != 0:
        return entry
    return entry + ((vpn - (part << (SHIFTS[level] - 12))) << 12)


@JIT
def lookup(reg, tlb, vpn):
    """Return the cached entry of a page as `pfn << 12 | rights`, or 0; private tag, then G."""
    entry = find(tlb, vpn | reg[R_TAG])
    if entry == 0 and (RWX or reg[R_PGE] != 0):
        entry = find(tlb, vpn | reg[R_GTAG])
    if entry == 0 and ANY_LARGE and tlb[TLB_LARGE] > 0:
        for level in range(1, TOP + 1):
            if LARGE[level] and entry == 0:
                part = vpn >> (SHIFTS[level] - 12)
                entry = find(tlb, part | reg[R_TAG] | (level << LEVEL_SHIFT))
                if entry == 0:
                    entry = find(tlb, part | reg[R_GTAG] | (level << LEVEL_SHIFT))
                if entry != 0:
                    entry += (vpn - (part << (SHIFTS[level] - 12))) << 12
    return entry


@JIT
def translate(ram64, ram32, reg, tlb, gva, kind, user):
    """Translate one access; return the frame, or -1 with R_FAULT_GVA and R_FAULT_ERROR set.

    Where software manages the TLB the error says what the TLB lacks (`MISS_*`), and it stays as it
    is.

    Args:
        kind: 0 read, 1 write, 2 fetch.
        user: 1 for CPL 3, 0 for CPL 0-2.

    R_MARKED is not 0 exactly if a store through the entry has to be logged.
    """
    reg[R_MARKED] = 0
    if reg[R_SECOND] != 0:
        reg[R_VIOLATION] = 0
    if reg[R_PG] == 0:
        if reg[R_SECOND] == 0:
            return gva >> 12
        reg[R_FAULT_GVA] = gva
        return second(ram64, reg, gva, kind == 1) >> 12
    vpn = (gva >> 12) & PAGE_MASK
    entry = lookup(reg, tlb, vpn)
    if entry != 0:
        if RWX and entry == E_INVALID:
            reg[R_FAULT_GVA] = gva
            reg[R_FAULT_ERROR] = 12 if kind == 2 else (15 if kind == 1 else 13)
            return -1
        allowed = not denied(reg, entry, kind, user)
        if allowed and (kind != 1 or entry & E_D != 0):
            reg[R_MARKED] = entry & E_MARKED
            return entry >> 12
        missing = MISS_CLEAN if allowed else MISS_RIGHTS
    else:
        allowed = True
        missing = MISS_NONE
        reg[R_MISSES] += 1
    if reg[R_SOFTWARE] != 0:
        reg[R_FAULT_GVA] = gva
        reg[R_FAULT_ERROR] = missing
        return -1
    if entry != 0:
        drop_page(reg, tlb, vpn)
        if not allowed and reg[R_SPURIOUS] != 0:
            drop_upper(reg, tlb, vpn)
            reg[R_FAULT_GVA] = gva
            error = 1 | (kind == 1) << 1 | (4 if user else 0)
            if kind == 2 and ((HAS_NX and reg[R_NXE] != 0) or reg[R_SMEP] != 0):
                error |= 16
            if RWX:
                error = 12 if kind == 2 else (15 if kind == 1 else 13)
            reg[R_FAULT_ERROR] = error
            return -1
    hits = reg[R_PSC_HITS]
    entry = walk(ram64, ram32, reg, tlb, gva, kind, user, 1)
    if entry == 0 and reg[R_VIOLATION] != 0:
        return -1
    if entry == 0 and reg[R_PSC_HITS] != hits:
        # A stale upper entry must not make the fault: walk from the root before delivering it.
        entry = walk(ram64, ram32, reg, tlb, gva, kind, user, 0)
    if entry == 0:
        if reg[R_VIOLATION] == 0:
            drop_upper(reg, tlb, vpn)
            if tlb[TLB_PIECES] != 0:
                drop_pieces(tlb)  # the page at fault may be large, and cached elsewhere
        return -1
    reg[R_MARKED] = entry & E_MARKED
    return entry >> 12


@JIT
def record(reg, hpa, size):
    """Put a record at the end of the guest write buffer; 0 if there is no room.

    A store that the last record covers, or that goes on in the same page where it ends, becomes
    part of it where R_LOG_COMBINES says so. A full buffer that R_LOG_LOSES only notes the loss.
    """
    head = reg[R_LOG_HEAD]
    n = head - reg[R_LOG_TAIL]
    if n > 0 and reg[R_LOG_COMBINES] != 0:
        at = R_LOG + 2 * ((head - 1) % reg[R_LOG_SIZE])
        first = reg[at]
        end = first + reg[at + 1]
        if hpa >= first and hpa <= end and first >> 12 == hpa >> 12:
            reg[at + 1] = max(end, hpa + size) - first
            return 1
    if n == reg[R_LOG_SIZE]:
        if reg[R_LOG_LOSES] == 0:
            return 0
        reg[R_LOG_LOST] = reg[R_LOG_LOST] + 1
        return 1
    at = R_LOG + 2 * (head % reg[R_LOG_SIZE])
    reg[at] = hpa
    reg[at + 1] = size
    reg[R_LOG_HEAD] = head + 1
    return 1


@JIT
def log_store(reg, hpa, size):
    """Log a store through a marked entry, before it is made; 0 if there is no room for it.

    After the store `retire` says that it is made: a reader in between keeps the record. With the
    fault R_LOG_LATE a store stays in a latch and only the one before it gets its record.

    Source: GWB.
    """
    if reg[R_LOG_LATE] == 0:
        return record(reg, hpa, size)
    if settle_log(reg) == 0:
        return 0
    reg[R_LATCHED] = hpa
    reg[R_LATCHED_BYTES] = size
    return 1


@JIT
def retire(reg):
    """Say that every store logged so far is visible: its record may be taken for good."""
    reg[R_LOG_DONE] = reg[R_LOG_HEAD] + 0
    reg[R_LOST_DONE] = reg[R_LOG_LOST] + 0


@JIT
def settle_log(reg):
    """Move what is in the latch to the buffer; 0 if there is no room."""
    if reg[R_LATCHED_BYTES] != 0:
        if record(reg, reg[R_LATCHED], reg[R_LATCHED_BYTES]) == 0:
            return 0
        reg[R_LATCHED_BYTES] = 0
        retire(reg)
    return 1


@JIT
def drop_key(tlb, key):
    if find(tlb, key) != 0:
        first = TLB_TAGS + ((key & VPN_MASK) & tlb[TLB_SET_MASK]) * tlb[TLB_WAYS]
        at = first
        n = tlb[TLB_N]
        while at < first + tlb[TLB_WAYS] - 1:
            tlb[at] = tlb[at + 1]
            tlb[at + n] = tlb[at + n + 1]
            at += 1
        tlb[at] = -1
        if key >> LEVEL_SHIFT > 0:
            tlb[TLB_LARGE] -= 1


@JIT
def drop_page(reg, tlb, vpn):
    """Drop this CPU's cached translations of one page, global and large ones included."""
    drop_key(tlb, vpn | reg[R_TAG])
    drop_key(tlb, vpn | reg[R_GTAG])
    if ANY_LARGE and tlb[TLB_LARGE] > 0:
        for level in range(1, TOP + 1):
            if LARGE[level]:
                part = vpn >> (SHIFTS[level] - 12)
                drop_key(tlb, part | reg[R_TAG] | (level << LEVEL_SHIFT))
                drop_key(tlb, part | reg[R_GTAG] | (level << LEVEL_SHIFT))
    if tlb[TLB_PIECES] != 0:
        drop_pieces(tlb)


@JIT
def drop_pieces(tlb):
    """Drop all pieces of large pages: one of them stands for all of its page."""
    ways = tlb[TLB_WAYS]
    n = tlb[TLB_N]
    for first in range(TLB_TAGS, TLB_TAGS + n, ways):
        to = first
        for at in range(first, first + ways):
            if tlb[at] != -1 and tlb[at + n] & E_PIECE == 0:
                tlb[to] = tlb[at]
                tlb[to + n] = tlb[at + n]
                to += 1
        for at in range(to, first + ways):
            tlb[at] = -1
    tlb[TLB_PIECES] = 0


@JIT
def drop_upper(reg, tlb, vpn):
    """Drop the paging-structure-cache entries a walk for this page would use, as a page fault does.

    Source: SDM vol. 3, 4.10.4.1.
    """
    slots = tlb[TLB_PSC]
    if slots > 0:
        for upper in range(1, TOP + 1):
            part = vpn >> (SHIFTS[upper] - 12)
            slot = tlb[TLB_PSC_BASE] + (upper - 1) * 2 * slots + (part & (slots - 1))
            if tlb[slot] == part | reg[R_TAG] | (upper << LEVEL_SHIFT):
                tlb[slot] = -1


@JIT
def drop_psc(tlb):
    slots = tlb[TLB_PSC]
    for upper in range(TOP):
        first = tlb[TLB_PSC_BASE] + upper * 2 * slots
        for slot in range(first, first + slots):
            tlb[slot] = -1


@JIT
def invlpg(reg, tlb, gva):
    """INVLPG: the page, global or not, and (on x86) every paging-structure-cache entry."""
    drop_page(reg, tlb, (gva >> 12) & PAGE_MASK)
    if DROPS_UPPER:
        drop_psc(tlb)


@JIT
def flush(tlb, keep_global):
    """Drop everything; with `keep_global` the G entries stay (MOV CR3 under CR4.PGE)."""
    ways = tlb[TLB_WAYS]
    n = tlb[TLB_N]
    first = TLB_TAGS
    left_large = 0
    while first < TLB_TAGS + n:
        to = first
        for at in range(first, first + ways):
            if tlb[at] != -1 and keep_global and tlb[at + n] & E_G != 0:
                tlb[to] = tlb[at]
                tlb[to + n] = tlb[at + n]
                if tlb[to] >> LEVEL_SHIFT > 0:
                    left_large += 1
                to += 1
        for at in range(to, first + ways):
            tlb[at] = -1
        first += ways
    tlb[TLB_LARGE] = left_large
    drop_psc(tlb)


@JIT
def list_frames(ram64, ram32, reg, fmap, gvas, frames, n):
    """Walk from the root, as a supervisor reads, for each address; note the frames found.

    -1 where nothing is present, -2 where a reserved bit is set.
    """
    for i in range(n):
        gva = gvas[i]
        rights = E_W | E_U | E_X
        if resolve(ram64, ram32, reg, fmap, gva, 0, 0, TOP, reg[R_ROOT], rights) != 0:
            level = reg[R_LEVEL]
            inside = (gva >> 12) & ((1 << (SHIFTS[level] - 12)) - 1)
            frames[i] = leaf_frame(reg[R_ENTRY + level], level) + inside
        elif reg[R_FAULT_ERROR] & 8 != 0:
            frames[i] = -2
        else:
            frames[i] = -1


@JIT
def run_block(ram64, ram32, flags, reg, tlb, pages, runs, used, start, stop, salt):
    """Execute runs `start`..`stop` of a user-mode access stream; return the index reached.

    R_REASON says why it stopped; `used[i - start]` is the frame run i used. A write run stores
    `salt << 40 | i` into the 8 bytes at its offset rounded down. A marked entry misses the test at
    the top of the loop, so stores alone pay for the guest write buffer: one test.
    """
    progress = reg[R_PROGRESS]
    limit = reg[R_LIMIT]
    n_frames = reg[R_FRAMES]
    tag = reg[R_TAG]
    gtag = reg[R_GTAG]
    set_mask = tlb[TLB_SET_MASK]
    ways = tlb[TLB_WAYS]
    n = tlb[TLB_N]
    reg[R_REASON] = REASON_DONE
    i = start
    while i < stop:
        if progress >= limit:
            reg[R_REASON] = REASON_BUDGET
            break
        run = runs[i]
        kind = run & 3
        vpn = pages[run >> 40]
        need = E_P | E_U | READABLE
        tested = need
        if kind == 1:
            need = E_P | E_U | E_W | E_D
            tested = need | E_MARKED
        elif kind == 2:
            need = E_P | E_U | E_X
            tested = need
        first = TLB_TAGS + (vpn & set_mask) * ways
        key = tlb[first]
        entry = 0
        if key == vpn | tag or key == vpn | gtag:
            entry = tlb[first + n]
        marked = 0
        if entry & tested == need:
            pfn = entry >> 12
        else:
            pfn = translate(ram64, ram32, reg, tlb, vpn << 12, kind, 1)
            if pfn < 0:
                # The hardware reports the byte, not the page.
                reg[R_FAULT_GVA] = (vpn << 12) | ((run >> 2) & 0xFFF)
                reg[R_REASON] = REASON_FAULT
                break
            marked = reg[R_MARKED]
        if pfn >= n_frames:
            if pfn == reg[R_DEVICE]:
                reg[R_REASON] = REASON_DEVICE
                break
        elif kind == 1:
            if flags[pfn] != 0:
                reg[R_REASON] = REASON_WATCHED
                break
            if marked != 0 and log_store(reg, (pfn << 12) | ((run >> 2) & 0xFF8), 8) == 0:
                reg[R_REASON] = REASON_BUFFER_FULL
                break
            ram64[(pfn << 9) + ((run >> 5) & 0x1FF)] = (salt << 40) + i
        used[i - start] = pfn
        progress += (run >> 14) & 0x3FFFFFF
        i += 1
    reg[R_REFERENCES] += progress - reg[R_PROGRESS]
    reg[R_PROGRESS] = progress
    return i
