"""Conversations as ids for vLLM: by this package's processor, not by tokenizing what a template wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.renderers.hf import HfRenderer

from deepseek_vl2.models.messages import CHAT_TEMPLATE

from .inputs import load_processor, prompt_ids

ROLES = {"developer": "system"}
OWN_OPTIONS = ("add_generation_prompt", "continue_final_message")


class DeepseekVL2Renderer(HfRenderer):
    """Renders the released prompt format, system messages, roles and answers encoded on their own.

    A chat template that the caller gives is used instead, as vLLM would.
    """

    def render_messages(self, messages: Any, params: Any) -> tuple[Any, Any]:
        """Return the parsed conversation and its prompt; see vLLM."""
        if params.chat_template is not None:
            return super().render_messages(messages, params)
        return self._with_ids(super().render_messages(messages, _by_parts(params)), params)

    async def render_messages_async(self, messages: Any, params: Any) -> tuple[Any, Any]:
        """Return the parsed conversation and its prompt; see vLLM."""
        if params.chat_template is not None:
            return await super().render_messages_async(messages, params)
        return self._with_ids(await super().render_messages_async(messages, _by_parts(params)), params)

    def _with_ids(self, rendered: tuple[Any, Any], params: Any) -> tuple[Any, Any]:
        conversation, prompt = rendered
        options = {
            name: params.chat_template_kwargs[name] for name in OWN_OPTIONS if name in params.chat_template_kwargs
        }
        processor = load_processor(self.model_config.model, self.model_config.revision)
        prompt["prompt_token_ids"] = prompt_ids(processor, _messages(conversation), **options)
        return conversation, prompt


def _by_parts(params: Any) -> Any:
    """Have vLLM parse contents into parts and write this package's template, whatever template the files carry."""
    return replace(
        params,
        chat_template=CHAT_TEMPLATE,
        chat_template_content_format="openai",
        chat_template_kwargs={**params.chat_template_kwargs, "tokenize": False},
    )


def _messages(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"role": ROLES.get(message["role"], message["role"]), "content": message.get("content") or ""}
        for message in conversation
    ]
