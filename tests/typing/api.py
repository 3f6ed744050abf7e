"""What a type checker sees of the package, as its users' code would show it; checked by pyright, never run."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

from deepseek_vl2 import (
    DeepseekVLV2Config,
    DeepseekVLV2ForCausalLM,
    DeepseekVLV2Processor,
    load_pretrained_model,
    nano_path,
    parse_grounding,
)
from deepseek_vl2.models.answers import ChatAnswer
from deepseek_vl2.models.processing_deepseek_vl_v2 import BatchCollateOutput, VLChatProcessorOutput
from deepseek_vl2.utils.grounding import Grounding

processor = DeepseekVLV2Processor.from_pretrained("nano")
model = DeepseekVLV2ForCausalLM.from_pretrained("nano", dtype=torch.float32)
config = DeepseekVLV2Config.from_pretrained("nano")
assert_type(processor, DeepseekVLV2Processor)
assert_type(model, DeepseekVLV2ForCausalLM)
assert_type(config, DeepseekVLV2Config)
assert_type(nano_path(), str)

batch = processor(conversations=[{"role": "user", "content": "hi"}])
assert_type(batch, BatchCollateOutput)
assert_type(processor(text="hi", images=[], return_tensors="pt"), BatchCollateOutput)
assert_type(processor(prompt="hi", force_batchify=False), VLChatProcessorOutput)
assert_type(model.generate(**batch, max_new_tokens=4), torch.Tensor)
answer, history = model.chat(processor, "What is this?", images=["photo.jpg"])
assert_type(answer, ChatAnswer)
assert_type(answer.grounding, Grounding)
assert_type(processor.post_process_grounding("text", [(640, 480)]), Grounding)
assert_type(processor.post_process_grounding(["text"]), list[Grounding])
assert_type(parse_grounding("text")[0].pixel_boxes, "list[tuple[int, int, int, int]] | None")

_, own_processor, own_model = load_pretrained_model("nano")
assert_type(own_processor, DeepseekVLV2Processor)
assert_type(own_model, DeepseekVLV2ForCausalLM)

processor(prompt="hi", cropping="no")  # pyright: ignore[reportArgumentType]
model.chat(processor)  # pyright: ignore[reportCallIssue]
