"""Text from a trained model."""

from composer_gpt2.generation.sampling import Sampling
from composer_gpt2.generation.text_generator import Piece, Sample, TextGenerator, generate

__all__ = ["Piece", "Sample", "Sampling", "TextGenerator", "generate"]
