"""Interrupt vectors the guest kernel serves."""

VECTOR_TIMER = 0x20
VECTOR_DISK = 0x2E
VECTOR_RESCHEDULE = 0xFD
VECTOR_STOP = 0xFC
VECTOR_SHOOTDOWN = 0xFE
