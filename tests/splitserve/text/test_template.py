"""Chat templates do what published ones need, and nothing else."""

from __future__ import annotations

import pytest

from splitserve.errors import InvalidRequest
from splitserve.text import Tokenizer
from splitserve.text.template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, object]] | None = None, **special: str) -> str:
    return ChatTemplate(source, special, max_chars=1000).render(HI if messages is None else messages, None, True)


def test_the_demo_model_greets_as_it_was_trained(demo_tokenizer: Tokenizer) -> None:
    assert demo_tokenizer.apply_chat_template(HI).endswith(
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert demo_tokenizer.apply_chat_template(HI, add_generation_prompt=False).endswith("hi<|im_end|>\n")


def test_blocks_leave_no_blank_lines() -> None:
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}")
        == "hi\n"
    )


def test_special_tokens_are_named() -> None:
    assert render("{{ bos_token }}x", bos_token="<s>") == "<s>x"


def test_json_is_plain() -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "<é>"}]
    assert render("{{ messages[0] | tojson }}", messages) == '{"role": "user", "content": "<é>"}'


def test_training_marks_and_loop_controls_are_understood() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"


def test_the_date_is_known() -> None:
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_templates_can_refuse() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.at_all }}",
        "{{ messages[0]['role'] + 3 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(100000) %}aaaa{% endfor %}",
        "{% if %}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_goes_wrong_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.field == "messages"


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        render("")
