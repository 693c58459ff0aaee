"""The bodies of OpenAI's generation requests, with the extensions that engines and load generators share.

Unknown fields are ignored, as clients send many that do not matter here (`store`, `metadata`, `service_tier`, `user`, ...); those that
would change the answer are refused first (`unsupported.py`). Types are strict: `"5"` is not a number.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.openai_api.messages import ChatMessage

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
INT64 = 2**63
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = STRICT

    include_usage: bool | None = Field(default=None, description="Send one more chunk, without choices, that holds the usage.")


class JsonSchema(BaseModel):
    """A named JSON schema."""

    model_config = STRICT

    name: Name = Field(description="Not used here; OpenAI requires it.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema that the answer's text must match.")
    strict: bool | None = Field(default=None, description="The schema is always kept to.")


class ResponseFormat(BaseModel):
    """What the answer's text must look like."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"] = Field(description="json_object: any JSON object; json_schema: as it says.")
    json_schema: JsonSchema | None = Field(default=None, description="Only and always with type json_schema.")

    @model_validator(mode="after")
    def _schema_fits_type(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to type json_schema and to no other")
        return self


class StructuredOutputs(BaseModel):
    """Extension, as in vLLM: exactly one of these that the answer's text must match."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: dict[str, Any] | None = Field(default=None, alias="json", description="A JSON schema.")
    regex: str | None = Field(default=None, min_length=1, max_length=10_000, description="A regular expression (Rust's syntax).")
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1, max_length=1000, description="Texts.")
    grammar: str | None = Field(default=None, min_length=1, max_length=100_000, description="A Lark grammar, as llguidance reads it.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self


class AgentHints(BaseModel):
    """Extension: what an agent knows about its own work."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    priority: int | None = Field(default=None, ge=-100, le=100, description="Larger goes first; an API key has a highest one.")
    deadline_s: float | None = Field(default=None, gt=0, description="Seconds after which the answer is of no use; then it is given up.")
    next_turn_s: float | None = Field(default=None, ge=0, description="Seconds until the session's next turn; told to traces.")


class GenerationFields(BaseModel):
    """What both kinds of request share. A null is the same as a field left out."""

    model_config = STRICT
    prompt_field: ClassVar[str]

    model: str = Field(description="Name of the served model, as /v1/models lists it.")
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens to generate; the server has a default.")
    n: int | None = Field(default=None, ge=1, description="Number of answers. Equal seeds still give the same answers, each its own.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy. Default: the model's own, otherwise 1.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Draw from the likeliest tokens of this total probability.")
    top_k: int | None = Field(default=None, ge=-1, description="Extension: draw from this many tokens; 0 or -1 for all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Extension: least probability, relative to the likeliest token's.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Per time that a token was generated before.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Once for every token that was generated before.")
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=10, description="Extension: divides the logits of all tokens seen, in the prompt too; 1 changes nothing."
    )
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = Field(
        default=None, max_length=1024, description="Token id, as a string: what to add to its logit; -100 forbids, 100 forces."
    )
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Equal seeds give equal answers. Default: random.")
    stop: StopString | list[StopString] | None = Field(default=None, description="The answer ends before any of these strings.")
    min_tokens: int | None = Field(default=None, ge=0, description="Extension: no end of sequence or stop string before this many tokens.")
    ignore_eos: bool | None = Field(default=None, description="Extension: go on at the end of sequence, up to max_tokens.")
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    timeout: float | None = Field(default=None, gt=0, description="Extension: seconds after which to give up, up to the server's limit.")
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=256, description="Extension: share cached prompts only with requests of the same salt."
    )
    response_format: ResponseFormat | None = Field(default=None, description="What the answer's text must look like.")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="Extension: other forms that the text must match.")
    agent_hints: AgentHints | None = Field(default=None, description="Extension: priority, deadline and next turn.")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.structured_outputs is not None and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("give response_format or structured_outputs, not both")
        return self

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def alternatives(self) -> int | None:
        """How many likeliest tokens to tell with each token's log probability; None: no log probabilities."""
        raise NotImplementedError


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments.")


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    model_config = STRICT

    name: str


class NamedTool(BaseModel):
    """Call this function."""

    model_config = STRICT

    type: Literal["function"]
    function: FunctionName


class ChatCompletionRequest(GenerationFields):
    """Body of /v1/chat/completions."""

    prompt_field = "messages"

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="New name of max_tokens; wins if both are given.")
    logprobs: bool | None = Field(default=None, description="Tell each token's log probability.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="And those of this many likeliest tokens.")
    tools: list[Tool] | None = Field(default=None, max_length=128, description="Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="none: no calls; auto: the model decides; required or a function: the text is made to be a call."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: not more than one call, where a call is required.")

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only possible with logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names the function {self.tool_choice.function.name[:64]!r}, which is not among the tools")
        formed = self.structured_outputs is not None or (self.response_format is not None and self.response_format.type != "text")
        if formed and self.offered_tools():
            raise ValueError("a form of the text (response_format, structured_outputs) and tools cannot be combined")
        return self

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as the chat template sees them."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    def required_functions(self) -> list[dict[str, Any]]:
        """The functions of which one must be called; none if the model decides."""
        functions = [tool["function"] for tool in self.offered_tools()]
        if isinstance(self.tool_choice, NamedTool):
            return [function for function in functions if function["name"] == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []


class CompletionRequest(GenerationFields):
    """Body of /v1/completions."""

    prompt_field = "prompt"

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] = Field(description="One or several texts, or their token ids.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Tell log probabilities, also of this many likeliest tokens.")

    def alternatives(self) -> int | None:
        return self.logprobs


class TokenizeRequest(BaseModel):
    """Body of /tokenize: a prompt, or messages as the chat template writes them."""

    model_config = STRICT

    model: str | None = Field(default=None, description="Name of the served model.")
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = Field(default=True, description="Of a prompt: with the tokens that the model expects around a text.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """Body of /detokenize."""

    model_config = STRICT

    model: str | None = Field(default=None, description="Name of the served model.")
    tokens: list[TokenId]
