"""Trains a GPT-2: ``composer -n 8 run.py -f yamls/gpt2-125m.yaml [key=value ...]``."""

import sys

from composer_gpt2.train import main

# The guard matters: processes that upload checkpoints to an object store import this file again.
if __name__ == "__main__":
    sys.exit(main())
