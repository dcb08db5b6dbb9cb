"""Tokens one by one give the text of all, and no half characters on the way."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from splitserve.text import IncrementalDetokenizer, Tokenizer

id_lists = st.lists(st.integers(0, 49_151), max_size=40)


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.fixture(scope="module")
def sentence_pieces() -> Tokenizer:
    """A vocabulary as SentencePiece writes it: a meta symbol for spaces, 256 byte tokens, no byte level."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "lo", "▁", "!", "é"]
    inner = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner.to_str().encode())


@given(ids=id_lists, skip=st.booleans())
@settings(max_examples=300)
def test_random_tokens_of_the_demo_model(demo_tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    assert streamed(demo_tokenizer, ids, skip) == demo_tokenizer.decode(ids, skip)


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_text_of_any_script_comes_back(demo_tokenizer: Tokenizer, text: str) -> None:
    ids = demo_tokenizer.encode(text, add_special_tokens=False)
    assume(demo_tokenizer.decode(ids, skip_special_tokens=False) == text)  # the vocabulary lacks a few bytes
    detokenizer = IncrementalDetokenizer(demo_tokenizer, skip_special_tokens=False)
    pushed = [detokenizer.push(token) for token in ids]
    assert "".join(pushed) == text
    assert detokenizer.flush() == ""
    assert all("\ufffd" not in part for part in pushed) or "\ufffd" in text


def test_half_a_character_is_held_back_then_replaced(demo_tokenizer: Tokenizer) -> None:
    ids = demo_tokenizer.encode("𓂀", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(demo_tokenizer)
    assert detokenizer.push(ids[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_ids_without_a_token_stand_for_nothing(demo_tokenizer: Tokenizer) -> None:
    assert streamed(demo_tokenizer, [60_000, 19556]) == "Hello"


@given(st.lists(st.integers(257, 262), max_size=20))
def test_sentence_pieces_give_the_text_of_all(sentence_pieces: Tokenizer, ids: list[int]) -> None:
    assert streamed(sentence_pieces, ids) == sentence_pieces.decode(ids)


@given(st.text(st.sampled_from("aé€😀"), max_size=8))
def test_byte_tokens_join_to_characters(sentence_pieces: Tokenizer, text: str) -> None:
    ids = [byte + 1 for byte in text.encode()]
    detokenizer = IncrementalDetokenizer(sentence_pieces)
    pushed = [detokenizer.push(token) for token in ids]
    assert "".join(pushed) == text
    assert not any("\ufffd" in part for part in pushed)


def test_a_run_of_undecodable_bytes_does_not_pile_up(sentence_pieces: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(sentence_pieces)
    shown = "".join(detokenizer.push(0xFF + 1) for _ in range(64))
    assert len(shown) >= 48


def test_the_prompt_gives_the_first_word_its_space(sentence_pieces: Tokenizer) -> None:
    hello, world = 257, 258
    assert IncrementalDetokenizer(sentence_pieces).push(world) == "world"
    assert IncrementalDetokenizer(sentence_pieces, context=[hello]).push(world) == " world"
