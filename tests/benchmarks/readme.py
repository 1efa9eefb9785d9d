"""Seconds and output of every block of Python in the README, in order.

    python -m tests.benchmarks.readme                      README.md
    python -m tests.benchmarks.readme docs/any-conditional.md

Seconds are those of the wall clock and, in brackets, of the processor, which a busy
machine does not lengthen as much. They count imports and all compilation: programs that
an earlier run has left on disk are not used.
"""

import sys
import time
from pathlib import Path

import jax

from tests.pages import python_blocks, run_block

ROOT = Path(__file__).resolve().parents[2]


def main(page: Path) -> None:
    """Run the blocks of ``page``; print line, seconds and output of each."""
    jax.config.update("jax_enable_compilation_cache", False)
    names: dict = {"__name__": "__docs__"}
    for block in python_blocks(page.read_text(encoding="utf-8")):
        if block.reason:
            continue
        wall, processor = time.perf_counter(), time.process_time()
        printed = run_block(page, block, names)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        place = f"{page.name}, line {block.line}"
        print(f"{place}: {wall:.1f} s (processor {processor:.1f} s)", flush=True)
        print(printed, flush=True)


if __name__ == "__main__":
    main(ROOT / (sys.argv[1] if len(sys.argv) > 1 else "README.md"))
