"""Where models come from: folders, runs' folders, the hub and its cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from rlhf_trainer.cli import main
from rlhf_trainer.config import ConfigError
from rlhf_trainer.model import load_causal_lm, load_tokenizer, save_model
from rlhf_trainer.scalar import ScalarModel
from rlhf_trainer.sources import locate

NAME = "someone/a-model"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub's library."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def use_hub(monkeypatch, address: str) -> None:
    """Let the hub's library ask at the address."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def unreachable(cache, monkeypatch) -> Path:
    """A hub that refuses every connection, and an empty cache."""
    use_hub(monkeypatch, "http://127.0.0.1:9")
    return cache


@pytest.fixture
def answering(cache, monkeypatch) -> Iterator[list[int]]:
    """A hub that answers each request with the status at the list's head."""
    statuses = [404]

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(statuses[0])
            if statuses[0] == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield statuses
    server.shutdown()
    server.server_close()


def put_in_cache(cache: Path, model, tokenizer) -> None:
    """As the hub's library lays it out."""
    place = cache / f"models--{NAME.replace('/', '--')}"
    commit = "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    save_model(model, tokenizer, place / "snapshots" / commit)


def test_name_without_folder_cache_or_hub_fails_at_once(unreachable, tmp_path):
    """With the hub's own retries it took 29 seconds a file."""
    began = time.perf_counter()
    with pytest.raises(SystemExit) as caught:
        main(["sft", "--model", NAME, "--output", str(tmp_path / "run"), "--device", "cpu"])
    assert time.perf_counter() - began < 10
    message = str(caught.value)
    assert f"got {NAME}: there is no such folder, none in the hub's cache" in message
    assert "http://127.0.0.1:9 is out of reach" in message
    assert "\n" not in message


def test_offline_mode_is_no_hub(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # the session of an online moment knows nothing of it
    try:
        with pytest.raises(ConfigError, match="there is no such folder, none in the hub's cache"):
            locate("model", NAME)
    finally:
        monkeypatch.undo()
        huggingface_hub.close_session()


def test_cached_model_is_taken_where_the_hub_is_out_of_reach(
    unreachable, make_model, tokenizer, same_weights, capsys
):
    put_in_cache(unreachable, make_model(seed=4), tokenizer)
    began = time.perf_counter()
    assert locate("model", NAME) == (NAME, {"local_files_only": True})
    known = load_tokenizer(None, NAME)
    assert known.get_vocab() == tokenizer.get_vocab()
    assert same_weights(load_causal_lm(NAME, known), make_model(seed=4))
    assert time.perf_counter() - began < 10
    said = f"model: http://127.0.0.1:9 is out of reach: taking {NAME} as cached\n"
    assert capsys.readouterr().out.count(said) == 1


def test_an_answer_of_the_hub_is_left_to_transformers(answering):
    with pytest.raises(ConfigError, match="the hub has none of that name, or keeps it private"):
        locate("model", NAME)
    answering[0] = 403
    assert locate("model", NAME) == (NAME, {})
    answering[0] = 500
    assert locate("model", NAME) == (NAME, {})


@pytest.mark.parametrize("spec", ["./none", "/no/such/folder", "a/b/c", "none/"])
def test_what_can_only_be_a_folder_is_not_asked_of_the_hub(spec, unreachable):
    with pytest.raises(ConfigError, match=rf"model: .* got {spec}: there is no such folder$"):
        locate("model", spec)


def test_folder_of_a_run_stands_for_its_model(tmp_path, make_model, tokenizer, capsys):
    run = tmp_path / "run"
    save_model(make_model(), tokenizer, run / "model")
    (run / "metrics.jsonl").touch()
    assert locate("model", str(run)) == (str(run / "model"), {})
    assert capsys.readouterr().out == f"model: {run} is the folder of a run: taking {run}/model\n"
    assert load_tokenizer(str(run), None).get_vocab() == tokenizer.get_vocab()
    load_causal_lm(str(run), tokenizer)
    save_model(ScalarModel.from_causal_lm(make_model(), 0), tokenizer, tmp_path / "judge" / "model")
    ScalarModel.load(str(tmp_path / "judge"))
    # A model's own folder is itself, whatever else is in it.
    assert locate("model", str(run / "model")) == (str(run / "model"), {})
    save_model(make_model(), tokenizer, run / "model" / "model")
    assert locate("model", str(run / "model")) == (str(run / "model"), {})


def test_folder_of_an_unfinished_run_is_named_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"reward_model: expected the folder of a finished run"):
        locate("reward_model", str(tmp_path))
