"""Tokens as HTML: each with its probability and what else could have come, on hover.

All text is escaped: what a model writes is never markup.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence

from composer_gpt2.generation import Piece
from composer_gpt2.generation.text_stream import Token

__all__ = ["STYLE", "text_html"]

Decode = Callable[[Sequence[int]], str]

STYLE = """
.written {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; min-height: 6em;
          font-size: 1rem}
.written .prompt {opacity: 0.65}
.written .token {position: relative; border-radius: 3px; color: #111;
                 background: hsl(var(--hue) 75% 82%)}
.written .token:hover {outline: 2px solid #3b82f6}
.written .token:hover::after {content: attr(data-tip); position: absolute; left: 0; top: 1.7em;
    z-index: 50; white-space: pre; padding: 6px 10px; border-radius: 6px; background: #111827;
    color: #f9fafb; font: 0.8rem/1.5 ui-monospace, Consolas, monospace; pointer-events: none}
.written .ending {opacity: 0.65; font-size: 0.85em}
"""


def text_html(prompt: str, pieces: Sequence[Piece], decode: Decode) -> str:
    """A prompt and what has been written so far.

    Args:
        prompt: Plain text.
        pieces: Of one text, with log-probabilities.
        decode: Ids to text, as the model's tokenizer has it.
    """
    parts = [f'<span class="prompt">{html.escape(prompt)}</span>']
    for piece in pieces:
        if piece.text:
            parts.append(_piece_html(piece, decode))
        if piece.ending is not None and piece.ending != "length":
            parts.append(f'<span class="ending"> [{piece.ending}]</span>')
    return f'<div class="written">{"".join(parts)}</div>'


def _piece_html(piece: Piece, decode: Decode) -> str:
    tip = "\n\n".join(_tip(token, decode) for token in piece.tokens)
    # From red, 0.001 and below, over yellow to green, 1.
    log10 = sum(token.log_probability or 0.0 for token in piece.tokens) / math.log(10)
    hue = 120 * max(0.0, 1 + log10 / 3)
    # As an attribute with its line breaks; the browser shows it as it is.
    attribute = html.escape(tip).replace("\n", "&#10;")
    return (
        f'<span class="token" style="--hue:{hue:.0f}" data-tip="{attribute}">'
        f"{html.escape(piece.text)}</span>"
    )


def _tip(token: Token, decode: Decode) -> str:
    """The token in the first line, then the likeliest, each with its probability in percent."""
    chosen = (token.id, token.log_probability or 0.0)
    lines = [_line(chosen, decode), "-" * 12]
    return "\n".join(lines + [_line(other, decode) for other in token.alternatives])


def _line(choice: tuple[int, float], decode: Decode) -> str:
    token, log_probability = choice
    # An id without text ends a document.
    text = json.dumps(decode([token]), ensure_ascii=False) if decode([token]) else "(end)"
    return f"{100 * math.exp(log_probability):6.2f}%  {text}"
