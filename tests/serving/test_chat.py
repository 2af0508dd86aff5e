"""A chat template is a program that came with a model: it is held to a time and a size."""

from __future__ import annotations

from typing import Any

import pytest
from byte_models import byte_tokenizer

from sq_cpu.errors import SqCpuError
from sq_cpu.serving import chat
from sq_cpu.serving.chat import chat_text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ nothing.at.all }}", "fails"),
        ("{% if %}", "fails"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "1 s",
        ),
        ("{{ 10 ** (10 ** 10) }}", "1 s"),
        ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 4 MB"),
        ("{{ 'x' * 10**11 }}", "fails"),
    ],
)
def test_a_chat_template_is_held_to_a_time_and_a_size(
    template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 1 if reason == "1 s" else 60)
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(SqCpuError, match="the model's chat template fails") as caught:
        chat_text(tokenizer, [{"role": "user", "content": "Hello"}])
    assert reason in str(caught.value)


def test_a_chat_template_that_works() -> None:
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}é"
    assert chat_text(tokenizer, [{"role": "user", "content": "Hello"}]) == "<user>Helloé"
