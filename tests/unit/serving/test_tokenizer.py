from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dualpath_ray.errors import ConfigError, InvalidRequestError
from dualpath_ray.serving.chat_template import ChatTemplate
from dualpath_ray.serving.tokenizer import INLINE_CHARACTERS, Tokenizer

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be <brief> & 'kind'."}, {"role": "user", "content": "ü€🙂\n\n  two  "}],
    [
        {"role": "user", "content": "List the files."},
        {"role": "assistant", "content": "ls"},
        {"role": "tool", "content": '{"files": ["a.py"]}', "tool_call_id": "1"},
        {"role": "user", "content": "x = '<|im_end|>'" + "def f(): pass\n" * 900},
    ],
]


@pytest.mark.parametrize("model", ["tiny_directory", "smollm2_directory"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "unicode", "tool"])
async def test_prompts_equal_those_of_transformers(model: str, messages: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(model)
    reference = AutoTokenizer.from_pretrained(directory)
    tokenizer = Tokenizer.from_directory(directory)
    expected: Any = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(await tokenizer.encode_chat(messages)) == list(expected)
    text = messages[-1]["content"]
    assert list(await tokenizer.encode_text(text)) == reference(text)["input_ids"]
    assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=True)
    assert tokenizer.vocabulary == len(reference)


def test_the_long_conversation_is_encoded_in_a_thread() -> None:
    assert len(CONVERSATIONS[-1][-1]["content"]) > INLINE_CHARACTERS


async def test_a_model_without_template_says_what_to_use(byte_fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        await byte_fallback.encode_chat(CONVERSATIONS[0])


def test_a_directory_without_tokenizer_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_template_features_that_models_use() -> None:
    template = ChatTemplate(
        "{% generation %}{{ bos_token }}{% endgeneration %}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%%') }}",
        {"bos_token": "<s>"},
    )
    assert template.render([{"role": "skip"}, {"role": "<ü>"}]) == '<s>{"role": "<ü>"}%'


def test_blocks_leave_no_blank_lines() -> None:
    assert ChatTemplate("a\n  {% if true %}\nb\n  {% endif %}\nc").render([]) == "a\nb\nc"


def test_a_template_can_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        template.render([])


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os.system('true') }}"],
)
def test_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(attack).render([{"role": "user", "content": "x"}])


def test_broken_template_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize("where", ["string", "named", "jinja"])
def test_template_is_found_in_every_layout(where: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "chat_template": "old"}
    if where == "string":
        config["chat_template"] = "{{ bos_token }}{{ eos_token }}{{ pad_token }}"
    elif where == "named":
        config["chat_template"] = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ eos_token }}"}]
    else:
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    assert template.render([]) == "<s></s>"
