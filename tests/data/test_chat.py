"""What of a conversation is learnt: what the assistant says, with every kind of chat template."""

from __future__ import annotations

from itertools import compress
from typing import Any

import pytest
from transformers import PreTrainedTokenizer
from trl.chat_template_utils import gemma_chat_template, llama3_chat_template, qwen3_chat_template

from agsel.data.chat import ChatEncoder, marking_template
from agsel.errors import UserError
from tests.data.tokenizers import CHATML, MARKED, of_bytes, of_words, with_added

Messages = list[dict[str, Any]]
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "ChatML": lambda: of_bytes(CHATML, *CHATML_TOKENS),
    "Llama 3": lambda: of_bytes(
        llama3_chat_template,
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        bos_token="<|begin_of_text|>",
    ),
    "Gemma": lambda: of_bytes(
        gemma_chat_template, "<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", bos_token="<bos>"
    ),
    "Mistral": lambda: of_bytes(MISTRAL, "<s>", "[INST]", "[/INST]", "</s>", bos_token="<s>"),
    "Qwen 3": lambda: of_bytes(qwen3_chat_template, *CHATML_TOKENS),
}


def turns(*said: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in said]


TWO_TURNS = turns(("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6 ü 😀"))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn", "days": [1, {"a": None}]}}}
CALLED: Messages = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "12"},
    {"role": "assistant", "content": "12 degrees"},
]
HERMES = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content }}{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>"
    "{% endfor %}",
)


def learnt(tokenizer: Any, messages: Messages, first: int = 0, *, assistant_only: bool = True) -> str:
    """The learnt tokens as text; the whole is the conversation as the template renders it, with every token once."""
    encoder = ChatEncoder(tokenizer, assistant_only=assistant_only)
    tokens = encoder.encode(messages, None, first, 7)
    template = marking_template(tokenizer) if assistant_only else None
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    assert tokens.ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert len(tokens.learnt) == len(tokens.ids)
    return tokenizer.decode(list(compress(tokens.ids, tokens.learnt)))


def refuse(tokenizer: Any, messages: Messages, words: str, *, first: int = 0, assistant_only: bool = True) -> None:
    with pytest.raises(UserError) as refusal:
        ChatEncoder(tokenizer, assistant_only=assistant_only).encode(messages, None, first, 7)
    assert words in str(refusal.value)
    assert "row 7 of the dataset" in str(refusal.value)
    assert "--chat_template_path" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("ChatML", "4<|im_end|>6 ü 😀<|im_end|>"),
        ("Llama 3", "4<|eot_id|>6 ü 😀<|eot_id|>"),
        ("Gemma", "4<end_of_turn>\n6 ü 😀<end_of_turn>\n"),
        ("Mistral", " 4</s> 6 ü 😀</s>"),
        ("Qwen 3", "<think>\n\n</think>\n\n4<|im_end|>\n<think>\n\n</think>\n\n6 ü 😀<|im_end|>\n"),
    ],
)
def test_every_turn_of_the_assistant_is_learnt_and_nothing_else(family: str, expected: str) -> None:
    tokenizer = FAMILIES[family]()
    assert learnt(tokenizer, TWO_TURNS) == expected
    last = expected[expected.index("6") :] if family != "Qwen 3" else expected[expected.rindex("<think>") :]
    assert learnt(tokenizer, TWO_TURNS, 3) == (f" {last}" if family == "Mistral" else last)


def test_the_assistant_learns_to_think_in_every_turn() -> None:
    tokenizer = FAMILIES["Qwen 3"]()
    thought: Messages = [
        *turns(("user", "2+2?")),
        {"role": "assistant", "content": "4", "reasoning_content": "easy"},
        *turns(("user", "And 3+3?"), ("assistant", "<think>\nhm\n</think>\n\n6")),
    ]
    expected = "<think>\neasy\n</think>\n\n4<|im_end|>\n<think>\nhm\n</think>\n\n6<|im_end|>\n"
    assert learnt(tokenizer, thought) == expected


def test_tool_calls_are_learnt_and_answers_of_tools_are_not() -> None:
    call = '<call>{"name": "weather", "arguments": {"city": "Bonn", "days": [1, {"a": null}]}}</call><|im_end|>'
    assert learnt(of_bytes(HERMES, *CHATML_TOKENS), CALLED) == f"{call}12 degrees<|im_end|>"
    written = learnt(FAMILIES["Qwen 3"](), CALLED)
    assert written.count('{"name": "weather", "arguments": {"city": "Bonn", "days": [1, {"a": null}]}}') == 1
    assert "tool_response" not in written


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (turns(("assistant", "Hi"), ("user", "a"), ("assistant", "b")), "Hi<|im_end|>b<|im_end|>"),
        (turns(("system", ""), ("user", "a"), ("assistant", "b")), "b<|im_end|>"),
        (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), "b<|im_end|>c<|im_end|>"),
        (turns(("user", "a"), ("assistant", "b"), ("user", "c")), "b<|im_end|>"),
        (turns(("user", "a"), ("assistant", "b\n\nassistant\n c ")), "b\n\nassistant\n c <|im_end|>"),
        (turns(("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")), "<|im_end|>d<|im_end|>"),
    ],
)
def test_conversations_of_other_shapes(template: str, messages: Messages, expected: str) -> None:
    assert learnt(of_bytes(template, *CHATML_TOKENS), messages) == expected


def test_a_conversation_may_begin_with_the_assistant_behind_words_of_the_template() -> None:
    greeting = "<|im_start|>system\nYou help.<|im_end|>\n" + CHATML
    assert learnt(of_bytes(greeting, *CHATML_TOKENS), turns(("assistant", "Hi"))) == "Hi<|im_end|>"


def test_a_template_may_be_one_of_several() -> None:
    several = {"default": MARKED.replace("im_start", "im_end"), "tool_use": CHATML}
    tokenizer = of_bytes(MARKED, *CHATML_TOKENS)
    tokenizer.chat_template = several
    assert marking_template(tokenizer) == several["default"]
    assert learnt(tokenizer, TWO_TURNS) == "4<|im_end|>6 ü 😀<|im_end|>"
    tokenizer.chat_template = {"tool_use": CHATML}
    assert marking_template(tokenizer) is None
    refuse(tokenizer, TWO_TURNS, "fails on row 7 of the dataset, ValueError: ")


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_a_token_that_begins_in_the_prompt_and_ends_in_the_answer_is_learnt(template: str) -> None:
    """The model would have to write it from its middle on."""
    spaced = template.replace("<|im_start|>{{ message.role }}\n", "{{ message.role }}: ")
    spaced = spaced.replace("<|im_start|>assistant{{ '\\n' }}", "assistant: ")
    tokenizer = of_bytes(spaced, *CHATML_TOKENS, merges=(" hello",))
    assert learnt(tokenizer, turns(("user", "hello"), ("assistant", "hello"))) == " hello<|im_end|>"


def test_spaces_without_a_token_are_in_nobodys_way() -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}B {% generation %} "
        "{{ message.content }} </s> {% endgeneration %} {% else %}A {{ message.content }} {% endif %}{% endfor %}"
    )
    tokenizer = of_words(template, "A", "B", "one", "two", "three")
    messages = turns(("user", "one two"), ("assistant", "two"), ("user", "one"), ("assistant", "three one"))
    assert learnt(tokenizer, messages) == "two </s> three one </s>"


def test_a_tokenizer_that_begins_texts_begins_a_conversation_once() -> None:
    tokenizer = with_added(FAMILIES["Mistral"](), "<s>")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert learnt(tokenizer, TWO_TURNS) == " 4</s> 6 ü 😀</s>"


class Letters(PreTrainedTokenizer):
    """A tokenizer of the slow kind, which does not know where its tokens stand."""

    _ids = {chr(number): number for number in range(1000)}  # noqa: RUF012

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_the_marks_of_a_slow_tokenizers_template_are_not_needed() -> None:
    tokenizer = Letters(eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"], chat_template=MARKED)
    assert not tokenizer.is_fast
    tokens = ChatEncoder(tokenizer, assistant_only=True).encode(TWO_TURNS[:2], None, 0, 7)
    words = [tokenizer.convert_ids_to_tokens(number) for number in compress(tokens.ids, tokens.learnt)]
    assert words == ["4", "<|im_end|>"]


def test_all_tokens_are_learnt_if_wanted_or_all_of_the_completion() -> None:
    tokenizer = FAMILIES["ChatML"]()
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert learnt(tokenizer, TWO_TURNS, assistant_only=False) == whole
    rest = "4<|im_end|>\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n6 ü 😀<|im_end|>\n"
    assert learnt(tokenizer, TWO_TURNS, 1, assistant_only=False) == rest


NUMBERED = "{{ messages | length }}" + CHATML
LAST_ONLY = CHATML.replace("{{ message.content }}", "{% if loop.last or loop.first %}{{ message.content }}{% endif %}")
UNMARKED = MARKED.replace("{% endgeneration %}", "").replace("{% generation %}", "{% generation %}{% endgeneration %}")


@pytest.mark.parametrize(("template", "message"), [(NUMBERED, 1), (LAST_ONLY, 1)], ids=["numbered", "last turn only"])
def test_a_template_that_renders_earlier_turns_otherwise_is_refused(template: str, message: int) -> None:
    words = f"the chat template does not tell what the assistant says in message {message}"
    refuse(of_bytes(template, *CHATML_TOKENS), TWO_TURNS, words)


def test_a_completion_whose_beginning_the_template_does_not_tell_is_refused() -> None:
    words = "the chat template does not tell what the assistant says in message 1"
    for assistant_only in (True, False):
        refuse(of_bytes(NUMBERED, *CHATML_TOKENS), TWO_TURNS, words, first=1, assistant_only=assistant_only)


def test_a_first_answer_without_a_prompt_is_refused() -> None:
    """What the template writes before it would be learnt, too."""
    template = CHATML.replace("add_generation_prompt", "add_generation_prompt and messages[-1].role != 'assistant'")
    tokenizer = of_bytes(template, *CHATML_TOKENS)
    refuse(tokenizer, turns(("assistant", "Hi")), "does not tell what the assistant says in message 0")
    assert learnt(tokenizer, TWO_TURNS) == "4<|im_end|>6 ü 😀<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (CHATML, CALLED, "has tool calls, which the chat template of "),
        (
            CHATML.replace("message.content", "message.text"),
            TWO_TURNS,
            "has words of the assistant, which the chat temp",
        ),
        (
            UNMARKED,
            TWO_TURNS,
            "has nothing to",
        ),
        (CHATML, turns(("user", "a"), ("assistant", "b"))[:1], "has nothing to learn"),
    ],
    ids=["calls", "words", "marks", "nobody"],
)
@pytest.mark.parametrize("assistant_only", [True, False])
def test_what_a_template_does_not_render_or_mark_is_refused(
    template: str, messages: Messages, words: str, assistant_only: bool
) -> None:
    tokenizer = of_bytes(template, *CHATML_TOKENS, name_or_path="some/model")
    if not assistant_only and words.startswith("has nothing"):
        assert learnt(tokenizer, messages, assistant_only=False)
    else:
        refuse(tokenizer, messages, words, assistant_only=assistant_only)


def test_a_row_that_the_template_does_not_take_is_refused() -> None:
    messages = turns(("user", "a"), ("user", "b"), ("assistant", "c"))
    refuse(FAMILIES["Gemma"](), messages, "fails on row 7 of the dataset, TemplateError: Conversation roles must alter")


def test_conversations_need_a_template() -> None:
    with pytest.raises(UserError, match=r"of some/model has no chat template: name one \(--chat_template_path\)"):
        ChatEncoder(of_bytes(None, *CHATML_TOKENS, name_or_path="some/model"), assistant_only=True)
