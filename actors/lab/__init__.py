"""What experiments on the machine's parts: recorded accesses and page tables run against them."""
