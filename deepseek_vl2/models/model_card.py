"""The model card that is saved beside a model: README.md with what the hub reads, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = "README.md"
GENERATED = "This model card has been automatically generated"  # transformers' own, empty but for this
TAGS = ["deepseek_vl_v2", "image-text-to-text", "vision-language"]

TEMPLATE = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
{tags}
---

# {title}

A vision-language model of DeepSeek-VL2's architecture: {language}, {experts}, {vision}.
{parameters:,} parameters, stored in the layout of the released checkpoints.

```python
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

model = DeepseekVLV2ForCausalLM.from_pretrained("{title}")
processor = DeepseekVLV2Processor.from_pretrained("{title}")
inputs = processor(conversations=[{{"role": "user", "content": "<image>\\nWhat is this?", "images": ["photo.jpg"]}}])
print(processor.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

What it was trained on, how well it does and the license of its weights are for whoever trained it to say here.
"""


def model_card(model: Any, title: str) -> str:
    """Return the text of a model's card."""
    config = model.config.get_text_config()
    attention = "latent attention" if config.use_mla else "multi-head attention"
    routed = config.n_routed_experts
    vision = getattr(model.config, "vision_config", None)
    return TEMPLATE.format(
        title=title,
        tags="\n".join(f"- {tag}" for tag in TAGS),
        language=f"{config.num_hidden_layers} layers of width {config.hidden_size} with {attention}",
        experts="dense" if routed is None else f"{config.num_experts_per_tok} of {routed} experts a token",
        vision="text alone" if vision is None else f"tiles of {vision.image_size} pixels",
        parameters=model.num_parameters(),
    )


class ModelCardMixin:
    """Writes a card where ``save_pretrained`` finds none, and in place of the empty one that pushing would write."""

    model_tags = TAGS

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with a README.md unless there is one."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        card = Path(save_directory) / CARD
        is_main = args[0] if args else kwargs.get("is_main_process", True)
        if is_main and card.parent.is_dir() and not card.exists():
            card.write_text(model_card(self, card.parent.resolve().name), encoding="utf-8")

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        card = Path(working_dir) / CARD
        if card.is_file() and GENERATED in card.read_text(encoding="utf-8"):
            card.write_text(model_card(self, repo_id), encoding="utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]
