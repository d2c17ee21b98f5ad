"""Trained models for everybody: a Hugging Face folder that needs nothing of this package."""

from composer_gpt2.export.architecture import NotExportableError
from composer_gpt2.export.checking import LogitsDifferError
from composer_gpt2.export.program import Exported, export_model

__all__ = ["Exported", "LogitsDifferError", "NotExportableError", "export_model"]
