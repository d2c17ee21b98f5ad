"""Trains a GPT-2: ``composer -n 8 run.py -f yamls/gpt2-125m.yaml [key=value ...]``."""

import gc
import sys

# The guard matters: processes that upload checkpoints to an object store import this file again.
if __name__ == "__main__":
    # Thousands of modules are imported, and nothing of them is garbage: looking for it takes time,
    # now and at each full collection (the phase `imports` in benchmarks/start_*.md).
    gc.disable()
    from composer_gpt2.train import main

    gc.freeze()
    gc.enable()
    sys.exit(main())
