"""Small things to learn with: each computes or reads its data, has a recipe, and is measured."""

__all__: list[str] = []
