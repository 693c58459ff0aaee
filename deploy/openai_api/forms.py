"""The grammar that an answer's text must follow, from what the request says about its form."""

from __future__ import annotations

from deploy.openai_api.errors import ApiError
from deploy.openai_api.requests import ChatCompletionRequest, GenerationFields
from dualpath_ray import grammars
from dualpath_ray.errors import InvalidRequestError
from dualpath_ray.grammars import Grammars
from dualpath_ray.serving.tool_calls import call_grammar


def grammar_of(fields: GenerationFields) -> str:
    """Empty for free text. Raises ApiError for combinations that cannot be, and for a form that is none (422)."""
    try:
        grammar = _grammar(fields)
    except InvalidRequestError as error:
        raise _unusable(error, fields) from error
    if grammar and (fields.min_tokens or fields.ignore_eos):
        raise ApiError(
            400,
            "a text with a form ends where its form ends: min_tokens and ignore_eos are not possible with it",
            param="min_tokens" if fields.min_tokens else "ignore_eos",
            code="invalid_value",
        )
    return grammar


def check(grammars: Grammars, grammar: str, fields: GenerationFields) -> None:
    """Raise ApiError (422) unless the `grammar` of `fields` can be compiled. It may take up to a second."""
    try:
        grammars.check(grammar)
    except InvalidRequestError as error:
        raise _unusable(error, fields) from error


def _unusable(error: InvalidRequestError, fields: GenerationFields) -> ApiError:
    """The answer names the field that asked for the form."""
    param = "tools"
    if fields.structured_outputs is not None:
        param = "structured_outputs"
    elif fields.response_format is not None and fields.response_format.type != "text":
        param = "response_format"
    return ApiError(422, str(error), param=param, code="invalid_schema")


def _grammar(fields: GenerationFields) -> str:
    if isinstance(fields, ChatCompletionRequest) and (functions := fields.required_functions()):
        return call_grammar(functions, several=fields.parallel_tool_calls is not False)
    structured, response = fields.structured_outputs, fields.response_format
    if structured is not None:
        if structured.json_ is not None:
            return grammars.of_json_schema(structured.json_)
        if structured.regex is not None:
            return grammars.of_regex(structured.regex)
        if structured.choice is not None:
            return grammars.of_choices(structured.choice)
        return grammars.of_lark(structured.grammar or "")
    if response is not None and response.type == "json_object":
        return grammars.of_json_schema({"type": "object"})
    if response is not None and response.json_schema is not None:
        return grammars.of_json_schema(response.json_schema.schema_)
    return ""
