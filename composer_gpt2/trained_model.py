"""Trained models by the name a person has for them: a run, a checkpoint, a folder, a hub id."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from composer_gpt2.model import CPUPrecision, GPT2Model

__all__ = ["find_checkpoint", "load_trained_model"]


def load_trained_model(
    path_or_hub_id: str,
    *,
    device: str | torch.device | None = None,
    cpu_precision: CPUPrecision = "fp32",
) -> GPT2Model:
    """A model to use and not to train: in evaluation mode, on a GPU if there is one.

    Args:
        path_or_hub_id: A run folder, a checkpoint (``.pt`` or ``.safetensors``, here or at an
            ``s3://`` address), a Hugging Face folder, or a hub id.
        device: Where to. Default: the first GPU, else the CPU.
        cpu_precision: As in :class:`composer_gpt2.model.GPT2Model`.

    Raises:
        FileNotFoundError: Nothing is there, or the run has not saved a checkpoint.
        ValueError: What is there holds no GPT-2.
        CheckpointError: The file is no checkpoint, or would run code.
    """
    model = GPT2Model.from_pretrained(find_checkpoint(path_or_hub_id), cpu_precision=cpu_precision)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def find_checkpoint(path: str) -> str:
    """The newest checkpoint of a run folder; any other path, address or hub id as it is.

    Raises:
        FileNotFoundError: A run folder without a checkpoint.
    """
    if not (Path(path) / "recipe.yaml").is_file():
        return path
    save_folder = yaml.safe_load((Path(path) / "recipe.yaml").read_text())["save_folder"]
    latest = f"{save_folder}/latest-rank0.pt"
    if "://" not in latest and not Path(latest).exists():
        raise FileNotFoundError(
            f"the run in {path} must have saved a checkpoint to be used, got none in "
            f"{save_folder}; let it run longer, or start this where the run was started."
        )
    return latest
