"""`es2fast.train` with one more override on rank 1: `failing_worker.py OVERRIDE --config ...`."""

from __future__ import annotations

import os
import sys

from es2fast.train import main

if __name__ == "__main__":
    arguments = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
    override, *rest = arguments
    sys.exit(main([*rest, override] if os.environ["RANK"] == "1" else rest))
