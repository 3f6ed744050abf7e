"""The tokenizer that vLLM loads for a DeepSeek-VL2 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekVLV2Processor


class DeepseekVL2Tokenizer(PreTrainedTokenizerFast):
    """A release's byte-level tokenizer with the tokens of the prompts, and one bos in front of a text.

    The processor puts bos in front itself; here a text alone becomes a prompt.
    """

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *args: Any,
        revision: str | None = None,
        download_dir: str | None = None,
        truncation_side: str = "left",
        **kwargs: Any,
    ) -> Any:
        """Load a tokenizer; the keywords are vLLM's, and those that do not concern a tokenizer.json are left out."""
        from vllm.tokenizers.hf import get_cached_tokenizer

        tokenizer = super().from_pretrained(
            str(path), revision=revision or "main", cache_dir=download_dir, truncation_side=truncation_side
        )
        return get_cached_tokenizer(prepare_tokenizer(tokenizer))

    def encode(self, text: Any, *args: Any, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """Return the ids of a text; see transformers."""
        return super().encode(
            self._without_bos(text, add_special_tokens), *args, add_special_tokens=add_special_tokens, **kwargs
        )

    def __call__(self, text: Any = None, *args: Any, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        """Return the ids of a text or of several; see transformers."""
        return super().__call__(
            self._without_bos(text, add_special_tokens), *args, add_special_tokens=add_special_tokens, **kwargs
        )

    def _without_bos(self, text: Any, is_added: bool) -> Any:
        """Take bos off where it is going to be added."""
        if not is_added or not self.bos_token:
            return text
        if isinstance(text, str):
            return text.removeprefix(self.bos_token)
        return [self._without_bos(item, True) for item in text] if isinstance(text, list) else text


def prepare_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add the tokens that prompts need, and have bos put in front where special tokens are asked for."""
    DeepseekVLV2Processor(tokenizer)  # adds the tokens, and refuses a tokenizer that loses spaces
    bos, id_ = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:0", special_tokens=[(bos, id_)]
    )
    return tokenizer
