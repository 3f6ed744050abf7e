"""The lines of ``deepseek-vl2 batch --ray --backend vllm``: read as for our engine, answered by vLLM."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from deepseek_vl2.cli.batch_files import Job, error_record
from deepseek_vl2.cli.batch_lines import Pending, Question, answer_record, prepare, why_unanswered
from deepseek_vl2.cli.options import Loaded, check_reachable, generation_options, most_tokens


@dataclass
class Ended:
    """The last word on an answer, as our engine's."""

    finish_reason: str
    completion_tokens: int


class VllmLines:
    """Lines on their way through vLLM, at most ``--batch_size`` of them unanswered.

    Args:
        args: the command's options.
        seed: of random numbers; line n has ``seed + n``.

    Raises:
        ValueError: vLLM is not installed, or cannot run the checkpoint.
    """

    def __init__(self, args: Namespace, seed: int) -> None:
        from deepseek_vl2.utils.io import NANO_NAME, resolve_model_path

        # In this process: an engine in one of its own would outlive a worker that is killed, and keep the GPU.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ValueError('--backend vllm needs the package vllm: pip install "deepseek_vl2[vllm]"') from error
        from deepseek_vl2.integrations.vllm import register

        register()
        self.args = args
        self.seed = seed
        self.params = vllm.SamplingParams
        name = args.model or NANO_NAME
        check_reachable(name)
        path = str(resolve_model_path(name))
        self.engine = vllm.LLM(model=path, dtype=args.dtype, max_num_seqs=args.batch_size).llm_engine
        self.loaded = load_processor(path, self.engine.model_config.max_model_len)
        self.asked: dict[str, Question] = {}
        self.done: list[dict[str, Any]] = []

    @property
    def has_room(self) -> bool:
        """Whether another line may be asked."""
        return len(self.asked) < self.args.batch_size

    @property
    def lines(self) -> list[Any]:
        """Those that were asked, and whose records nobody took."""
        return [*self.asked, *self.done]

    def read(self, job: Job) -> Pending:
        """Read a line, to be asked; several threads may do so."""
        return prepare(self.loaded, job, self.args.system_prompt)

    def add(self, line: Pending) -> None:
        """Ask a line that was read; one with an error is done as it is."""
        question = line.question
        if question is None:
            self.done.append(error_record(line.job, line.error or ""))
            return
        name = str(line.job.line)
        try:
            self.engine.add_request(name, self._prompt(question), self._params(question))
        except Exception as error:  # of this line; the others go on
            self.done.append(error_record(line.job, why_unanswered(error)))
        else:
            self.asked[name] = question

    def take(self, in_order: bool) -> dict[str, Any] | None:
        """Return the record of a line that is done, or ``None``; in the order in which they are done."""
        assert not in_order, "vLLM's answers come as they are done"
        return self.done.pop(0) if self.done else None

    def wait(self, until: Callable[[], bool]) -> None:
        """Drive vLLM until one more line is done, or until something is so."""
        while not self.done and not until():
            for output in self.engine.step():
                if output.finished:
                    self._end(self.asked.pop(output.request_id), output.outputs[0])

    def _end(self, question: Question, completion: Any) -> None:
        if completion.finish_reason not in ("stop", "length"):
            self.done.append(error_record(question.job, f"vLLM ended the answer: {completion.finish_reason}."))
            return
        end = Ended(completion.finish_reason, len(completion.token_ids))
        self.done.append(answer_record(question, completion.text, end))

    def _prompt(self, question: Question) -> dict[str, Any]:
        if question.is_low:
            raise ValueError("detail 'low' is of our engine: vLLM's plugin cuts images into tiles.")
        ids = collapse_images(self.loaded.processor, question.sample)
        images = {"multi_modal_data": {"image": question.images}} if question.images else {}
        return {"prompt_token_ids": ids, **images}

    def _params(self, question: Question) -> Any:
        options = generation_options(self.args)
        room = most_tokens(self.loaded) - len(question.sample["input_ids"])
        return self.params(
            max_tokens=min(options.max_new_tokens, room),
            temperature=options.temperature,
            top_p=options.top_p if options.temperature > 0 else 1.0,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
            seed=self.seed + question.job.line,
            stop=[text for text in options.stop if text],
            skip_special_tokens=False,  # boxes stand between such tokens
        )


def load_processor(path: str, most: int) -> Loaded:
    """Return a checkpoint's processor beside what is told of a model of so many positions."""
    from deepseek_vl2.models import DeepseekVLV2Processor

    processor = DeepseekVLV2Processor.from_pretrained(path)
    config = SimpleNamespace(language_config=SimpleNamespace(max_position_embeddings=most))
    return Loaded(path, processor.tokenizer, processor, cast(Any, SimpleNamespace(config=config)))


def collapse_images(processor: Any, sample: Any) -> list[int]:
    """Return a prompt's ids with one image token for each image, as vLLM takes them."""
    from deepseek_vl2.integrations.vllm.inputs import tokens_of_image
    from deepseek_vl2.models.tiling import TileGrid

    ids, marked = list(map(int, sample["input_ids"])), list(map(bool, sample["images_seq_mask"]))
    grids = [TileGrid(*map(int, row)) for row in sample["images_spatial_crop"] if int(row[0])]
    lengths = iter([tokens_of_image(processor, grid) for grid in grids])
    kept, position = [], 0
    while position < len(ids):
        kept.append(ids[position])
        position += next(lengths) if marked[position] else 1
    return kept
