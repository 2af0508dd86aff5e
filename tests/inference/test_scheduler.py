"""Continuous batching: whatever runs beside a request, its tokens are those it gets alone."""

from __future__ import annotations

import inspect
import random
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fusing import fused
from test_lowering import quantized

from sq_cpu import Request, Sampling, Scheduler, SqCpuError, Token, fuse, generate_batch
from sq_cpu.inference.pages import PagePool

PAGE = 64


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    head = {} if request.param == "gemma2" else {"head": "int8"}
    return fused(request.param, max_position_embeddings=1024, sliding_window=80, **head)


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 64), k=count)


def requests() -> list[Request]:
    """Of all kinds, some with a beginning in common."""
    common = ids(200, 0)
    prompts = [ids(1, 1), common + ids(5, 2), ids(64, 3), common + ids(70, 4), common, ids(129, 5)]
    settings = [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.8, top_p=0.9, seed=1),
        Sampling(repetition_penalty=1.3, frequency_penalty=0.2),
    ]
    return [
        Request(
            prompt=prompt,
            max_new_tokens=3 + 17 * i % 70,
            sampling=settings[i % len(settings)],
            stop_tokens=[9],
            logprobs=2 if i % 3 == 0 else None,
        )
        for i, prompt in enumerate(prompts * 2)
    ]


def run(scheduler: Scheduler, arriving: list[Request], every: int = 1) -> list[list[Token]]:
    """Run to the end, with a new request every so many steps; return the tokens of each."""
    made: dict[int, list[Token]] = {}
    todo = [*arriving]
    steps = 0
    while todo or scheduler.busy:
        if todo and steps % every == 0:
            made[scheduler.add(todo.pop(0))] = []
        for token in scheduler.step():
            made[token.request].append(token)
        steps += 1
        assert steps < 5000
    assert scheduler.pages_used == scheduler.running == scheduler.waiting == 0
    return [made[number] for number in sorted(made)]


def told(tokens: list[Token]) -> list[Any]:
    return [(each.id, each.logprob, each.top, each.finish) for each in tokens]


@pytest.fixture(scope="module")
def alone(model: Any) -> list[list[Any]]:
    return [told(run(Scheduler(model, pages=10), [each])[0]) for each in requests()]


@pytest.mark.parametrize(
    ("pages", "rows", "sequences", "every"),
    [(400, 512, 256, 1), (400, 37, 256, 3), (12, 512, 256, 1), (9, 16, 3, 2), (400, 512, 2, 1)],
)
def test_tokens_are_those_of_a_request_alone(
    model: Any, alone: list[list[Any]], pages: int, rows: int, sequences: int, every: int
) -> None:
    scheduler = Scheduler(model, pages=pages, rows=rows, sequences=sequences)
    made = run(scheduler, requests(), every)
    assert [told(each) for each in made] == alone
    if pages == 12:
        assert scheduler.statistics.preemptions > 0
    if pages == 400:
        assert scheduler.statistics.preemptions == 0
        assert scheduler.statistics.prefix_hit_tokens >= 3 * PAGE


def test_alone_is_what_generate_gives(model: Any, alone: list[list[Any]]) -> None:
    assert generate_batch(model, requests()) == [[each[0] for each in one] for one in alone]
    plain = requests()[0]
    expected = model.generate(
        torch.tensor([plain.prompt]), max_new_tokens=3, do_sample=False, eos_token_id=9
    )
    assert [*plain.prompt, *(each[0] for each in alone[0])] == expected[0].tolist()


def test_prefixes_are_found_again(model: Any) -> None:
    scheduler = Scheduler(model, pages=16)
    prompt = ids(200, 8)
    first = run(scheduler, [Request(prompt=prompt, max_new_tokens=4)])
    assert scheduler.statistics.prefix_hit_tokens == 0
    again = run(scheduler, [Request(prompt=prompt, max_new_tokens=4)])
    assert scheduler.statistics.prefix_hit_tokens == 3 * PAGE
    assert told(first[0]) == told(again[0])
    # A prompt of whole pages computes its last one: its last token has to be seen.
    run(scheduler, [Request(prompt=prompt[:192], max_new_tokens=1)])
    assert scheduler.statistics.prefix_hit_tokens == 5 * PAGE
    # What others need goes first from what was used longest ago.
    run(scheduler, [Request(prompt=ids(900, 9), max_new_tokens=60)])
    run(scheduler, [Request(prompt=prompt, max_new_tokens=4)])
    assert scheduler.statistics.prefix_hit_tokens < 8 * PAGE


def test_cancelled(model: Any, alone: list[list[Any]]) -> None:
    scheduler = Scheduler(model, pages=60, rows=50)
    given = requests()
    numbers = [scheduler.add(each) for each in given]
    made: dict[int, list[Token]] = {number: [] for number in numbers}
    cancelled = {numbers[1], numbers[3], numbers[8]}
    scheduler.cancel(numbers[8])
    for step in range(2000):
        for token in scheduler.step():
            made[token.request].append(token)
        if step == 3:
            for number in cancelled:
                scheduler.cancel(number)
        if not scheduler.busy:
            break
    assert not made[numbers[8]]
    for number, one in zip(numbers, alone, strict=True):
        if number not in cancelled:
            assert told(made[number]) == one
    assert scheduler.pages_used == 0
    scheduler.cancel(numbers[0])  # has ended
    assert scheduler.step() == []


def test_logprobs(model: Any) -> None:
    prompt = ids(20, 5)
    sampling = Sampling(logit_bias={7: 50.0})
    request = Request(prompt=prompt, max_new_tokens=2, sampling=sampling, logprobs=3)
    first, second = run(Scheduler(model, pages=4), [request])[0]
    assert first.id == second.id == 7
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, 7]])).logits[0, -2:].log_softmax(-1)
    for token, row in zip((first, second), expected, strict=True):
        assert token.logprob == pytest.approx(float(row[7]), abs=1e-3)
        assert [value for _, value in token.top] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-3
        )


def test_grammar(model: Any) -> None:
    """Tokens that are allowed take turns; where none is, the request fails and others go on."""
    turns = iter([5, 6, 5, None])

    def allowed() -> torch.Tensor:
        token = next(turns)
        words = torch.zeros(2, dtype=torch.int32)
        if token is not None:
            words[0] = 1 << token
        return words

    other = Request(prompt=[4, 5], max_new_tokens=6)
    made = run(
        Scheduler(model, pages=4), [Request(prompt=[3], max_new_tokens=9, allowed=allowed), other]
    )
    assert [token.id for token in made[0]] == [5, 6, 5, -2]
    assert made[0][-1].finish == "error"
    assert "allowed" in made[0][-1].error
    assert len(made[1]) == 6


def test_a_step_that_fails_is_taken_again(model: Any, alone: list[list[Any]]) -> None:
    scheduler = Scheduler(model, pages=400)
    failing = [True]

    def allowed() -> torch.Tensor:
        if failing.pop() if failing else False:
            raise KeyboardInterrupt
        return torch.full((2,), -1, dtype=torch.int32)

    given = requests()
    numbers = [scheduler.add(each) for each in given]
    scheduler.add(Request(prompt=[3], max_new_tokens=2, allowed=allowed))
    made: dict[int, list[Token]] = {number: [] for number in [*numbers, numbers[-1] + 1]}
    while scheduler.busy:
        try:
            for token in scheduler.step():
                made[token.request].append(token)
        except KeyboardInterrupt:
            assert not failing
    assert [told(made[number]) for number in numbers] == alone


class Interruption:
    """Raises KeyboardInterrupt at one of the lines of a module, counted as they run."""

    def __init__(self, module: Any, line: int) -> None:
        self.left = line
        self._file = inspect.getfile(module)

    def step(self, scheduler: Scheduler) -> list[Token]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return scheduler.step()
        finally:
            sys.settrace(before)

    def _trace(self, frame: Any, event: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != self._file:
            return None
        # Past the last line of a step its tokens are the caller's.
        if event == "line" and not frame.f_locals.keys() & {"answered"}:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace


@pytest.fixture(scope="module")
def llama() -> Any:
    return fused("llama", max_position_embeddings=1024, head="int8")


def test_interrupts(llama: Any) -> None:
    """Wherever a step is interrupted, no token is lost, wrong or twice, and no page is."""
    given = requests()[:5]
    alone = [told(run(Scheduler(llama, pages=10), [each])[0]) for each in given]

    def interrupted(line: int) -> int:
        interruption = Interruption(inspect.getmodule(Scheduler), line)
        scheduler = Scheduler(llama, pages=9, rows=70, sequences=4)
        made: dict[int, list[Token]] = {scheduler.add(each): [] for each in given}
        for _ in range(1000):
            try:
                for token in interruption.step(scheduler):
                    made[token.request].append(token)
            except KeyboardInterrupt:
                continue
            if not scheduler.busy:
                break
        assert [told(each) for each in made.values()] == alone
        assert scheduler.pages_used == 0
        return line - interruption.left

    lines = interrupted(1 << 40)
    assert lines > 5000
    for line in random.Random(0).sample(range(1, lines), 40):
        interrupted(line)


def test_a_model_that_changes() -> None:
    """Another model's keys and values lie in the pages."""
    model = fused("llama")
    request = Request(prompt=[3, 4], max_new_tokens=4)
    scheduler = Scheduler(model, pages=4)
    scheduler.add(request)
    with torch.no_grad():
        model.model.norm.weight *= 2
    with pytest.raises(SqCpuError, match="the model has changed"):
        scheduler.add(request)
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=1)  # compiles it again
    with pytest.raises(SqCpuError, match="the model has changed"):
        scheduler.step()
    scheduler = Scheduler(model, pages=4)
    scheduler.add(request)
    fuse(model, enabled=False)
    with pytest.raises(SqCpuError, match="the model has changed"):
        scheduler.step()


def test_beside_a_call_from_another_thread() -> None:
    """The model calls a head with hooks itself; its base has a step's states for it alone."""
    model = quantized("llama")
    ids_of_other = torch.tensor([[5, 6, 7]])
    made: list[torch.Tensor] = []

    @torch.no_grad()
    def call() -> None:
        made.append(model(ids_of_other).logits)

    calls: list[Callable[[], None]] = []

    def beside(*_: Any) -> None:
        if calls:
            thread = threading.Thread(target=calls.pop())
            thread.start()
            thread.join()

    model.lm_head.register_forward_hook(beside)
    fuse(model)
    scheduler = Scheduler(model, pages=4)
    call()
    calls.append(call)
    run(scheduler, [Request(prompt=[3], max_new_tokens=2)])
    assert torch.equal(*made)


def test_the_end_of_a_prefix_makes_room_first() -> None:
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    for page in pages:
        pool.name(page, bytes([page]))
    pool.release(pages)
    assert pool.take() == pages[-1]
    assert [pool.find(bytes([page])) for page in pages] == [pages[0], pages[1], None]


@pytest.mark.parametrize("where", ["lm_head", "model.layers.0.mlp"])
def test_hooks_are_not_passed_over(model: Any, where: str) -> None:
    scheduler = Scheduler(model, pages=4)
    handle = model.get_submodule(where).register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(SqCpuError, match="hooks"):
            scheduler.add(Request(prompt=[3], max_new_tokens=2))
        with pytest.raises(SqCpuError, match="hooks"):
            generate_batch(model, [Request(prompt=[3], max_new_tokens=2)])
    finally:
        handle.remove()
    assert len(generate_batch(model, [Request(prompt=[3], max_new_tokens=2)])[0]) == 2


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (lambda: 1 // 0, "raises ZeroDivisionError: integer"),
        (lambda: torch.zeros(1), r"gives torch.float32 \[1\], not int32 \[2\]"),
        (lambda: None, "raises AttributeError"),
    ],
)
def test_a_request_whose_mask_fails_ends_alone(model: Any, allowed: Any, message: str) -> None:
    other = Request(prompt=[4, 5], max_new_tokens=6)
    bad = Request(prompt=[3], max_new_tokens=9, allowed=allowed)
    made = run(Scheduler(model, pages=4), [bad, other])
    assert [token.finish for token in made[0]] == ["error"]
    assert re.search(message, made[0][0].error)
    assert len(made[1]) == 6


def test_refusals(model: Any) -> None:
    for options in ({"pages": 0}, {"rows": -1}, {"sequences": 2.5}):
        with pytest.raises(SqCpuError, match=next(iter(options))):
            Scheduler(model, **options)
    with pytest.raises(SqCpuError, match="not fused"):
        Scheduler(quantized("llama"))
    scheduler = Scheduler(model, pages=2)
    for message, options in (
        ("the prompt is empty", {"prompt": []}),
        ("token ids are a list", {"prompt": "ab"}),
        ("ids from 3 to 64", {"prompt": [3, 64]}),
        ("max_new_tokens is 0", {"max_new_tokens": 0}),
        ("exceed the model's 1024 positions", {"max_new_tokens": 1024}),
        ("130 tokens need 3 pages of the cache, which has 2", {"max_new_tokens": 129}),
        ("stop_tokens", {"stop_tokens": 3}),
        ("logprobs is -1", {"logprobs": -1}),
        ("logprobs is 2.0", {"logprobs": 2.0}),
        ("prompt or logit_bias has ids from 3 to 70", {"sampling": Sampling(logit_bias={70: 1})}),
    ):
        with pytest.raises(SqCpuError, match=message):
            scheduler.add(Request(**{"prompt": [3], "max_new_tokens": 2} | options))
    assert not scheduler.busy
