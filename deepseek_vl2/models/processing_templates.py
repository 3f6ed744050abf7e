"""The processor's chat template: messages as a prompt, or as tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from .answer_masks import answer_mask, render_with_answers
from .batch import VLChatProcessorOutput
from .call_inputs import ImageOptions, as_list
from .call_options import BatchOptions, check_keywords, take_groups
from .messages import Message, is_low_conversation, is_own_template, messages_to_conversation
from .processing_base import BaseProcessor
from .prompt_encoding import TokenSequence
from .turns import print_turns, render_turns

# What transformers' callers pass to every processor, and what asks nothing of this one: the template writes bos itself.
WITHOUT_EFFECT = ("load_audio_from_video", "add_special_tokens")


@contextlib.contextmanager
def told_by_template() -> Iterator[None]:
    """Say what fails in a chat template of somebody's own as a ``ValueError``."""
    try:
        yield
    except (TemplateError, ArithmeticError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"The chat template refuses the conversation: {error}") from error


class ChatTemplateProcessor(BaseProcessor):
    """`apply_chat_template` of `DeepseekVLV2Processor`."""

    if TYPE_CHECKING:

        def _read_images(self, images: Sequence[Any] | None, options: ImageOptions) -> tuple[list[Any], Any]: ...
        def _finish(self, sample: TokenSequence, sft_format: str) -> VLChatProcessorOutput: ...
        def _hand_over(self, samples: Any, options: BatchOptions, bare: bool = ..., standard: bool = ...) -> Any: ...

    def messages_to_conversation(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Turn messages with OpenAI-style content parts into a conversation with image tags.

        An image part is a dict of type "image" with its source under ``image``, ``path``, ``url`` or ``base64``, or of
        type "image_url" with ``image_url`` (a string or ``{"url": ...}``). With ``detail`` "low", in it or beside it,
        for all of them or for none, each image is one view of 384 pixels, no tiles.

        Raises:
            ValueError: a part of unknown type, or an image part without a source.
        """
        return messages_to_conversation(messages, self.image_token)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages as a prompt, or process them into tensors.

        Args:
            conversation: messages with OpenAI-style or plain content, or a list of such conversations.
            chat_template: another Jinja template.
            add_generation_prompt: end where the model goes on: with the assistant's tag after a user turn, without eos
                after an assistant turn.
            continue_final_message: leave the last turn open, whoever speaks, for the model to go on.
            tokenize: return tensors rather than text.
            return_dict: return all tensors rather than ``input_ids`` alone.
            return_assistant_tokens_mask: return ``assistant_masks`` too, 1 at the tokens of answers and their ends.
            processor_kwargs: ``cropping``, ``candidate_resolutions``, ``max_pixels`` and ``background`` of
                `process_one`, and the fields of `BatchOptions`; they may also be given directly. Other names reach the
                template, where another one is used, and a warning names them where not.

        Returns:
            The text (a list of texts for several conversations), a `StandardBatch`, or ``input_ids`` [B, T].

        Raises:
            ValueError: see `process_one`; the default template accepts the same conversations.
        """
        batch, single = as_list(None, None, conversation)
        check_keywords("processor_kwargs", processor_kwargs)
        kwargs = {**(processor_kwargs or {}), **kwargs}
        options = {**take_groups(kwargs), **kwargs}
        image_options = ImageOptions(**{f.name: options.pop(f.name) for f in fields(ImageOptions) if f.name in options})
        names = [field.name for field in fields(BatchOptions) if field.name in options]
        batching = BatchOptions.of({"return_tensors": return_tensors, **{name: options.pop(name) for name in names}})
        for name in WITHOUT_EFFECT:
            options.pop(name, None)
        template = chat_template or self.chat_template
        custom = not is_own_template(template)
        if not custom:
            _refuse_unknown(options)
        settings = {
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **options,
        }
        if not tokenize:
            texts = [
                self._render(messages, settings)
                if custom
                else self._render_own(messages, add_generation_prompt, continue_final_message)
                for messages in batch
            ]
            return texts[0] if single else texts
        samples = []
        for messages in batch:
            turns = self.messages_to_conversation(messages)
            images = [image for turn in turns for image in turn["images"]]
            is_low = is_low_conversation(turns) and image_options.cropping is None
            seen = replace(image_options, cropping=False) if is_low else image_options
            if custom:
                sample = self._process_custom(messages, images, seen, settings, return_assistant_tokens_mask)
            else:
                sample = self._process_messages(
                    turns,
                    images,
                    add_generation_prompt,
                    continue_final_message,
                    seen,
                    return_assistant_tokens_mask,
                )
            samples.append(sample)
        out = self._hand_over(samples, batching, standard=True)
        return out if return_dict else out["input_ids"]

    def _render_own(
        self, messages: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        flat = self._flatten(messages)
        if not flat:
            raise ValueError("The conversation has no messages.")
        turns = self._walk(flat, add_generation_prompt, continue_final_message)
        unfinished = add_generation_prompt or continue_final_message
        return str(self.tokenizer.bos_token) + render_turns(turns, self.tokenizer.eos_token, unfinished)

    def _render(self, messages: Sequence[Message], settings: dict[str, Any]) -> str:
        with told_by_template():
            return self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **settings)

    def _process_custom(
        self,
        messages: Sequence[Message],
        images: Sequence[Any],
        options: ImageOptions,
        settings: dict[str, Any],
        mark_answers: bool,
    ) -> VLChatProcessorOutput:
        """Process a conversation that another template renders."""
        loaded, encoder = self._read_images(images, options)
        if not mark_answers:
            text = self._render(messages, settings)
            return self._finish(encoder.encode_rendered(text, loaded), text)
        variables = {**self.tokenizer.special_tokens_map, **settings}
        with told_by_template():
            text, answered = render_with_answers(messages, variables.pop("chat_template"), variables)
        sample = encoder.encode_rendered(text, loaded, inference_mode=False)
        out = self._finish(sample, text)
        out["assistant_mask"] = torch.tensor(answer_mask(encoder, text, answered, sample), dtype=torch.long)
        return out

    def _process_messages(
        self,
        conversation: Sequence[Message],
        images: Sequence[Any],
        add_generation_prompt: bool,
        continue_final_message: bool,
        options: ImageOptions,
        mark_answers: bool,
    ) -> VLChatProcessorOutput:
        if not conversation:
            raise ValueError("The conversation has no messages.")
        loaded, encoder = self._read_images(images, options)
        turns = self._walk(conversation, add_generation_prompt, continue_final_message)
        unfinished = add_generation_prompt or continue_final_message
        sample = encoder.encode_turns(turns, loaded, mark_answers or self.mask_prompt)
        if turns[-1].role == "assistant" and (unfinished or not turns[-1].content):
            sample.drop_last(self.eos_id)
        answers = torch.tensor(sample.labels) != self.ignore_id
        if not self.mask_prompt:
            ids = zip(sample.ids, sample.image_mask, strict=True)
            sample.labels = [self.ignore_id if is_image else id_ for id_, is_image in ids]
        out = self._finish(sample, print_turns(turns, self.sft_format, self.tokenizer.eos_token))
        if mark_answers:
            answers[0] = False  # bos has a label, and is no answer's
            out["assistant_mask"] = answers.long()
        return out


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Raise or warn where keywords are meant for a template that has no place for them."""
    if any(options.get(name) for name in ("tools", "documents")):
        raise ValueError("The chat template of DeepSeek-VL2 has no place for tools or documents.")
    unknown = [name for name, value in options.items() if name not in ("tools", "documents") and value is not None]
    if unknown:
        warnings.warn(f"The chat template does not know, and ignores: {', '.join(unknown)}.", stacklevel=3)
