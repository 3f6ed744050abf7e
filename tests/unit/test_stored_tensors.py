"""Tensors of a checkpoint are read as safetensors reads them, from several threads at once too."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepseek_vl2.models.checkpoint import DTYPES, StoredTensors, read_slices


def write(path: Path) -> dict[str, torch.Tensor]:
    tensors = {f"of {code}": torch.randn(5, 3, 4).mul(3).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "odd": torch.arange(7, dtype=torch.uint8)}
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def test_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    expected = load_file(path)
    slices = StoredTensors([path]).slices
    assert slices.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(slices[name][...], tensor) and slices[name][...].dtype == tensor.dtype
        assert slices[name].get_shape() == list(tensor.shape)
    assert torch.equal(slices["of BF16"][1:3, 0], expected["of BF16"][1:3, 0])


def test_a_dtype_that_is_not_known_is_left_to_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"small": torch.ones(3, 3).to(torch.float8_e4m3fn)}, path)
    assert torch.equal(read_slices(path)["small"][...].float(), torch.ones(3, 3))


def test_threads_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {str(i): torch.full((64, 256), float(i)) for i in range(200)}
    save_file(tensors, path)
    slices = read_slices(path)
    with ThreadPoolExecutor(8) as pool:
        read = dict(zip(slices, pool.map(lambda name: slices[name][...], slices), strict=True))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_experts_are_read_into_one_tensor(tmp_path: Path) -> None:
    names = [f"layers.1.mlp.experts.{e}.{part}_proj.weight" for e in range(3) for part in ("gate", "up", "down")]
    tensors = {name: torch.randn((6, 4) if "down" not in name else (4, 6)).bfloat16() for name in names}
    tensors[names[3]] = tensors[names[3]].float()  # a dtype of its own
    save_file(tensors, tmp_path / "a.safetensors")
    fused = StoredTensors([tmp_path / "a.safetensors"]).fused()
    gate_up = fused["layers.1.mlp.experts.gate_up_proj"][...]
    assert gate_up.shape == (3, 12, 4) and gate_up.dtype == torch.bfloat16
    for expert in range(3):
        gate, up, down = (tensors[name] for name in names[3 * expert : 3 * expert + 3])
        assert torch.equal(gate_up[expert], torch.cat((gate.bfloat16(), up)))
        assert torch.equal(fused["layers.1.mlp.experts.down_proj"][...][expert], down)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux")
def test_files_are_closed_when_nobody_needs_them(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)

    def handles() -> int:
        return sum(path == Path(link).resolve() for link in Path("/proc/self/fd").iterdir() if link.exists())

    one = read_slices(path)["odd"]
    assert handles() == 1 and one[...].tolist() == list(range(7))
    del one
    gc.collect()
    assert handles() == 0


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    slices = read_slices(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(SafetensorError):
        read_slices(path)
    last = max(slices.values(), key=lambda stored: stored.start)
    with pytest.raises(ValueError, match="ends at byte"):
        last[...]
