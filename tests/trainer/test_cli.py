"""Command line, YAML and the checks of options."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import rlhf_trainer
from rlhf_trainer.cli import main, parse
from rlhf_trainer.config import ConfigError, PPOConfig, RewardConfig, SFTConfig, load_yaml
from rlhf_trainer.demo import DemoConfig


def test_usage_names_the_stages(capsys):
    main([])
    usage = capsys.readouterr().out
    assert all(f"\n  {stage} " in usage for stage in ("sft", "reward", "ppo", "demo"))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_help_describes_every_option_without_loading_torch(stage):
    code = (
        "import sys; from rlhf_trainer.cli import main\n"
        f"try: main(['{stage}', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.rstrip().endswith("False")
    assert "InstructGPT, arXiv 2203.02155" in done.stdout
    options = done.stdout.split("options")[1]
    kind = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}[stage]
    flat = " ".join(options.replace("│", " ").split())
    for name in (field.name for field in dataclasses.fields(kind)):
        # The option is followed by its description, not by its default alone.
        text = flat.split(f"--{name.replace('_', '-')} ", 1)[-1].split("(default")[0]
        assert len(text.split()) > 4, name


def environment() -> dict[str, str]:
    source = str(Path(rlhf_trainer.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "COLUMNS": "100"}


def test_yaml_is_overridden_by_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nepochs: 3\ntrain_file: x.jsonl\nadam_betas: [0.8, 0.9]\n")
    config = parse("sft", SFTConfig, ["--epochs", "5", "--config", str(path)])
    assert (config.learning_rate, config.epochs) == (1e-4, 5)
    assert config.train_file == Path("x.jsonl")
    assert config.adam_betas == (0.8, 0.9)
    assert config.config == path
    assert config.batch_size == SFTConfig().batch_size
    assert parse("sft", SFTConfig, [f"--config={path}"]).epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; expected one of config, output"),
        ("epochs: many", "epochs: expected int, got 'many'"),
        ("epochs: 1.5", "epochs: expected int, got 1.5"),
        ("epochs: true", "epochs: expected int, got True"),
        ("learning_rate: [1]", r"learning_rate: expected float, got \[1\]"),
        ("resume: 'yes'", "resume: expected bool, got 'yes'"),
        ("keep: first", r"keep: expected Literal\['best', 'last'\], got 'first'"),
        ("adam_betas: [0.9]", r"adam_betas: expected tuple\[float, float\], got \[0.9\]"),
        ("train_file: 3", "train_file: expected Path, got 3"),
        ("batch_size: .inf", "batch_size: expected int, got inf"),
        ("[" * 100_000, "cannot be read as YAML"),
        ("- epochs", "expected a mapping of options, got list"),
        ("a: b: c", "cannot be read as YAML"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.yaml: {message}"):
        load_yaml(SFTConfig, path)


DATA_FILES = ("config", "output", "train_file", "heldout_file", "model", "tokenizer")
PATHS = [
    (SFTConfig, DATA_FILES),
    (RewardConfig, (*DATA_FILES, "reference_file")),
    (PPOConfig, ("config", "output", "prompt_file", "model", "tokenizer", "reward_model")),
    (DemoConfig, ("config", "out")),
]


@pytest.mark.parametrize(("kind", "names"), PATHS, ids=lambda x: getattr(x, "__name__", None))
def test_tilde_is_the_home_folder_in_every_path(kind, names, tmp_path, monkeypatch):
    """On the command line, in YAML and in Python; a path may be a string, a model's one a Path."""
    hints = typing.get_type_hints(kind)
    assert {n for n, hint in hints.items() if "Path" in str(hint)} <= set(names)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("".join(f"{name}: ~/x\n" for name in names))
    args = [part for name in names for part in (f"--{name.replace('_', '-')}", "~/x")]
    stage = getattr(kind, "stage", "demo")
    for config in (
        kind(**dict.fromkeys(names, "~/x")),
        kind(**dict.fromkeys(names, Path("~/x"))),
        load_yaml(kind, Path("~/x")),
        parse(stage, kind, args),
    ):
        for name in names:
            text = name in ("model", "tokenizer", "reward_model")
            expected = str(tmp_path / "x") if text else tmp_path / "x"
            assert getattr(config, name) == expected, name


def test_options_in_python_have_their_types():
    config = SFTConfig(output="runs/x", learning_rate="1e-4", adam_betas=[0.8, 0], epochs=2.0)
    assert (config.output, config.learning_rate, config.epochs) == (Path("runs/x"), 1e-4, 2)
    assert config.adam_betas == (0.8, 0.0) and isinstance(config.epochs, int)
    config.output = "runs/y"
    config.validate()
    assert config.output == Path("runs/y")
    for name, value, message in (
        ("output", 3, "output: expected Path, got 3"),
        ("epochs", None, "epochs: expected int, got None"),
        ("keep", "first", r"keep: expected Literal\['best', 'last'\], got 'first'"),
        ("model", 7, "model: expected str, got 7"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            SFTConfig(**{name: value})


def test_yaml_none_and_empty(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("missing_eos_score: null\nkl_target: 6\n")
    config = load_yaml(PPOConfig, path)
    assert (config.missing_eos_score, config.kl_target) == (None, 6.0)
    path.write_text("")
    assert load_yaml(PPOConfig, path) == PPOConfig()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SFTConfig(epochs=0), "epochs: expected an integer >= 1, got 0"),
        (SFTConfig(learning_rate=-1.0), "learning_rate: expected a number > 0, got -1.0"),
        (SFTConfig(adam_betas=(0.9, 1.0)), "adam_betas: expected two numbers in"),
        (SFTConfig(learning_rate=math.inf), "learning_rate: expected a finite number, got inf"),
        (SFTConfig(adam_betas=(0.9, math.nan)), "adam_betas: expected a finite number, got"),
        (PPOConfig(missing_eos_score=math.nan), "missing_eos_score: expected a finite number"),
        (SFTConfig(seed=-1), r"seed: expected an integer in \[0, 2\*\*32\), got -1"),
        (SFTConfig(seed=5_000_000_000), "seed: expected an integer in .* got 5000000000"),
        (SFTConfig(dropout=1.0), "dropout: expected a number in"),
        (RewardConfig(heldout_share=1.0), "heldout_share: expected a number in"),
        (PPOConfig(batch_size=10, minibatches=3), "minibatches: expected a divisor of batch_size"),
        (PPOConfig(episodes=30), r"episodes: expected at least batch_size \(64\), got 30"),
        (PPOConfig(kl_target=0.0), "kl_target: expected a number > 0, or none, got 0.0"),
        (PPOConfig(missing_eos_penalty=1.0), "missing_eos_penalty: expected 0 unless"),
        (PPOConfig(temperature=0.0), "temperature: expected a number > 0, got 0.0"),
    ],
)
def test_options_are_checked(config, message):
    with pytest.raises(ConfigError, match=message):
        config.validate()


@pytest.mark.parametrize("config", [SFTConfig(), RewardConfig(), PPOConfig()])
def test_defaults_pass_their_own_checks(config):
    config.validate()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fly"], "expected sft, reward, ppo or demo, got 'fly'"),
        (["sft", "--epochs", "0"], "epochs: expected an integer >= 1, got 0"),
        (["sft", "--output", "OUT"], "model: expected a folder"),
        (
            ["sft", "--output", "OUT", "--model", "scratch:gpt2-tiny"],
            "train_file: expected a value",
        ),
        (
            ["sft", "--output", "OUT", "--model", "scratch:gpt2-tiny", "--train-file", "BAD"],
            r"bad\.jsonl:2: missing key 'response'",
        ),
        (["ppo", "--output", "OUT", "--model", "scratch:gpt2-tiny"], "expected a trained model"),
        (["sft", "--output", "OUT", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_end_with_a_message(args, message, tmp_path, write_lines):
    bad = write_lines("bad.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a"}])
    places = {"OUT": str(tmp_path / "out"), "BAD": str(bad)}
    with pytest.raises(SystemExit, match=message) as caught:
        main([*(places.get(arg, arg) for arg in args), "--device", "cpu"])
    assert str(caught.value).startswith(f"rlhf-train {args[0]}: ")


def test_without_the_extra_the_command_says_what_to_install():
    code = (
        "import sys\n"
        "for name in ('tyro', 'yaml'): sys.modules[name] = None\n"
        "from rlhf_trainer.cli import main; main(['sft', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment())  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("rlhf-train sft: ")
    assert done.stderr.endswith("; run: pip install 'rlhf-kernels[train]'\n")
    assert done.stderr.count("\n") == 1


def test_end_line_without_held_out_data(tmp_path, write_lines, capsys):
    rows = [{"prompt": "say", "response": "a", "chosen": "a", "rejected": "b"}] * 4
    path = write_lines("data.jsonl", rows)
    for stage in ("sft", "reward"):
        args = f"{stage} --model scratch:gpt2-tiny --train-file {path} --output {tmp_path / stage}"
        quick = "--heldout-share 0 --epochs 1 --device cpu --no-progress --no-plot"
        main([*args.split(), *quick.split()])
        end = capsys.readouterr().out.splitlines()[-1]
        assert end == f"{stage}: no held-out data; {tmp_path / stage / 'model'}"


def test_public_names_are_imported_on_first_use():
    assert sorted(rlhf_trainer.__all__) == sorted(rlhf_trainer._MODULE_OF)
    assert set(rlhf_trainer.__all__) <= set(dir(rlhf_trainer))
    for name in rlhf_trainer.__all__:
        assert callable(getattr(rlhf_trainer, name)), name
    with pytest.raises(ImportError, match="cannot import name 'train_dpo'"):
        from rlhf_trainer import train_dpo  # noqa: F401
    code = (
        "import sys; from rlhf_trainer import SFTConfig; print('torch' in sys.modules)\n"
        "from rlhf_trainer import train_sft, train_reward, train_ppo; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.split() == ["False", "True"]


README = Path(__file__).parents[2] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_example_of_the_readme_works_on_a_cpu(tmp_path, monkeypatch, write_lines):
    """Its commands as they are, on files of its names, but for shorter responses and fewer of
    them; then its Python."""
    monkeypatch.chdir(tmp_path)
    letters = "abcdefghij"
    write_lines("demos.jsonl", [{"prompt": f"say {x}", "response": x} for x in letters])
    pairs = [{"prompt": f"say {x}", "chosen": x, "rejected": "no"} for x in letters]
    write_lines("comparisons.jsonl", pairs)
    write_lines("prompts.jsonl", [{"prompt": f"say {x}"} for x in letters])
    text = README.read_text(encoding="utf-8").split("## Train on your own data")[1]
    lines = [line for line in text.splitlines() if line.startswith("rlhf-train ")]
    assert [line.split()[1] for line in lines] == ["sft", "reward", "ppo"]
    for line in lines:
        args = line.replace("--episodes 640", "--episodes 64").split()[1:]
        main([*args, "--max-response-tokens", "4", "--device", "cpu"])
        assert (tmp_path / "runs" / args[0] / "model" / "config.json").exists()
    code = text.split("```python\n")[1].split("```")[0]
    assert "max_response_tokens" not in code  # a CPU's default
    exec(code.replace("episodes=64", 'episodes=16, device="cpu", max_response_tokens=4'), {})
    rows = (tmp_path / "runs" / "exact" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1
