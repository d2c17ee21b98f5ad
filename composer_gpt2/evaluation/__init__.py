"""What a trained model is worth: perplexity of texts, and tasks with right answers."""

from __future__ import annotations

__all__: list[str] = []
