"""What a processor is built of and saved as: its tokenizer and its settings."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from .bundled import locate_bundled
from .checkpoint_check import HOLDS, check_config, check_tokenizer
from .config_fields import (
    ANY_WHOLE,
    MERGED,
    PIXELS,
    FieldError,
    check_channels,
    check_fields,
    check_sizes,
    check_switches,
    check_texts,
)
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config
from .conversation import Conversation, get_conv_template
from .image_modes import WHITE, Background, check_background
from .image_processing import ImageTransform
from .messages import (
    CHAT_TEMPLATE,
    CHAT_TOKENS,
    GROUNDING_TOKENS,
    Message,
    is_own_template,
    messages_to_conversation,
)
from .processor_check import PROCESSOR_CONFIG, check_processor, check_processor_files, image_settings
from .prompt_encoding import encode_with_literals, literal_ids
from .tiling import Size, tile_grid
from .turns import Turn, print_turns, walk_turns

Loaded = TypeVar("Loaded", bound="BaseProcessor")


@contextlib.contextmanager
def told_of_ids(what: str) -> Iterator[None]:
    """Say of what is no token id a ``ValueError``."""
    try:
        yield
    except (OverflowError, TypeError) as error:
        raise ValueError(f"{what} takes token ids, whole numbers from 0 on: {error}.") from error


# What processor_config.json of transformers holds beside a processor's own arguments.
NOT_SETTINGS = ("processor_class", "auto_map", "transformers_version", "image_processor", "tokenizer_class")


class BaseProcessor(ProcessorMixin):
    """Settings, tokenizer and token ids of `DeepseekVLV2Processor`, which documents the arguments."""

    attributes = ["tokenizer"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        candidate_resolutions: Sequence[Sequence[int]] = ((384, 384),),
        patch_size: int = 14,
        downsample_ratio: int = 2,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        image_token: str = "<image>",
        pad_token: str = "<｜▁pad▁｜>",
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
        chat_template: str | None = None,
        background: Background = WHITE,
        transformers_defaults: bool = False,
        **kwargs: Any,
    ) -> None:
        unknown = [name for name in kwargs if not name.startswith("_") and name not in NOT_SETTINGS]
        if unknown:
            warnings.warn(f"The processor has no settings of these names: {', '.join(unknown)}.", stacklevel=2)
        check_texts(sft_format=sft_format, image_token=image_token, pad_token=pad_token)
        check_switches(
            normalize=normalize,
            add_special_token=add_special_token,
            mask_prompt=mask_prompt,
            transformers_defaults=transformers_defaults,
        )
        get_conv_template(sft_format)  # an unknown name is an error here, not at the first call
        self.candidate_resolutions = check_sizes("candidate_resolutions", candidate_resolutions)
        if not self.candidate_resolutions:
            raise FieldError("candidate_resolutions is empty: give at least one (width, height).")
        self.image_size = self.candidate_resolutions[0][0]
        self._check_resolutions(self.candidate_resolutions)
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.image_mean = check_channels("image_mean", image_mean)
        self.image_std = check_channels("image_std", image_std, above=0)
        self.normalize = normalize
        self.image_transform = ImageTransform(mean=image_mean, std=image_std, normalize=normalize)
        self.image_token = image_token
        self.pad_token = pad_token
        self.add_special_token = add_special_token
        self.sft_format = sft_format
        self.mask_prompt = mask_prompt
        self.ignore_id = ignore_id
        check_fields(self, {"patch_size": PIXELS, "downsample_ratio": MERGED, "ignore_id": ANY_WHOLE})
        self.background = check_background(background)
        self.transformers_defaults = transformers_defaults
        self._prepare_tokenizer(tokenizer)
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        tokenizer.chat_template = self.chat_template

    # ---------------------------------------------------------------- tokenizer

    def _check_resolutions(self, resolutions: Sequence[Size]) -> None:
        for resolution in resolutions:
            try:
                tile_grid(resolution, self.image_size)
            except ValueError as error:
                raise FieldError(f"candidate_resolutions: {error}") from None

    def _prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add the tokens that the prompts need and the tokenizer lacks, and check that it keeps spaces."""
        probe = "Two words,  two spaces: 12 34."
        if tokenizer.decode(tokenizer.encode(probe, add_special_tokens=False)) != probe:
            raise ValueError(
                f"This {type(tokenizer).__name__} loses spaces. The tokenizers of DeepSeek-VL2 are byte-level: load "
                "them with transformers.PreTrainedTokenizerFast, or use DeepseekVLV2Processor.from_pretrained."
            )
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"The tokenizer names no {name}: its tokenizer_config.json is missing, or lacks it.")
        # The position of a sample's last token must not depend on the batch: generation continues from there.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": self.pad_token})
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in (self.image_token, *GROUNDING_TOKENS, *CHAT_TOKENS) if t not in vocabulary]
        if missing:
            tokenizer.add_tokens(missing, special_tokens=True)
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(self.image_token))
        self._literals = literal_ids(tokenizer, self.image_token)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[PreTrainedTokenizerBase]:
        # The released tokenizer_config.json names LlamaTokenizerFast; transformers 5 then drops the byte-level
        # pre-tokenizer that tokenizer.json asks for, and spaces vanish.
        for name in ("trust_remote_code", "_from_auto", "processor_class", "code_revision"):
            kwargs.pop(name, None)
        directory = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if (directory / "config.json").is_file():
            check_tokenizer(directory, check_config(directory, DeepseekVLV2Config.model_type))
        elif directory.is_dir() and not (directory / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{directory} has no tokenizer.json: {HOLDS}.")
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError:
            raise
        except Exception as error:  # tokenizers' own has no class
            files = f"The tokenizer of {pretrained_model_name_or_path} (tokenizer.json, tokenizer_config.json)"
            raise ValueError(f"{files} cannot be read: {str(error).rstrip('.')}.") from error
        tokenizer.init_kwargs.pop("auto_map", None)
        return [tokenizer]

    @classmethod
    def from_pretrained(
        cls: type[Loaded], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Loaded:
        """Load a checkpoint's processor, or that of "nano"; arguments as in transformers."""
        source = locate_bundled(pretrained_model_name_or_path)
        directory = Path(source) / (kwargs.get("subfolder") or "")
        try:
            loaded: Any = super().from_pretrained(source, **kwargs)
        except FieldError as error:
            raise ValueError(f"{directory / PROCESSOR_CONFIG} cannot be used: {error}") from error
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if kwargs.get("padding_side") is not None:
            processor.tokenizer.padding_side = kwargs["padding_side"]
        if (directory / "config.json").is_file():
            check_processor(processor, directory)
        return loaded

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Return what processor_config.json holds; what it lacks is taken from config.json."""
        directory = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        check_processor_files(directory)
        content, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        return {**image_settings(directory), **content}, rest

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a tokenizer and the content of processor_config.json.

        A chat template that never writes this model's role tags belongs to another model (one release ships such a
        stray file) and is left out; its own, as an earlier version saved it, gives way to today's.
        """
        template = processor_dict.get("chat_template")
        foreign = not (isinstance(template, str) and "<|User|>" in template)
        if template is not None and (foreign or is_own_template(template)):
            processor_dict = {name: value for name, value in processor_dict.items() if name != "chat_template"}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what processor_config.json holds."""
        content = super().to_dict()
        if not content.get("transformers_defaults"):
            content.pop("transformers_defaults", None)
        return content

    @property
    def bos_id(self) -> int:
        """Id of the token that opens every sequence."""
        return self.tokenizer.bos_token_id

    @property
    def eos_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.tokenizer.pad_token_id

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        return ["input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop"]

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Return the ids of a text, with bos in front and eos behind where asked for."""
        ids = encode_with_literals(self.tokenizer, text, self._literals)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Any, **kwargs: Any) -> str:
        """Return the text of token ids; raise ``ValueError`` for what are none, such as the -100 of labels."""
        with told_of_ids("decode"):
            return self.tokenizer.decode(t, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Return the text of each row of token ids; errors as `decode`."""
        with told_of_ids("batch_decode"):
            return self.tokenizer.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Return the texts of what ``generate`` returned; errors as `decode`."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def new_chat_template(self) -> Conversation:
        """Return a fresh copy of this processor's prompt template."""
        return get_conv_template(self.sft_format)

    # ---------------------------------------------------------------- prompts as text

    def format_messages(
        self,
        conversations: Sequence[Message],
        sft_format: str = "deepseek",
        system_prompt: str = "",
    ) -> str:
        """Return a conversation as a person reads it: as it is tokenized, with a space in front of each answer.

        A conversation that ends with the user's turn is shown with the assistant's tag that asks for the answer. What
        is returned gives, as ``text=``, the same ids, unless a message of the conversation is the system's.
        """
        turns = self._walk(self._flatten(conversations), template=sft_format)
        return system_prompt.strip() + print_turns(turns, sft_format, self.tokenizer.eos_token)

    def format_prompts(self, prompts: str, sft_format: str = "deepseek", system_prompt: str = "") -> str:
        """Return a bare prompt wrapped as one user turn."""
        message = {"role": get_conv_template(sft_format).roles[0], "content": prompts}
        return (system_prompt.strip() + self._walk([message], template=sft_format)[0].text).strip()

    def _walk(
        self,
        conversation: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
    ) -> list[Turn]:
        template = template or self.sft_format
        return walk_turns(conversation, template, self.image_token, add_generation_prompt, continue_final_message)

    def _flatten(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages with texts as contents, without their images."""
        return messages_to_conversation(messages, self.image_token, lambda part: None)
