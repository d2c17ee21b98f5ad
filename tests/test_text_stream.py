"""Tokens to text while they come."""

from __future__ import annotations

import random

import pytest

from composer_gpt2.generation.text_stream import TextStream, Token
from composer_gpt2.tokenizer import get_encoding

TEXT = (
    "Gr\u00fc\u00dfe, \u4e16\u754c! \U0001f600\U0001f468\u200d\U0001f469 na\u00efve caf\u00e9."
    "\n\nEnd of it."
)


def decode(ids) -> str:
    return get_encoding().decode(list(ids))


def run(ids, stops=()) -> tuple[list[str], TextStream]:
    stream, pieces, tokens = TextStream(decode, stops), [], []
    for token in ids:
        fragments = stream.push(Token(token))
        pieces += [fragment.text for fragment in fragments]
        tokens += [token for fragment in fragments for token in fragment.tokens]
        if stream.stopped:
            return pieces, stream
    last = stream.finish()
    pieces += [fragment.text for fragment in last]
    tokens += [token for fragment in last for token in fragment.tokens]
    if not stream.stopped:
        assert [token.id for token in tokens] == list(ids)
    return pieces, stream


def test_characters_are_whole_and_nothing_is_lost():
    ids = get_encoding().encode_ordinary(TEXT)
    pieces, _ = run(ids)
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) < len(ids)  # some characters are several tokens


def test_random_tokens_give_the_text_of_all_of_them():
    generator = random.Random(17)  # many are bytes that are no UTF-8
    for _ in range(50):
        ids = [
            generator.choice([generator.randrange(256), generator.randrange(50256)])
            for _ in range(20)
        ]
        assert "".join(run(ids)[0]) == decode(ids)


@pytest.mark.parametrize("stop", [" it", "End", "\n\n", "d of", "\U0001f600", "e, \u4e16", "."])
def test_a_stop_string_ends_the_text_before_it_also_across_tokens(stop):
    ids = get_encoding().encode_ordinary(TEXT)
    pieces, stream = run(ids, ["never in it", stop])
    assert stream.stopped
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stop_strings_counts():
    pieces, _ = run(get_encoding().encode_ordinary("one two three"), ["three", "wo"])
    assert "".join(pieces) == "one t"


def test_what_begins_as_a_stop_string_is_held_and_given_when_it_is_none():
    stream = TextStream(decode, ["###END"])
    ids = [get_encoding().encode_single_token(piece) for piece in ("a", "##", "#", "b")]
    shown = ["".join(f.text for f in stream.push(Token(token))) for token in ids]
    assert shown == ["a", "", "", "###b"]
    stream = TextStream(decode, ["###END"])
    assert not stream.push(Token(ids[1]))
    assert [fragment.text for fragment in stream.finish()] == ["##"]
