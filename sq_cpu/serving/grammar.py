"""Answers in JSON, through xgrammar (arXiv 2411.15100): only what fits may come next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.extras import require
from sq_cpu.serving.protocol import JsonFormat, SchemaFormat

__all__ = ["Grammar", "Grammars"]

_CACHE = 256 << 20  # bytes of compiled grammars
_MOST_CHARACTERS = 1 << 16

# What xgrammar 0.2 leaves out of a grammar, mostly without a word. With a bound on its length, a
# string may have control characters, which JSON may not (mlc-ai/xgrammar, issue 800).
_IGNORED = frozenset(
    [
        *("contains", "minContains", "maxContains", "uniqueItems", "not", "if", "then", "else"),
        *("dependentRequired", "dependentSchemas", "propertyNames", "unevaluatedProperties"),
        *("unevaluatedItems", "$dynamicRef", "minLength", "maxLength", "multipleOf"),
    ]
)
# Below these, keys are names of the schema's own, or there are values.
_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples")


class Grammar:
    """Where an answer is in its grammar; the engine's thread asks and tells.

    Parameters
    ----------
    matcher : xgrammar.GrammarMatcher
    mask : int32 [1, words]
    """

    def __init__(self, matcher: Any, mask: Tensor) -> None:
        self._matcher = matcher
        self._mask = mask

    def allowed(self) -> Tensor:
        """Return which ids may come next, int32 [words], a bit each."""
        self._matcher.fill_next_token_bitmask(self._mask)
        return self._mask[0]

    def advance(self, token: int) -> None:
        """Take it that a token has come."""
        self._matcher.accept_token(token)


class Grammars:
    """Compiles grammars for a tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    vocabulary : ids of the model, of which the tokenizer may have fewer
    stop_tokens : that may come where the answer is complete
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stop_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._stop_tokens = [*stop_tokens]
        self._compiler: Any = None

    def of(self, wanted: JsonFormat | SchemaFormat) -> Callable[[], Grammar]:
        """Return what makes a grammar for each choice.

        Raises
        ------
        SqCpuError
            Where xgrammar is not installed, for a model without a stop token, a tokenizer that it
            cannot read and a schema that it cannot compile.
        """
        require("xgrammar", "grammar")
        import xgrammar

        if not self._stop_tokens:
            raise SqCpuError("response_format: the model has no stop token; leave it out")
        try:
            if self._compiler is None:
                info = xgrammar.TokenizerInfo.from_huggingface(
                    self._tokenizer,
                    vocab_size=self._vocabulary,
                    stop_token_ids=self._stop_tokens,
                )
                self._compiler = xgrammar.GrammarCompiler(
                    info, max_threads=1, cache_limit_bytes=_CACHE
                )
            if isinstance(wanted, JsonFormat):
                compiled = self._compiler.compile_builtin_json_grammar()
            else:
                _check(wanted.json_schema.given)
                schema = json.dumps(wanted.json_schema.given)
                if len(schema) > _MOST_CHARACTERS:
                    raise SqCpuError(f"response_format: more than {_MOST_CHARACTERS} characters")
                compiled = self._compiler.compile_json_schema(schema)
        except SqCpuError:
            raise
        except Exception as error:  # a schema's faults come as errors of several kinds
            # xgrammar's begins with the time and a line of its source.
            reason = re.sub(r"^\[[\d:]+\] \S+ ", "", first_line(error))
            raise SqCpuError(f"response_format: {reason}; simplify the schema") from error

        def make() -> Grammar:
            mask = xgrammar.allocate_token_bitmask(1, self._vocabulary)
            return Grammar(xgrammar.GrammarMatcher(compiled), mask)

        return make


def _check(schema: object) -> None:
    """Raise `SqCpuError` for what an answer would not be held to."""
    if isinstance(schema, list):
        for each in schema:
            _check(each)
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        several = keyword == "allOf" and isinstance(value, list) and len(value) > 1
        if several or (keyword in _IGNORED and value is not False):
            raise SqCpuError(f"response_format: {keyword} is not supported; leave it out")
        if keyword in _NAMES and isinstance(value, Mapping):
            _check([*value.values()])
        elif keyword not in _VALUES:
            _check(value)
