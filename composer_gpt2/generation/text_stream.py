"""Tokens to text while they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Fragment", "TextStream", "Token"]

_BROKEN = (
    "\ufffd"  # what bytes that are no UTF-8 become, a character that is not whole yet among them
)


@dataclass(frozen=True)
class Token:
    """A token that was chosen, and what the model thought of it.

    Probabilities are the model's own, before temperature and all that restricts the choice.
    """

    id: int
    log_probability: float | None = None
    """In nats; ``None`` if it was not asked for."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, each with its log-probability, the likeliest first."""


@dataclass(frozen=True)
class Fragment:
    """Text, and the tokens that it came from: several where only together they are characters."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass
class TextStream:
    """Takes tokens one by one and gives text as soon as nothing that follows can change it.

    All fragments together are the text of all tokens, up to the first stop string.

    Args:
        decode: Ids to text; bytes that are no UTF-8 become U+FFFD.
        stops: Strings that end the text and do not belong to it; not empty ones.
    """

    decode: Callable[[Sequence[int]], str]
    stops: Sequence[str] = ()
    stopped: bool = False
    """Whether a stop string has come."""
    _context: list[int] = field(default_factory=list)  # ids decoded before, for what they do next
    _waiting: list[Token] = field(default_factory=list)  # their last character is not whole
    _held: list[Fragment] = field(default_factory=list)  # may be the beginning of a stop string

    def push(self, token: Token) -> list[Fragment]:
        """The next token, and the text that is certain now."""
        self._waiting.append(token)
        text = self._text_of_waiting()
        if text.endswith(_BROKEN):
            return []
        self._take(text)
        return self._release()

    def finish(self) -> list[Fragment]:
        """No token follows: the text that was held back."""
        if self._waiting and not self.stopped:
            self._take(self._text_of_waiting())
        released = self._release()
        released, self._held = released + self._held, []
        return released

    def _text_of_waiting(self) -> str:
        ids = [token.id for token in self._waiting]
        return self.decode([*self._context, *ids])[len(self.decode(self._context)) :]

    def _take(self, text: str) -> None:
        self._held.append(Fragment(text, tuple(self._waiting)))
        self._context = [token.id for token in self._waiting]
        self._waiting = []

    def _release(self) -> list[Fragment]:
        """Takes from what is held whatever no stop string can begin in."""
        text = "".join(fragment.text for fragment in self._held)
        found = [position for position in map(text.find, self.stops) if position >= 0]
        if found:
            self.stopped = True
            return self._cut(min(found))
        n_open = max((_overlap(text, stop) for stop in self.stops), default=0)
        n_free, released = len(text) - n_open, []
        while self._held and len(self._held[0].text) <= n_free:
            n_free -= len(self._held[0].text)
            released.append(self._held.pop(0))
        return released

    def _cut(self, n_characters: int) -> list[Fragment]:
        """The first characters of what is held; the rest is gone."""
        released = []
        for fragment in self._held:
            if n_characters <= 0:
                break
            released.append(Fragment(fragment.text[:n_characters], fragment.tokens))
            n_characters -= len(fragment.text)
        self._held = []
        return released


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
