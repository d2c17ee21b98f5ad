"""Keys and values of the tokens so far, in memory that is there from the start.

Shapes: ``R`` texts in the batch, ``C`` columns (tokens) of the cache, ``H`` heads, ``D`` width of a
head, ``T`` tokens of a prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import Cache

__all__ = ["KeyValueCache"]


class KeyValueCache(Cache):
    """One row for each text; the last tokens of all prompts stand in the same column.

    So a shorter prompt leaves its first columns empty, and every later token goes into one column
    of all rows. Prompts are read without their padding, each once for all of its texts; then
    :meth:`advance` follows each token. A text that ends gives its row away.

    Args:
        lengths: Tokens of each row's prompt.
        capacity: Columns: the longest prompt and all new tokens.
    """

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        super().__init__()
        self.n_rows = len(lengths)
        self.n_columns = max(lengths)
        self.starts = [self.n_columns - length for length in lengths]
        """The first column of each row that holds a token."""
        self._capacity = capacity
        self._keys: list[Tensor] = []  # of each layer, (R, H, C, D)
        self._values: list[Tensor] = []
        self._filling: tuple[list[int], list[int]] | None = None

    @contextlib.contextmanager
    def filling(self, rows: list[int], sources: list[int]) -> Iterator[None]:
        """While it lasts, the network reads prompts of one length.

        Row ``sources[i]`` of its batch becomes row ``rows[i]`` of the cache.
        """
        self._filling = rows, sources
        try:
            yield
        finally:
            self._filling = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: object = None
    ) -> tuple[Tensor, Tensor]:
        """Stores what a layer has computed, and returns all that it attends to; as in transformers.

        Args:
            key_states: Shape ``(B, H, T, D)`` of a prompt, ``(R, H, 1, D)`` of a token.
            value_states: As ``key_states``.
            layer_idx: Layers begin in their order.
            cache_kwargs: Ignored.
        """
        if layer_idx == len(self._keys):
            shape = (len(self.starts), key_states.shape[1], self._capacity, key_states.shape[3])
            # Zeros, because a masked column still takes part with weight 0, and 0 x NaN is NaN.
            self._keys.append(key_states.new_zeros(shape))
            self._values.append(value_states.new_zeros(shape))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._filling is not None:
            rows, sources = self._filling
            first = self.n_columns - key_states.shape[2]
            for row, source in zip(rows, sources, strict=True):
                keys[row, :, first : self.n_columns] = key_states[source]
                values[row, :, first : self.n_columns] = value_states[source]
            return key_states, value_states
        n = self.n_columns
        keys[: self.n_rows, :, n : n + 1] = key_states
        values[: self.n_rows, :, n : n + 1] = value_states
        return keys[: self.n_rows, :, : n + 1], values[: self.n_rows, :, : n + 1]

    def advance(self) -> None:
        """Counts the token that all layers have stored."""
        self.n_columns += 1

    def give_away(self, row: int) -> None:
        """Ends a text: the last row moves into its place."""
        last = self.n_rows - 1
        if row != last:
            for states in (*self._keys, *self._values):
                states[row, :, : self.n_columns] = states[last, :, : self.n_columns]
            self.starts[row] = self.starts[last]
        self.n_rows = last

    def empty_columns(self, device: torch.device) -> Tensor | None:
        """True where a row has no token, shape ``(R, C)`` up to the next column; None if nowhere.

        The next column, where the next token's keys go, is a token's.
        """
        starts = self.starts[: self.n_rows]
        if not any(starts):
            return None
        columns = torch.arange(self.n_columns + 1, device=device)
        return columns < torch.tensor(starts, device=device)[:, None]

    def positions(self, device: torch.device) -> Tensor:
        """The number of the next token in its own text, shape ``(R,)``."""
        return self.n_columns - torch.tensor(self.starts[: self.n_rows], device=device)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """The tokens that the network takes to have been before; as in transformers."""
        return 0 if self._filling is not None else self.n_columns

    def get_max_cache_shape(self) -> int:
        """The columns; as in transformers."""
        return self._capacity
