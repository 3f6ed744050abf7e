"""From conversations to batches that a model trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.data import get_worker_info

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput

from .data import CONVERSATION_KEYS, located

MODEL_INPUTS = ("input_ids", "labels", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")
COUNTED = ("samples", "dropped", "cut")
MAX_WORKERS = 256


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which samples share a row: the longest first, each into the first row that has room for it.

    Args:
        lengths: tokens of each sample, none above ``capacity``.
        capacity: most tokens of a row.

    Returns:
        Indices for each row, ascending.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return [sorted(row) for row in rows]


def cut_sample(sample: VLChatProcessorOutput, max_length: int) -> None:
    """Keep a sample's first tokens, in place: at most ``max_length``, and each image whole or not at all."""
    counts = sample["num_image_tokens"]
    # Images may stand side by side, so where one starts is counted and not read off the mask.
    first = torch.tensor(counts, dtype=torch.long).cumsum(0) - torch.tensor(counts, dtype=torch.long)
    starts = torch.nonzero(sample["images_seq_mask"]).flatten()[first].tolist()
    kept, keep = 0, max_length
    for start, tokens in zip(starts, counts, strict=True):
        if start + tokens > max_length:
            keep = min(keep, start)
            break
        kept += 1
    for name in ("input_ids", "target_ids", "images_seq_mask"):
        sample[name] = sample[name][:keep]
    if kept < len(counts):
        grids = sample["images_spatial_crop"]
        tiles = int((1 + grids[:kept].prod(dim=1)).sum())
        sample["images"] = sample["images"][:tiles] if kept else torch.zeros_like(sample["images"][:1])
        sample["images_spatial_crop"] = grids[:kept] if kept else torch.zeros_like(grids[:1])
        sample["num_image_tokens"] = counts[:kept]


def join_samples(samples: Sequence[VLChatProcessorOutput]) -> VLChatProcessorOutput:
    """Return several samples as one row, end to end; images of all of them in order."""
    shown = [sample for sample in samples if sample["num_image_tokens"]]
    joined: dict[str, Any] = {
        name: torch.cat([sample[name] for sample in samples]) for name in ("input_ids", "target_ids", "images_seq_mask")
    }
    for name in ("images", "images_spatial_crop"):
        joined[name] = torch.cat([sample[name] for sample in shown or samples[:1]])
    joined["num_image_tokens"] = [count for sample in samples for count in sample["num_image_tokens"]]
    joined["sft_format"] = ""
    return VLChatProcessorOutput(joined)


def weigh_stretches(labels_BT: torch.Tensor, ignored: int) -> torch.Tensor:
    """Return a weight for each label, [B, T], float32: 1 / sqrt(n) in a stretch of n, scaled to a mean of 1."""
    labelled_BT = labels_BT != ignored
    starts_BT = labelled_BT & ~F.pad(labelled_BT[:, :-1], (1, 0))
    stretch_N = starts_BT.flatten().cumsum(0)[labelled_BT.flatten()]
    weights_N = torch.bincount(stretch_N)[stretch_N].float().rsqrt()
    return torch.zeros(labels_BT.shape).masked_scatter(labelled_BT, weights_N / weights_N.mean())


class ConversationCollator:
    """Turn conversations into a batch, padded on the right, for the model's ``forward``.

    A sample is a conversation (a list of messages), or a mapping that holds one under ``conversation``,
    ``conversations`` or ``messages`` and, optionally, PIL images under ``images`` and a name for errors under
    ``source``: what `ConversationDataset` gives, or anything made in memory.

    Labels. "assistant" takes the loss on the answers and the eos after each, as the paper trains; "all" takes it on
    system and user turns too. The released processor files say ``mask_prompt: false``, which is what the original's
    processor then does with its labels: it learns the questions as well. Here the choice is the collator's, whatever
    the file says. Image tokens never take a loss, nor does the first token of a sample.

    Length. A sample of more than ``max_length`` tokens is dropped, or cut: then it keeps its first tokens and only
    whole images, and is dropped all the same when no label is left. `counts` says how many, over all workers. A batch
    of which nothing is left becomes one short row that takes no loss.

    Packing. The samples of a batch are laid end to end into as few rows of at most ``max_length`` tokens as they fit.
    Positions then start anew with each sample; from them the model sees where samples end, and attention stays inside
    each. Ask for batches of many samples: they are what is packed. The auxiliary balance loss is taken over rows, so
    packing changes it a little; the rest of the loss stays what it is.

    Args:
        processor: the model's processor.
        max_length: most tokens of a sample and, when packing, of a row; ``None``: no limit.
        overlong: what becomes of longer samples.
        labels: what takes the loss.
        packing: whether several samples share a row.
        cropping, candidate_resolutions, max_pixels: see `DeepseekVLV2Processor.process_one`.
        skip_logits: have the model return ``last_hidden_state`` instead of logits, for trainers that compute the loss
            themselves, as TRL's SFTTrainer does.
        image_dtype: dtype of the images; bfloat16 halves what workers hand over, and under bfloat16 autocast is
            what the vision tower makes of them anyway.
        loss_weighting: "token", every label counts 1, as the paper trains; "sqrt", labels of a stretch of n count in
            proportion to 1 / sqrt(n), with a mean of 1 over the batch, so that short answers are not lost among long
            ones (source: InternVL 2.5, square averaging).
        pad_to_multiple_of: pad batches to a multiple of so many tokens: compiled layers are then compiled for few
            lengths, and for a single one where this is ``max_length``.

    Raises:
        ValueError: an unknown choice, packing without ``max_length``; when called, a sample that the processor
            refuses, with its source.
    """

    def __init__(
        self,
        processor: DeepseekVLV2Processor,
        max_length: int | None = None,
        overlong: Literal["drop", "cut"] = "drop",
        labels: Literal["assistant", "all"] = "assistant",
        packing: bool = False,
        cropping: bool | None = None,
        candidate_resolutions: Sequence[Sequence[int]] | None = None,
        max_pixels: int | None = None,
        skip_logits: bool = False,
        image_dtype: torch.dtype = torch.float32,
        loss_weighting: Literal["token", "sqrt"] = "token",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        for name, value, known in (
            ("overlong", overlong, ("drop", "cut")),
            ("labels", labels, ("assistant", "all")),
            ("loss_weighting", loss_weighting, ("token", "sqrt")),
        ):
            if value not in known:
                raise ValueError(f"Unknown {name} {value!r}: expected one of {', '.join(known)}.")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}.")
        if skip_logits and loss_weighting != "token":
            raise ValueError("A trainer that computes the loss itself (skip_logits) knows nothing of loss_weighting.")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be positive, got {pad_to_multiple_of}.")
        if packing and max_length is None:
            raise ValueError("packing needs max_length: it is the length of a row.")
        self.processor = processor
        self.max_length = max_length
        self.overlong = overlong
        self.labels = labels
        self.packing = packing
        self.tiling: dict[str, Any] = {
            "cropping": cropping,
            "candidate_resolutions": candidate_resolutions,
            "max_pixels": max_pixels,
        }
        self.skip_logits = skip_logits
        self.image_dtype = image_dtype
        self.loss_weighting = loss_weighting
        self.pad_to_multiple_of = pad_to_multiple_of
        self._counts = self._new_counts()

    # ---------------------------------------------------------------- what was dropped

    @staticmethod
    def _new_counts() -> torch.Tensor:
        # Shared with the workers; a row for each, so that no two processes write to one place.
        return torch.zeros(MAX_WORKERS, len(COUNTED), dtype=torch.long).share_memory_()

    def counts(self) -> dict[str, int]:
        """Return how many samples were seen, dropped and cut, by all workers of this process together."""
        return dict(zip(COUNTED, self._counts.sum(dim=0).tolist(), strict=True))

    def with_own_counts(self) -> ConversationCollator:
        """Return a collator that does the same and counts for itself, as an evaluation beside the training should."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._counts = self._new_counts()
        return twin

    def _count(self, name: str, number: int = 1) -> None:
        worker = get_worker_info()
        slot = 0 if worker is None else (worker.id + 1) % MAX_WORKERS
        self._counts[slot, COUNTED.index(name)] += number

    # ---------------------------------------------------------------- samples

    def encode(self, sample: Any) -> VLChatProcessorOutput:
        """Return one conversation as ids, labels and tiles, whatever its length.

        Raises:
            ValueError, FileNotFoundError: see `DeepseekVLV2Processor.process_one`; the sample's source is named.
        """
        conversation, images, source = self._take_apart(sample)
        with located(source):
            encoded = self.processor.process_one(
                conversations=conversation,
                images=images,
                inference_mode=False,
                mask_prompt=self.labels == "assistant",
                **self.tiling,
            )
        # Nothing predicts a sample's first token; packed, the end of the sample before it would seem to.
        encoded["target_ids"][0] = self.processor.ignore_id
        return encoded

    @staticmethod
    def _take_apart(sample: Any) -> tuple[Any, Any, str | None]:
        if not isinstance(sample, Mapping):
            return sample, None, None
        conversation = next((sample[key] for key in CONVERSATION_KEYS if key in sample), None)
        if conversation is None:
            raise ValueError(f"A sample needs one of the keys {', '.join(CONVERSATION_KEYS)}, got {sorted(sample)}.")
        return conversation, sample.get("images"), sample.get("source")

    def _fit(self, sample: VLChatProcessorOutput) -> bool:
        """Cut an overlong sample where that is asked for; return whether it can be trained on."""
        ignore = self.processor.ignore_id
        if self.max_length is not None and len(sample) > self.max_length:
            if self.overlong == "drop":
                return False
            cut_sample(sample, self.max_length)
            if bool((sample["target_ids"] != ignore).any()):
                self._count("cut")
        return bool((sample["target_ids"] != ignore).any())

    def _placeholder(self) -> VLChatProcessorOutput:
        """Return a row that takes no loss; every process of a distributed run needs a batch at each step."""
        side = self.processor.image_size
        return VLChatProcessorOutput(
            sft_format="",
            input_ids=torch.tensor([self.processor.bos_id, self.processor.eos_id]),
            target_ids=torch.full((2,), self.processor.ignore_id),
            images=torch.zeros(1, 3, side, side),
            images_seq_mask=torch.zeros(2, dtype=torch.bool),
            images_spatial_crop=torch.zeros(1, 2, dtype=torch.long),
            num_image_tokens=[],
        )

    # ---------------------------------------------------------------- batches

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Return a batch.

        Returns:
            ``input_ids``, ``labels`` (-100: no loss), ``attention_mask``, ``images_seq_mask``, [B, T] each; ``images``
            [B, tiles, 3, S, S] and ``images_spatial_crop`` [B, images, 2]; when packing, ``position_ids`` [B, T], and B
            is the number of rows; ``loss_weights`` [B, T] where labels do not all count the same.
        """
        encoded = [self.encode(sample) for sample in samples]
        kept = [sample for sample in encoded if self._fit(sample)]
        self._count("samples", len(encoded))
        self._count("dropped", len(encoded) - len(kept))
        kept = kept or [self._placeholder()]
        for sample in kept:  # before they are padded to the most tiles of a sample
            sample.to(self.image_dtype)
        groups = [[sample] for sample in kept]
        if self.packing:
            assert self.max_length is not None
            rows = pack_rows([len(sample) for sample in kept], self.max_length)
            groups = [[kept[index] for index in row] for row in rows]
        joined = [group[0] if len(group) == 1 else join_samples(group) for group in groups]
        padded = self.processor.batchify(joined, padding="right")
        batch: dict[str, Any] = {name: padded[name] for name in MODEL_INPUTS}
        if self.pad_to_multiple_of is not None:
            self._pad_on(batch, -batch["input_ids"].shape[1] % self.pad_to_multiple_of)
        if self.loss_weighting == "sqrt":
            batch["loss_weights"] = weigh_stretches(batch["labels"], self.processor.ignore_id)
        if self.packing:
            lengths = [[len(sample) for sample in group] for group in groups]
            batch["position_ids"] = self._positions(lengths, batch["input_ids"].shape[1])
        if self.skip_logits:
            batch["skip_logits"] = True
        return batch

    def _pad_on(self, batch: dict[str, Any], more: int) -> None:
        """Pad a batch by ``more`` tokens on the right, in place."""
        values = {
            "input_ids": self.processor.pad_id,
            "labels": self.processor.ignore_id,
            "attention_mask": False,
            "images_seq_mask": False,
        }
        for name, value in values.items():
            batch[name] = F.pad(batch[name], (0, more), value=value)

    @staticmethod
    def _positions(lengths: Sequence[Sequence[int]], width: int) -> torch.Tensor:
        """Return positions that start anew with each sample of a row, and with the padding behind them."""
        rows = [torch.cat([torch.arange(n) for n in (*row, width - sum(row))]) for row in lengths]
        return torch.stack(rows)
