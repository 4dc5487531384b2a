"""What a CPU refuses to load into its control registers, what it makes of the rest, what follows.

A refused load is #GP and changes nothing. A machine's paging format is fixed: CR4.PAE is reserved
in a CPU of two-level paging, as in one without PAE, and cannot be cleared in the others.

Source: SDM vol. 3, 2.5, 4.1.1, 4.4.1; vol. 2, "MOV to and from control registers".
"""

from __future__ import annotations

from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    MAXPHYADDR,
    FormatSpec,
)

CR0_ET, CR0_NW, CR0_CD = 1 << 4, 1 << 29, 1 << 30
# PE MP EM TS ET NE, WP, AM, NW CD PG: the others cannot be set, and trying has no effect.
_CR0_DEFINED = 0x3F | 1 << 16 | 1 << 18 | 7 << 29
# VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT, and SMEP: what the modelled CPU has.
_CR4_DEFINED = 0x7FF | CR4_SMEP
_32_BITS = (1 << 32) - 1
_64_BITS = (1 << 64) - 1


def settled(spec: FormatSpec, register: int, value: int) -> int:
    """Return what a control register holds after a load of `value` that is not refused."""
    value &= _64_BITS if spec.sign_extended else _32_BITS
    return value & _CR0_DEFINED | CR0_ET if register == 0 else value


def refused(spec: FormatSpec, register: int, value: int) -> GeneralProtection | None:
    """Say why MOV to a control register is #GP whatever the tables hold; None if it is not."""
    if register not in (0, 3, 4):
        return GeneralProtection(f"CR{register} cannot be loaded")
    value &= _64_BITS if spec.sign_extended else _32_BITS
    why = _bad_cr3(value)
    if register != 3:
        why = _bad_cr0(spec, value) if register == 0 else _bad_cr4(spec, value)
    return GeneralProtection(f"CR{register} {value:#x}: {why}") if why else None


def _bad_cr0(spec: FormatSpec, value: int) -> str:
    if value >> 32:
        return "bits 63:32 are reserved"
    if value & CR0_PG and not value & CR0_PE:
        return "PG without PE"
    if value & CR0_NW and not value & CR0_CD:
        return "NW without CD"
    if spec.sign_extended and not value & CR0_PG:
        return "PG cannot be cleared in 64-bit mode"
    return ""


def _bad_cr3(value: int) -> str:
    # Of 32 bits none faults; PAE's PDPTEs have a rule of their own (`bad_root_entry`).
    return f"bits 63:{MAXPHYADDR} are reserved" if value >> MAXPHYADDR else ""


def _bad_cr4(spec: FormatSpec, value: int) -> str:
    defined = _CR4_DEFINED if spec.entry_bytes == 8 else _CR4_DEFINED & ~CR4_PAE
    if value & ~defined:
        return f"reserved bits {value & ~defined:#x}"
    if spec.entry_bytes == 8 and not value & CR4_PAE:
        return "PAE cannot be cleared"
    return ""


def reloads_top(cr0: int, cr4: int, register: int, value: int) -> bool:
    """Tell whether a load of CR0 or CR4 loads top-level entries that are held in registers again.

    Args:
        cr0, cr4: The registers before; `register` becomes `value`.

    Source: SDM vol. 3, 4.4.1.
    """
    if register == 0:
        return bool(value & CR0_PG and (cr0 ^ value) & (CR0_PG | CR0_NW | CR0_CD))
    counts = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP
    return bool(cr0 & CR0_PG and (cr4 ^ value) & counts)
