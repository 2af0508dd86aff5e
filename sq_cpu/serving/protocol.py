"""The requests: which fields there are, and what each may be.

An unknown field is refused, as is one that asks for what is not done here. Some fields change no
answer, and clients send them: `user`, `metadata`, `store=false`, `service_tier="auto"`,
`safety_identifier`, `prompt_cache_key`, `parallel_tool_calls` and `tool_choice="none"` without
tools, and null for any field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from sq_cpu.errors import SqCpuError
from sq_cpu.inference.sampling import Sampling
from sq_cpu.serving.refusals import Refused

__all__ = ["ChatRequest", "CompletionRequest", "JsonFormat", "SchemaFormat", "explained"]


def _check_unicode(text: str) -> str:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("unicode", "Input has half a surrogate pair")
    return text


_Unicode = Annotated[str, AfterValidator(_check_unicode)]
_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
_Id = Annotated[int, Field(ge=0, lt=1 << 31)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Stop = Annotated[_Unicode, Field(min_length=1, max_length=1000)]
_Unsupported = Annotated[None, Field(description="Not supported: null, or left out.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Text(_Strict):
    type: Literal["text"]


class JsonFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Strict):
    """A schema and its name."""

    name: str
    description: str | None = None
    given: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(_Strict):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class _Request(_Strict):
    model: _Unicode
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: (
        Annotated[_Text | JsonFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None

    # They change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def stops(self) -> list[str]:
        """Return the texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def include_usage(self) -> bool:
        """Tell whether a stream ends with how many tokens there were."""
        if self.stream_options is not None and not self.stream:
            raise Refused(
                400, "stream_options: only with stream=true; leave it out", param="stream_options"
            )
        return self.stream_options is not None and self.stream_options.include_usage is True

    def sampling(self, seed: int, vocabulary: int) -> Sampling:
        """Return how tokens are chosen; `seed` where the request has none.

        Raises `Refused` for a bias of what is no token id.
        """
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal()) or int(key[:12]) >= vocabulary:
                raise Refused(
                    400,
                    f"logit_bias: {key[:32]!r} is no token id; they are 0 .. {vocabulary - 1}",
                    param="logit_bias",
                )
            bias[int(key)] = value
        try:
            return Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k or 0,
                top_p=1.0 if self.top_p is None else self.top_p,
                min_p=self.min_p or 0.0,
                seed=seed if self.seed is None else self.seed,
                repetition_penalty=self.repetition_penalty or 1.0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=bias,
            )
        except SqCpuError as error:
            raise Refused(400, str(error)) from error


class CompletionRequest(_Request):
    """The body of /v1/completions; a prompt is a text or token ids, and there may be several."""

    prompt: (
        _Unicode
        | Annotated[list[_Unicode], Field(min_length=1, max_length=1024)]
        | Annotated[list[_Id], Field(min_length=1)]
        | Annotated[list[list[_Id]], Field(min_length=1, max_length=1024)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    best_of: _Unsupported = None
    echo: Literal[False] | None = None
    suffix: _Unsupported = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Return each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class _Part(_Strict):
    type: Literal["text"]
    text: _Unicode


class Message(_Strict):
    """A message of a chat: text alone."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[_Unicode, Tag("a text")] | Annotated[list[_Part], Tag("a list")],
        Discriminator(lambda value: "a list" if isinstance(value, list) else "a text"),
    ]
    name: _Unicode | None = None

    # What an assistant's message has when a client sends it back.
    refusal: _Unsupported = None
    annotations: _Unsupported = None
    audio: _Unsupported = None
    function_call: _Unsupported = None
    tool_calls: _Unsupported = None

    def of_template(self) -> dict[str, str]:
        """Return the message as chat templates read it; they call a developer the system."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    tools: _Unsupported = None
    functions: _Unsupported = None
    function_call: _Unsupported = None
    audio: _Unsupported = None
    prediction: _Unsupported = None
    reasoning_effort: _Unsupported = None
    verbosity: _Unsupported = None
    web_search_options: _Unsupported = None

    def most_tokens(self) -> int | None:
        """Return how many tokens an answer may have; raises `Refused` for two such numbers."""
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise Refused(
                400,
                "max_tokens and max_completion_tokens differ; leave out max_tokens",
                param="max_tokens",
            )
        return both.pop() if both else None

    def likeliest(self) -> int | None:
        """Return how many tokens have their logprobs beside the chosen one's; None: no logprobs."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(
                400, "top_logprobs: only with logprobs=true; add it", param="top_logprobs"
            )
        return (self.top_logprobs or 0) if self.logprobs else None


def explained(errors: list[Any]) -> Refused:
    """Return what pydantic found wrong with a body, as one line on one field."""
    error = max(errors, key=lambda each: len(each["loc"]))
    kind = error["type"]
    if kind == "json_invalid":
        return Refused(400, f"the body is no JSON: {error['ctx']['error']}")
    # Among the places are the names of types, of which a field may have several.
    path = [str(step) for step in error["loc"][1:] if str(step).replace("_", "").isalnum()]
    name = ".".join(step for step in path if step != "str")
    if kind == "none_required":
        return Refused(400, f"{name} is not supported; leave it out", param=name)
    if kind == "extra_forbidden":
        return Refused(400, f"{name[:200]} is not a field of this request; leave it out")
    if kind == "literal_error":
        message = f"{name}: only {error['ctx']['expected']} is supported"
        return Refused(400, message, param=name)
    message = error["msg"].partition("\n")[0]
    if not name:
        return Refused(400, "the body is no JSON object of type application/json")
    return Refused(400, f"{name[:200]}: {message[:300]}", param=name[:200])
