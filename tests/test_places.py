"""Models that are nowhere are named at once, with what to do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from configs import config_for
from conftest import llama
from hub import Hub

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.host.places import check_places


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("mergekit_karcher.host.places.HF_HUB_CACHE", str(tmp_path / "cache"))


def sentence_of(reference, **options):
    with pytest.raises(KarcherError) as caught:
        check_places([reference], **options)
    return str(caught.value)


def test_what_is_there_passes(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    check_places(["model", "./model", "model+adapter", "model@main", str(tmp_path / "model")])


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./none", "C:\\models\\a", "D:/Models/some model", "a/b/c", "a.pt"]
)
def test_a_path_that_is_not_there(path):
    said = sentence_of(path)
    assert said.startswith(f"There is no model at {path}")
    assert ("where relative paths begin" in said) == (path[0] not in "/CD")


def test_an_adapter_that_is_not_there(tmp_path):
    assert (
        sentence_of(f"{tmp_path}+/no/adapter")
        == "There is no model at /no/adapter: check the path."
    )


def test_a_home_folder(tmp_path, monkeypatch):
    """mergekit hands ~ to the Hub as it stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert f"write {tmp_path}/model instead" in sentence_of("~/model")
    assert sentence_of("~/none") == "There is no model at ~/none: check the path."


def test_a_path_from_the_folder_of_the_config(tmp_path, monkeypatch):
    (tmp_path / "recipe" / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    said = sentence_of("./a/b", folder=Path("recipe"))
    assert "from the folder of the config: run the command in recipe" in said


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """transformers alone would ask six times, and wait in between."""
    asked = []

    def refuse(*arguments, **_options):
        asked.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    said = sentence_of("somebody/model")
    assert len(asked) <= 2
    assert said.startswith("There is no folder somebody/model here, and the Hub cannot be reached")


def test_offline_by_choice(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the Hub cannot be reached" in sentence_of("somebody/model")


def test_a_name_that_the_hub_could_not_have():
    assert "no name that the Hub could have" in sentence_of("some model")


def test_a_name_that_the_hub_does_not_have(tmp_path, monkeypatch):
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert "no such model on the Hub, or it is private" in sentence_of("somebody/model")


def test_a_cached_model_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "own" / "models--somebody--model").mkdir(parents=True)
    check_places(["somebody/model"], cache=str(tmp_path / "own"))
    (tmp_path / "cache" / "models--somebody--other").mkdir(parents=True)
    check_places(["somebody/other"])


def test_align_and_report_say_it(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = llama(tmp_path / "model", 0)
    results = [
        cli("align", model, "/no/model", "--out", "aligned"),
        cli("report", config=config_for([model, "/no/model"])),
    ]
    for result in results:
        assert result.exit_code == 1
        assert "There is no model at /no/model: check the path." in result.output
