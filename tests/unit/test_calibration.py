"""int4 packed for samples: the moments that are taken, the packing, and checkpoints packed layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import KINDS, mini_inputs, mini_model, mini_processor, noise_image
from torch import nn

from deepseek_vl2.cli.main import main
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, calibrated_packing, calibration
from deepseek_vl2.models.calibrated_packing import product_error, quantize_for_inputs
from deepseek_vl2.models.calibration import Calibration, Moments
from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.models.quantization import PackedWeight, WeightFormat, dequantize, quantize
from deepseek_vl2.models.quantizer import WeightOnlyConfig, plan_formats
from deepseek_vl2.utils.calibration import read_calibration

GROUP = 32
INT4 = WeightFormat("int4", GROUP)
SAMPLES = [mini_inputs([5, (1, 1), 40], seed=1), mini_inputs([60], seed=2), mini_inputs([9, (2, 1), 30], seed=3)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_vl2.models.loading.packing_device", lambda: torch.device("cpu"))


@cache
def released(kind: str) -> Path:
    directory = Path(mkdtemp(prefix=f"calibration-{kind}-"))
    mini_model(kind).save_pretrained(directory)
    return directory


def load(kind: str, samples: Any = None, **options: Any) -> Any:
    config = WeightOnlyConfig("int4", group_size=GROUP, calibration=samples, **options)
    model = DeepseekVLV2ForCausalLM.from_pretrained(released(kind), dtype=torch.float32, quantization_config=config)
    return model.eval()


def correlated_inputs(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return inputs a few of whose directions carry most, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    return torch.randn(count, columns, generator=generator) @ mixing


def weights(count: int = 2, rows: int = 48, columns: int = 128) -> torch.Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(7)) * 0.02


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_lose_half_as_much_as_without_samples(group: int, dtype: torch.dtype) -> None:
    weight, inputs, fmt = weights(), correlated_inputs(400, 128), WeightFormat("int4", group)
    moments = (inputs.T @ inputs).expand(2, -1, -1)
    plain, fitted = quantize(weight, fmt, dtype), quantize_for_inputs(weight, moments, fmt, dtype)
    assert [part.shape for part in fitted] == [part.shape for part in plain]
    assert [part.dtype for part in fitted] == [part.dtype for part in plain]
    assert product_error(weight, fitted, fmt, moments) < 0.6 * product_error(weight, plain, fmt, moments)
    exact = inputs @ weight.mT
    error = (inputs @ dequantize(fitted, fmt, torch.float32).mT - exact).norm() / exact.norm()
    assert product_error(weight, fitted, fmt, moments) == pytest.approx(float(error), rel=1e-3)


def test_inputs_without_correlation_change_little() -> None:
    weight, moments = weights(), torch.eye(128).expand(2, -1, -1)
    plain, fitted = quantize(weight, INT4), quantize_for_inputs(weight, moments, INT4, torch.float32)
    assert torch.equal(fitted.packed, plain.packed)
    torch.testing.assert_close(fitted.scale, plain.scale)


def test_experts_are_packed_alike_together_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(3)
    rows = [correlated_inputs(count, 128, seed) for seed, count in enumerate((300, 5, 90))]
    moments = torch.stack([part.T @ part for part in rows])
    together = quantize_for_inputs(weight, moments, INT4, torch.float32)
    monkeypatch.setattr(calibrated_packing, "TOGETHER", 1)
    alone = quantize_for_inputs(weight, moments, INT4, torch.float32)
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second)


def test_an_expert_that_saw_nothing_is_rounded_as_it_is() -> None:
    weight = weights(1)
    fitted = quantize_for_inputs(weight, torch.zeros(1, 128, 128), INT4, torch.float32)
    assert torch.equal(fitted.packed, quantize(weight, INT4).packed)


def test_what_cannot_be_packed_so_is_refused() -> None:
    moments = torch.eye(128)[None]
    with pytest.raises(ValueError, match="of int4 alone, not of int8"):
        quantize_for_inputs(weights(1), moments, WeightFormat("int8"), torch.float32)
    with pytest.raises(ValueError, match="not finite"):
        quantize_for_inputs(weights(1), moments * float("nan"), INT4, torch.float32)
    with pytest.raises(ValueError, match="Calibration is of int4 alone: fp8"):
        WeightOnlyConfig("fp8", calibration=SAMPLES)


# ---------------------------------------------------------------- what the layers get


def test_experts_count_their_own_tokens_by_their_share() -> None:
    model = mini_model("small")
    name, experts = next((n, m) for n, m in model.named_modules() if isinstance(m, DeepseekV2Experts))
    hidden = torch.randn(7, experts.hidden_size)
    ids, shares = torch.tensor([[0, 1]] * 6 + [[2, 3]]), torch.rand(7, 2)
    moments = Moments(samples=1)
    formats = dict.fromkeys((f"{name}.gate_up_proj", f"{name}.down_proj"), INT4)
    with moments.taken(model, formats), torch.no_grad():
        experts(hidden, ids, shares)
    down, up = moments.sums[f"{name}.down_proj"], moments.sums[f"{name}.gate_up_proj"]
    gate_up = hidden[6:] @ experts.gate_up_proj[3].mT
    gate, upper = gate_up.chunk(2, dim=-1)
    inner = experts.act_fn(gate) * upper * shares[6, 1]
    torch.testing.assert_close(down[3], inner.mT @ inner)
    assert not down[4:].any()
    lean = up[5]  # no token came: only what it leans on
    own = hidden[:6] * shares[:6, 1:]
    torch.testing.assert_close(up[1] - lean, own.mT @ own, rtol=1e-4, atol=1e-4)
    of_all = hidden * shares.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(lean, of_all.mT @ of_all * calibration.TOKENS_OF_ALL / 7)
    assert not experts._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_layers_run_one_by_one_give_what_the_model_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, torch.Tensor] = {}

    def keep(weight: torch.Tensor, moments: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype) -> PackedWeight:
        taken[str(len(taken))] = moments
        return quantize(weight, fmt, dtype)

    monkeypatch.setattr(calibration, "quantize_for_inputs", keep)
    # Nothing but the head is packed, so all layers before it are exact.
    monkeypatch.setattr(
        "deepseek_vl2.models.loading.plan_formats",
        lambda model, config: {n: f for n, f in plan_formats(model, config).items() if n.endswith("lm_head")},
    )
    load(kind, SAMPLES, head="int4")
    model = DeepseekVLV2ForCausalLM.from_pretrained(released(kind), dtype=torch.float32).eval()
    expected = torch.zeros_like(taken["0"][0])
    with torch.no_grad():
        for sample in SAMPLES:
            embeds = model.prepare_inputs_embeds(**{k: v for k, v in sample.items() if k != "attention_mask"})
            rows = model.language.model(inputs_embeds=embeds).last_hidden_state.flatten(0, 1)
            expected += rows.mT @ rows
    torch.testing.assert_close(taken["0"][0], expected, rtol=1e-4, atol=1e-3)


def test_a_layer_is_measured_behind_packed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, taken = calibration.CalibratedPacking._pack, {}

    def keep(self: Any, name: str, owner: nn.Module, short: str, moments: Moments) -> None:
        taken[name] = moments.sums[short][0].clone()
        pack(self, name, owner, short, moments)

    monkeypatch.setattr(calibration.CalibratedPacking, "_pack", keep)
    model = load("small", SAMPLES)
    name, seen = "language.model.layers.1.self_attn.q_proj", []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].flatten(0, 1))
    )
    logits(model)
    hook.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(taken[name], rows.mT @ rows, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------- checkpoints


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.cat([model(**sample).logits[0] for sample in SAMPLES])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_packed_for_samples_is_nearer_on_them(kind: str) -> None:
    exact = logits(DeepseekVLV2ForCausalLM.from_pretrained(released(kind), dtype=torch.float32).eval())
    work = Calibration(SAMPLES)
    plain, fitted = load(kind), load(kind, work)
    assert {error.name for error in work.errors} == {n for n, f in plain.config.quantization_config.formats.items()}
    assert all(error.calibrated < 0.9 * error.plain for error in work.errors)
    gain = (logits(fitted) - exact).norm() / (logits(plain) - exact).norm()
    assert float(gain) < 0.85  # random weights: tokens change their experts, in base most of all


def test_what_is_saved_has_the_same_form_as_without_samples(tmp_path: Path) -> None:
    plain, fitted = load("small"), load("small", SAMPLES)
    for name, model in (("plain", plain), ("fitted", fitted)):
        model.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fitted"))
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {n: (t.shape, t.dtype) for n, t in second.items()}
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "fitted" / "config.json").read_text()
    again = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "fitted", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(fitted))


def test_one_layer_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[int]] = []
    run = calibration.CalibratedPacking._pack_layer

    def watched(self: Any, prefix: str, decoder: Any, hidden: Any) -> Any:
        out = run(self, prefix, decoder, hidden)
        layers = self.whole
        held.append({i for i, layer in enumerate(layers) if any(p.device.type != "meta" for p in layer.parameters())})
        return out

    def watching(self: Any, work: Calibration) -> Any:
        self.whole = list(self.model.language.model.layers)
        return whole_run(self, work)

    whole_run = calibration.CalibratedPacking.run
    monkeypatch.setattr(calibration.CalibratedPacking, "_pack_layer", watched)
    monkeypatch.setattr(calibration.CalibratedPacking, "run", watching)
    told: list[tuple[int, int]] = []
    load("small", Calibration(SAMPLES[:1], done=lambda layer, layers: told.append((layer, layers))))
    assert held == [{0}, {1}, {2}]
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a sample"):
        load("tiny", [])


# ---------------------------------------------------------------- files and the command


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    noise_image(0, 70, 70).save(tmp_path / "a.png")

    def write(*lines: Any) -> Path:
        file = tmp_path / "samples.jsonl"
        file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return file

    yield write


ASKED = {"prompt": "What is this?", "images": ["a.png"]}
ANSWERED = {
    "messages": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "Noise."}],
    "images": ["a.png"],
}


def test_samples_are_lines_of_finetune_and_of_batch(write: Callable[..., Path]) -> None:
    processor = mini_processor()
    asked, answered = read_calibration(processor, write(ASKED, ANSWERED)).samples
    ids, whole = asked["input_ids"][0].tolist(), answered["input_ids"][0].tolist()
    assert whole[: len(ids)] == ids and len(whole) > len(ids)
    assert asked["images"].shape == answered["images"].shape


def test_of_many_lines_some_are_taken_evenly(write: Callable[..., Path]) -> None:
    lines = [{"prompt": "a" * (number + 1)} for number in range(10)]
    samples = read_calibration(mini_processor(), write(*lines), most_samples=4).samples
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    assert [length - lengths[0] for length in lengths] == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: the line is not valid JSON"),
        ({"text": "a"}, r"line 1: the object has none of the keys conversation, conversations, messages, prompt"),
        ({"prompt": 3}, r"line 1: a prompt is a text, not int"),
        ({"prompt": "<image> and <image>", "images": ["a.png"]}, r"hold 2 <image> tags, but 1 images"),
        ({"prompt": "a", "images": ["b.png"]}, r"line 1: .*b.png"),
        ({"prompt": "a" * 5000}, r"line 1: The conversation has [5-6],\d+ tokens; calibration takes 4,096 at most"),
    ],
)
def test_bad_lines_are_named(write: Callable[..., Path], line: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_calibration(mini_processor(), write(line))


def test_the_command_reports_both_errors(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(ASKED, ANSWERED), tmp_path / "out"
    options = ["--calibration", str(file), "--device", "cpu", "--no_agreement", "--group_size", "32"]
    assert main(["quantize", "demo", str(output), *options]) == 0
    assert "error of products with 2 samples, packed without them and for them" in capsys.readouterr().out
    report = json.loads((output / "quantization_report.json").read_text())
    errors = report["calibration"]["errors"]
    assert len(errors) == len(report["errors"]) and all(e["calibrated"] < e["plain"] for e in errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "int8"], "Calibration is of int4 alone: int8 rounds each weight"),
        (["--calibration", "missing.jsonl"], "There is no data file at missing.jsonl."),
    ],
)
def test_the_command_refuses_before_it_works(
    options: list[str], message: str, write: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    given = ["--calibration", str(write(ASKED)), *options]
    assert main(["quantize", "demo", str(tmp_path / "out"), "--device", "cpu", *given]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_hooks_reach_linear_layers_that_fast_paths_run() -> None:
    model = mini_model("tiny")
    formats = plan_formats(model, WeightOnlyConfig("int4", group_size=GROUP))
    moments = Moments(samples=1)
    with moments.taken(model, formats), torch.no_grad():
        model(**SAMPLES[0])
    assert moments.sums.keys() == formats.keys()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name in formats}
    for name in linears:
        assert torch.linalg.eigvalsh(moments.sums[name][0]).min() > -1e-2
