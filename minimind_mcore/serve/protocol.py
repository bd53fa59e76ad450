"""The bodies of requests: OpenAI's fields and vLLM's, and which of them are implemented.

A field that is not implemented is an error unless it holds the API's default. Fields that neither API knows are
ignored, and named once in the log.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from minimind_mcore.errors import UserError, shown

logger = logging.getLogger(__name__)
_ignored: set[str] = set()


class RequestError(UserError):
    """A request that cannot be answered.

    Args:
        message: what is wrong, and what to do.
        param: the field.
        status: of HTTP.
        code: of OpenAI's error object.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], content: object) -> Model:
    """Return a body as an instance of its class.

    Raises:
        RequestError: a field is missing, unknown, or has a wrong value. The first such field is named.
    """
    if not isinstance(content, dict):
        raise RequestError(f"the body is {shown(content)}; expected a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        # Parts such as "function-after[...]" are pydantic's own, not names of fields.
        path = [str(part)[:60] for part in first["loc"] if not str(part).startswith(("function-", "constrained-"))]
        message = f"{'.'.join(path)}: {first['msg']}; found {shown(first.get('input'))}"
        raise RequestError(message[:500], param=path[0] if path else None) from problem


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1, le=2**31)]
Natural = Annotated[StrictInt, Field(ge=0, le=2**31)]
Token = Annotated[StrictInt, Field(ge=0, le=2**31)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Share = Annotated[Number, Field(gt=0, le=1)]


class Lenient(BaseModel):
    """A part of a body, whose other fields are kept."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Lenient):
    """OpenAI's `stream_options`."""

    include_usage: StrictBool | None = False


class RequestBody(BaseModel):
    """A body of which every field is looked at."""

    model_config = ConfigDict(extra="allow")
    # Fields of OpenAI and vLLM that are not implemented, and the values that ask for nothing.
    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {}

    def check(self) -> None:
        """Look at the fields that this class does not have.

        Raises:
            RequestError: one is known to OpenAI or vLLM, not implemented here, and not at its default.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in self.unsupported:
                _report_ignored(name)
            elif not any((value == default and type(value) is not bool) or value is default
                         for default in self.unsupported[name]):  # fmt: skip
                raise RequestError(f"{name} is not implemented by this server; leave it out", name)


def _report_ignored(name: str) -> None:
    """Name a field without effect in the log, the first time that a request has it."""
    if name not in _ignored and len(_ignored) < 1000:
        _ignored.add(name)
        logger.warning("a request has the field %.40r, which has no effect", name)


class Body(RequestBody):
    """What completions and chats have in common."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {
        "prompt_cache_key": (None,), "prompt_cache_options": (None,), "prompt_cache_retention": (None,),
        "safety_identifier": (None,),
        "use_beam_search": (None, False), "length_penalty": (None, 1), "spaces_between_special_tokens": (None, True),
        "truncate_prompt_tokens": (None,), "truncation_side": (None,), "prompt_logprobs": (None,),
        "allowed_token_ids": (None, []), "bad_words": (None, []), "echo": (None, False),
        "structured_outputs": (None,), "guided_json": (None,), "guided_regex": (None,), "guided_choice": (None,),
        "guided_grammar": (None,), "guided_decoding_backend": (None,), "guided_whitespace_pattern": (None,),
        "structural_tag": (None,), "priority": (None, 0), "logits_processors": (None, []),
        "return_tokens_as_token_ids": (None, False), "cache_salt": (None,), "kv_transfer_params": (None,),
        "ec_transfer_params": (None,), "vllm_xargs": (None, {}), "max_repetition_pattern_size": (None, 0),
        "min_repetition_pattern_size": (None, 0), "repetition_min_count": (None, 0), "repetition_detection": (None,),
        "thinking_token_budget": (None,), "data_parallel_rank": (None,), "watermarking": (None,),
        "logprob_token_ids": (None, []), "session_id": (None,), "routed_experts_prompt_start": (None, 0),
        "return_token_offsets": (None, False), "mm_payload": (None, "tensors"), "return_mm_kwargs": (None,),
        "stream_interval": (None,),
    }  # fmt: skip

    model: StrictStr | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[StrictStr, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = (
        None
    )
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    include_stop_str_in_output: StrictBool | None = False
    ignore_eos: StrictBool | None = False
    min_tokens: Natural | None = 0
    skip_special_tokens: StrictBool | None = True
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = 1
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    request_id: Annotated[StrictStr, Field(pattern=r"^[\w.:-]{1,128}$")] | None = None
    return_token_ids: StrictBool | None = False
    response_format: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Look also at the fields that exclude each other; see `RequestBody.check`."""
        super().check()
        if self.stream_options is not None:
            if not self.stream:
                raise RequestError("stream_options is for streams; set stream to true", "stream_options")
            for name, value in (self.stream_options.model_extra or {}).items():
                if value not in (None, False) and name in ("continuous_usage_stats", "include_obfuscation"):
                    raise RequestError(f"stream_options.{name} is not implemented; leave it out", "stream_options")
        if any(not stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or [])):
            raise RequestError("a stop string is empty; expected at least one character", "stop")


class TextPart(Lenient):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: StrictStr


class FunctionCall(Lenient):
    """The function of a call in an assistant's message."""

    name: StrictStr
    arguments: StrictStr | dict[str, Any]


class ToolCall(Lenient):
    """A call in an assistant's message."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Lenient):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None


class Function(Lenient):
    """The definition of a function."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Lenient):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    """The name in a `tool_choice`."""

    name: StrictStr


class NamedTool(Lenient):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


class ChatTemplateFields(RequestBody):
    """What a chat template is given."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    open_thinking: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    def check(self) -> None:
        """Look also at the fields of messages and tools; see `RequestBody.check`."""
        super().check()
        functions = [tool.function for tool in self.tools or []]
        for kind, parts in (("messages", self.messages), ("tools", self.tools or []), ("function", functions)):
            for name in {name for part in parts for name in part.model_extra or {}}:
                _report_ignored(f"{kind}[].{name}")


class ChatBody(Body, ChatTemplateFields):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = Body.unsupported | {
        "audio": (None,), "function_call": (None,), "functions": (None, []), "metadata": (None, {}),
        "modalities": (None, ["text"]), "moderation": (None,), "prediction": (None,),
        "service_tier": (None, "auto", "default"), "store": (None, False), "verbosity": (None, "medium"),
        "web_search_options": (None,), "add_generation_prompt": (None, True),
        "continue_final_message": (None, False), "add_special_tokens": (None, False), "documents": (None, []),
        "chat_template": (None,), "media_io_kwargs": (None, {}), "mm_processor_kwargs": (None, {}),
        "include_reasoning": (None, True), "return_prompt_text": (None, False),
    }  # fmt: skip

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = True

    def check(self) -> None:
        """Check the fields of this endpoint, as `Body.check` checks those of both."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        choice, names = self.tool_choice, {tool.function.name for tool in self.tools or []}
        if choice in ("auto", "required") and not self.tools:
            raise RequestError(f"tool_choice is {choice!r}, but tools is empty", "tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise RequestError(
                f"tool_choice names the function {choice.function.name!r}, which is not in tools", "tool_choice"
            )
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(Body):
    """`POST /v1/completions`."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = Body.unsupported | {
        "best_of": (None, 1), "suffix": (None, ""), "add_special_tokens": (None, True), "prompt_embeds": (None,),
    }  # fmt: skip

    prompt: StrictStr | list[Token] | list[StrictStr] | list[list[Token]]
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = 16
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or ids.

        Raises:
            RequestError: there is none, or an empty one.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        found: list[str | list[int]] = []
        if prompt and isinstance(prompt[0], int):
            found = [[token for token in prompt if isinstance(token, int)]]
        else:
            found = [part for part in prompt if not isinstance(part, int)]
        if not found or any(isinstance(part, list) and not part for part in found):
            raise RequestError("prompt is empty; expected a text or token ids", "prompt")
        if len(found) > 256:
            raise RequestError(f"prompt has {len(found)} prompts; expected 256 at most", "prompt")
        return found


class TokenizeBody(RequestBody):
    """`POST /tokenize` of a text."""

    model: StrictStr | None = None
    prompt: StrictStr
    add_special_tokens: StrictBool | None = True
    return_token_strs: StrictBool | None = False


class TokenizeChatBody(ChatTemplateFields):
    """`POST /tokenize` of a chat."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {
        "continue_final_message": (None, False), "add_special_tokens": (None, False), "chat_template": (None,),
        "media_io_kwargs": (None, {}), "mm_processor_kwargs": (None, {}),
    }  # fmt: skip
    model: StrictStr | None = None
    add_generation_prompt: StrictBool | None = True
    return_token_strs: StrictBool | None = False


class DetokenizeBody(RequestBody):
    """`POST /detokenize`."""

    model: StrictStr | None = None
    tokens: list[Token]


class ToolCallBody(RequestBody):
    """`POST /tools/call`."""

    name: StrictStr
    arguments: dict[str, Any] = Field(default_factory=dict)
