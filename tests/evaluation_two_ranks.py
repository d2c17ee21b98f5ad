"""Trains two batches on the ranks of this launch, evaluates after each, and keeps the log."""

import json
import sys
from pathlib import Path

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from torch.utils.data import DataLoader

from composer_gpt2.evaluation.callback import EvaluateTasks
from composer_gpt2.model import GPT2Model


def collate(rows):
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, data = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(5)
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=48, dropout=0.0)
    tokens = torch.randint(0, 50257, (8, 16), generator=torch.Generator().manual_seed(3))
    dist.initialize_dist("cpu", 60.0)
    rows = list(tokens)
    sampler = dist.get_sampler(rows, shuffle=False)
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(  # type: ignore
            rows, batch_size=2, sampler=sampler, collate_fn=collate
        ),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration="2ba",
        callbacks=[EvaluateTasks(data=data, interval="1ba", batch_tokens=64)],
        loggers=[log],
        device="cpu",
        progress_bar=False,
        dist_timeout=60.0,
    )
    trainer.fit()
    logged = {
        name: [float(value) for _, value in values]
        for name, values in log.data.items()
        if name.startswith("metrics/") and not name.startswith("metrics/train")
    }
    (out / f"rank{dist.get_global_rank()}.json").write_text(json.dumps(logged))
    if dist.get_global_rank() == 0:
        model.model.save_pretrained(out / "model")
