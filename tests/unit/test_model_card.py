"""A saved model says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from support import shared_mini_model
from transformers.utils import PushToHubMixin


@pytest.mark.parametrize("kind", ["tiny", "base"])
def test_saving_writes_a_card_that_the_hub_reads(kind: str, tmp_path: Path) -> None:
    shared_mini_model(kind).save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.to_dict()["pipeline_tag"] == "image-text-to-text"
    assert ("latent attention" in card.text) == (kind == "base")
    assert 'from_pretrained("mine")' in card.text


def test_a_card_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    shared_mini_model("tiny").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_other_processes_write_none(tmp_path: Path) -> None:
    shared_mini_model("tiny").save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_pushing_writes_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that would reach the hub replaced."""
    pushed = dict[str, str]()

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise EntryNotFoundError("none yet")

    def upload(self: Any, directory: Any, *args: Any, **kwargs: Any) -> None:
        pushed["card"] = (Path(directory) / "README.md").read_text(encoding="utf-8")

    model = shared_mini_model("tiny")
    monkeypatch.setattr(ModelCard, "load", absent)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: type("Url", (), {"repo_id": repo_id})())
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    model.push_to_hub("somebody/mine")
    assert "library_name: transformers" in pushed["card"]
    assert "pipeline_tag: image-text-to-text" in pushed["card"]
    assert 'from_pretrained("somebody/mine")' in pushed["card"]
