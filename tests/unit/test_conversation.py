"""Prompt templates: what each one writes."""

from __future__ import annotations

import pytest

from deepseek_vl2.models.conversation import (
    Conversation,
    SeparatorStyle,
    conv_templates,
    get_conv_template,
    register_conv_template,
)

EOS = "<｜end▁of▁sentence｜>"


def prompt(name: str, *messages: tuple[str, str | None], system: str = "") -> str:
    conv = get_conv_template(name)
    conv.set_system_message(system)
    for role, text in messages:
        conv.append_message(role, text)
    return conv.get_prompt()


def test_deepseek_tags_turns_and_ends_answers() -> None:
    turns = [("<|User|>", "hi"), ("<|Assistant|>", "hello"), ("<|User|>", "more"), ("<|Assistant|>", "")]
    want = f"<|User|>: hi\n\n<|Assistant|>: hello{EOS}<|User|>: more\n\n<|Assistant|>:"
    assert prompt("deepseek", *turns) == want


def test_deepseek_puts_the_system_message_first() -> None:
    assert prompt("deepseek", ("<|User|>", "hi"), system="Be brief.") == "Be brief.\n\n<|User|>: hi\n\n"


def test_deepseekv2_wraps_the_users_turns() -> None:
    turns = [("User", "hi"), ("|<Assistant>|", "hello"), ("|<Assistant>|", "")]
    assert prompt("deepseekv2", *turns) == f"<｜sft▁begin｜>\nhi\n<｜sft▁end｜>hello{EOS}"


def test_plain_writes_the_texts_alone() -> None:
    assert prompt("plain", ("", "<image>\nwords"), ("", "answer")) == "<image>\nwordsanswer"
    assert prompt("plain", ("", "words"), ("", "")) == "words"


def test_alignment_shows_the_image_alone_to_the_user() -> None:
    assert prompt("alignment", ("", "whatever"), ("", "a caption")) == "<image>\na caption"


@pytest.mark.parametrize("name", ["deepseek", "deepseekv2", "plain", "alignment"])
def test_each_template_is_a_fresh_copy(name: str) -> None:
    first = get_conv_template(name)
    first.append_message("someone", "words")
    first.set_system_message("other")
    second = get_conv_template(name)
    assert second.messages == [] and second.system_message == conv_templates[name].system_message == ""
    assert second.name == name


def test_an_unknown_template_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'chatty'.*deepseek"):
        get_conv_template("chatty")


def test_a_template_is_registered_once_unless_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_vl2.models.conversation.conv_templates", {})
    register_conv_template(Conversation(name="mine"))
    with pytest.raises(ValueError, match="'mine'"):
        register_conv_template(Conversation(name="mine"))
    register_conv_template(Conversation(name="mine", sep="!"), override=True)
    assert get_conv_template("mine").sep == "!"


def test_turns_as_other_programs_want_them() -> None:
    conv = get_conv_template("deepseek")
    conv.append_message(conv.roles[0], "hi")
    conv.append_message(conv.roles[1], None)
    assert conv.to_gradio_chatbot() == [["hi", None]]
    assert conv.to_openai_api_messages()[1:] == [{"role": "user", "content": "hi"}]
    conv.update_last_message("hello")
    assert conv.to_gradio_chatbot() == [["hi", "hello"]]
    assert conv.to_openai_api_messages()[-1] == {"role": "assistant", "content": "hello"}
    assert conv.dict()["messages"] == [["<|User|>", "hi"], ["<|Assistant|>", "hello"]]
    conv.reset_message()
    assert conv.messages == []


def test_the_separator_styles_keep_their_names() -> None:
    assert {style.name for style in SeparatorStyle} >= {"DeepSeek", "DeepSeekV2", "PLAIN", "ALIGNMENT"}
