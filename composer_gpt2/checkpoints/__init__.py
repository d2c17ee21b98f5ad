"""Checkpoints that are whole or not there, that run no code, and that a run goes on from."""

from composer_gpt2.checkpoints.manifest import CheckpointError, Manifest
from composer_gpt2.checkpoints.resume import (
    RecipeChangedError,
    ResumePoint,
    find_resume_point,
    newest_batch,
)
from composer_gpt2.checkpoints.safe_loading import load_safely, safe_loading
from composer_gpt2.checkpoints.saver import VerifiedCheckpointSaver

__all__ = [
    "CheckpointError",
    "Manifest",
    "RecipeChangedError",
    "ResumePoint",
    "VerifiedCheckpointSaver",
    "find_resume_point",
    "load_safely",
    "newest_batch",
    "safe_loading",
]
