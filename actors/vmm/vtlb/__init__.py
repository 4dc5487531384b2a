"""Intel's virtual TLB: active page tables that stand to the guest's as a TLB stands to memory."""
