"""Trains a few batches with each algorithm on the ranks of this launch, and keeps the weights."""

import sys
from pathlib import Path

import torch
from composer.utils import dist
from settings import ALGORITHMS, runs_here
from training import build_network, train, weights

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in ALGORITHMS.items():
        if not runs_here(case):
            continue
        run, _ = train(build_network(case.cpu_precision), [case.make()], microbatch_size=1)
        if dist.get_global_rank() == 0:
            kept = {"token": run.state.timestamp.token.value, "weights": weights(run.state.model)}
            torch.save(kept, Path(sys.argv[1]) / f"{name}.pt")
