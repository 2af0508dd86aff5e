"""Server-sent events as clients read them."""

from __future__ import annotations

import json

from sq_cpu.serving.formats import event


def test_no_character_of_a_text_ends_a_line() -> None:
    text = "".join(map(chr, [*range(0x300), 0x2028, 0x2029, 0xFEFF, 0x1F600]))
    first, *rest = event({"text": text}).splitlines()
    assert rest == [""]
    assert json.loads(first.removeprefix("data: ")) == {"text": text}
