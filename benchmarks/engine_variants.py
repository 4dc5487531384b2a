"""The kernels without counting, made from the kernels' own source.

Statements that add to a counter, and the one that notes the frame used, are taken out of the syntax
tree; what remains is compiled as the kernels are, but not cached.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from penumbra.hw import compiled
from penumbra.hw.compiled import Kernels
from penumbra.hw.formats import X86_64

# The count of walks begun by the paging-structure cache stays: the walk itself looks at it.
COUNTERS = {"R_REFERENCES", "R_MISSES", "R_WALKS", "R_WALK_READS", "R_AD_WRITES"}


class Uncounted(ast.NodeTransformer):
    """Takes counting out; `taken` says which counters it met."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:
        name = self._name(node.target, "reg")
        if name in COUNTERS:
            self.taken.add(name)
            return None
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        target = node.targets[0]
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "used":
            self.taken.add("used")
            return None
        return node

    def _name(self, target: ast.expr, array: str) -> str:
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == array:
            return ast.unparse(target.slice)
        return ""


@cache
def uncounted_kernels() -> Kernels:
    """Return x86-64's kernels, compiled by numba, that count nothing."""
    import numba

    path = Path(compiled.__file__).with_name("kernels.py")
    strip = Uncounted()
    tree = ast.fix_missing_locations(strip.visit(ast.parse(path.read_text(encoding="utf-8"))))
    missing = (COUNTERS | {"used"}) - strip.taken
    assert not missing, f"the kernels do not count {missing} in the way expected"
    module = ModuleType("uncounted_kernels")
    vars(module).update(SPEC=X86_64, JIT=numba.njit(nogil=True))
    sys.modules[module.__name__] = module
    exec(compile(tree, str(path), "exec"), vars(module))
    return Kernels(True, module)
