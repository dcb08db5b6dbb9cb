"""What passes admission is valid for a backend; what does not is told why, with numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import (
    ContextLengthExceeded,
    Prompt,
    admit_sampling,
    find_model,
    nth_seed,
    text_prompt,
    token_prompt,
)
from router.backend import ModelSpec
from router.echo import EchoBackend
from splitserve.errors import InvalidRequest, NotFound


@given(length=st.integers(0, 600), max_tokens=st.none() | st.integers(1, 600))
def test_what_is_admitted_fits_the_model_and_the_pool(
    spec: ModelSpec, length: int, max_tokens: int | None
) -> None:
    fields = {} if max_tokens is None else {"max_tokens": max_tokens}
    fits = length > 0 and length + (max_tokens or 1) <= 400
    try:
        prompt = token_prompt(spec, [7] * length)
        params = admit_sampling(spec, prompt, fields)
    except InvalidRequest as error:
        assert not fits
        assert length == 0 or isinstance(error, ContextLengthExceeded)
    else:
        assert fits
        assert params.seed is not None
        assert params.max_tokens == (max_tokens or 400 - length)


async def test_a_text_that_is_far_too_long_is_not_tokenised(spec: ModelSpec) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"of 5000000 characters has at least \d+ tokens.* 400 "):
        await text_prompt(spec, "a" * 5_000_000)


def test_defaults_of_the_model_stand_where_the_client_says_nothing(spec: ModelSpec) -> None:
    model = replace(spec, generation_defaults={"temperature": 0.3, "top_p": 0.8, "max_tokens": 64})
    params = admit_sampling(model, Prompt([1]), {"top_p": 1.0}, default_max_tokens=16)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 1.0, 64)


def test_a_default_length_shrinks_to_the_room_there_is(spec: ModelSpec) -> None:
    params = admit_sampling(spec, Prompt([1] * 395), {}, default_max_tokens=16)
    assert params.max_tokens == 5


def test_further_answers_have_further_seeds(spec: ModelSpec) -> None:
    params = admit_sampling(spec, Prompt([1]), {"seed": 2**63 - 1})
    assert [nth_seed(params, n).seed for n in range(3)] == [2**63 - 1, 0, 1]


async def test_a_missing_name_is_the_only_model(spec: ModelSpec) -> None:
    assert (await find_model(EchoBackend([spec]), None)).name == "echo"
    with pytest.raises(NotFound):
        await find_model(EchoBackend([]), None)
    with pytest.raises(InvalidRequest, match="echo, other"):
        await find_model(EchoBackend([spec, replace(spec, name="other")]), "")
