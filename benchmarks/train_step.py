"""A training step on a CPU: Hugging Face's GPT-2, stock Composer, ours line by line, the ceiling.

The same as ``composer-gpt2 bench``; ``--help`` has the options, the report how it measures.

    python benchmarks/train_step.py -f gpt2-125m-fast.yaml
    python benchmarks/train_step.py -f gpt2-125m-fast.yaml --loss-steps 200
"""

from __future__ import annotations

import sys

from composer_gpt2.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
