"""The command line: help, configurations, defaults and their replacement, the summary after fit."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_gemini import cli
from lightning_gemini.lightning_cli import byte_entropies

CONFIGS = Path(__file__).parents[1] / "configs"
TINY_MODEL = [
    "--model.config.hidden_size=16",
    "--model.config.ffn_dim=16",
    "--model.config.num_hidden_layers=1",
    "--model.config.num_attention_heads=2",
    "--model.config.max_position_embeddings=32",
]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 10)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run the command line in this process and return what it wrote."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # so that what a run sets is undone
    monkeypatch.setattr(sys, "argv", ["lightning-gemini"])
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        capfd.readouterr()
        cli.main([str(argument) for argument in arguments])
        return capfd.readouterr().out

    return run


def on_one_cpu(tmp_path):
    return [
        "--trainer.strategy=auto",
        "--trainer.devices=1",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--data.sequence_length=32",
        "--data.batch_size=2",
        "--data.validation_fraction=0.2",
    ]


def printed_config(run, capfd, *arguments):
    with pytest.raises(SystemExit, match="0"):
        run(*arguments, "--print_config")
    return yaml.safe_load(capfd.readouterr().out)


# Before LightningCLI


def test_version_needs_no_torch():
    # by path: what the package itself imports is not this module's affair
    script = f"import runpy, sys; runpy.run_path({cli.__file__!r})['main'](['--version']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, modules = out.splitlines()
    assert first.startswith("lightning-gemini 0.")
    assert not {"torch", "lightning"} & set(modules.split())


def test_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-gemini", "--version"])
    runpy.run_path(cli.__file__, run_name="__main__")
    assert capsys.readouterr().out.startswith("lightning-gemini ")


# Help and configurations


def test_help(run, capfd):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert {"fit", "validate", "test", "predict"} <= set(capfd.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        run("fit", "--help")
    out = capfd.readouterr().out
    assert "lightning_gemini.causal_lm.CausalLM" in out
    assert "--data.help TextData" in out
    for command, expected in (("--data.help=TextData", "UTF-8 byte"), ("--model.help=CausalLM", "warm-up")):
        with pytest.raises(SystemExit, match="0"):
            run("fit", command)
        assert expected in capfd.readouterr().out


def test_print_config_has_the_defaults_and_the_changes(run, capfd):
    config = printed_config(
        run, capfd, "fit", "--model.config.hidden_size=24", "--data.path=/tmp", "--model.betas=[0,0.5]"
    )
    assert config["model"]["class_path"] == "lightning_gemini.causal_lm.CausalLM"
    assert config["model"]["init_args"]["config"] == {"hidden_size": 24}
    assert config["model"]["init_args"]["betas"] == [0, 0.5]
    assert config["data"]["class_path"] == "lightning_gemini.data.TextData"
    assert config["data"]["init_args"]["path"] == "/tmp"


def test_configs_may_refer_to_the_environment(run, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH", "24")
    settings = "{batch_size: '${oc.env:BATCH}', sequence_length: '${oc.env:NOT_SET,77}'}"
    (tmp_path / "config.yaml").write_text(
        f"data:\n  class_path: lightning_gemini.data.TextData\n  init_args: {settings}\n"
    )
    data = printed_config(run, capfd, "fit", f"--config={tmp_path / 'config.yaml'}")["data"]["init_args"]
    assert (data["batch_size"], data["sequence_length"]) == (24, 77)


def test_other_classes_take_the_place_of_the_defaults(run, tmp_path):
    demos = "lightning.pytorch.demos.boring_classes."
    common = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=1"]
    for data in ("null", demos + "BoringDataModule"):
        out = run("fit", f"--model={demos}BoringModel", f"--data={data}", *common)
        assert "continues" not in out
        assert "nats per byte" not in out


def test_a_constructors_error_is_what_comes_out(run):
    with pytest.raises(FileNotFoundError, match=r"^path '/no/such' does not exist"):
        run("fit", "--data.path=/no/such")


def test_text_is_checked_before_the_trainer_starts(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ValueError, match="No text found"):
        run("fit", f"--data.path={tmp_path}", *on_one_cpu(tmp_path))


# Runs


def test_fit_validate_and_predict(run, texts, tmp_path):
    common = [f"--data.path={texts}", *on_one_cpu(tmp_path)]
    out = run("fit", *TINY_MODEL, *common, "--trainer.max_steps=8", "--trainer.val_check_interval=4")
    assert "--- the model continues 'def ' (sampled, not from the data) ---\ndef " in out
    assert "validation loss: 5." in out
    assert "nats per byte (its unigram entropy: 3." in out
    assert "tokens/s over 1 process(es)" in out
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert f"best checkpoint: {checkpoint}" in out
    assert (checkpoint.parents[1] / "config.yaml").exists()

    loss = next(line.split()[2] for line in out.splitlines() if line.startswith("validation loss"))
    out = run("validate", *common, f"--ckpt_path={checkpoint}")  # the model's settings come from the checkpoint
    assert loss in out.replace("│", "")
    run("predict", *common, f"--ckpt_path={checkpoint}", "--trainer.logger=false")
    run("fit", *TINY_MODEL, *common, f"--ckpt_path={checkpoint}", "--trainer.max_steps=9")


@pytest.mark.parametrize(
    "short", [["--trainer.fast_dev_run=1"], ["--trainer.max_steps=2", "--trainer.limit_val_batches=0"]]
)
def test_summary_of_a_run_without_speed_or_loss(run, texts, tmp_path, short):
    out = run("fit", *TINY_MODEL, f"--data.path={texts}", *on_one_cpu(tmp_path), *short)
    assert "the model continues" in out
    assert "tokens/s" not in out
    assert ("nats per byte" in out) == ("--trainer.fast_dev_run=1" in short)


def test_configured_speed_callback_is_not_doubled(run, texts, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr("lightning_gemini.callbacks.TokensPerSecond.on_train_start", lambda *_: counts.append(1))
    speed = "--trainer.callbacks+=lightning_gemini.callbacks.TokensPerSecond"
    out = run(
        "fit", *TINY_MODEL, f"--data.path={texts}", *on_one_cpu(tmp_path), "--trainer.fast_dev_run=4",
        speed, "--trainer.callbacks.warmup_steps=1",
    )  # fmt: skip
    assert counts == [1]
    assert "tokens/s over 1" in out


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_run(run, tmp_path, config):
    settings = yaml.safe_load(config.read_text())
    # the strategy has its own tests; everything else is run as it stands
    settings["trainer"] |= {"strategy": "auto", "devices": 1, "default_root_dir": str(tmp_path)}
    settings["trainer"] |= {"limit_train_batches": 6, "val_check_interval": 6, "limit_val_batches": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    out = run("fit", f"--config={tmp_path / 'config.yaml'}")
    assert "validation loss: " in out
    assert "last checkpoint: " in out


def test_byte_entropies():
    alternating = np.tile(np.array([1, 2], np.uint8), 500)
    assert byte_entropies(alternating) == pytest.approx((np.log(2), 0), abs=1e-5)
    noise = np.random.default_rng(0).integers(0, 4, 100_000, dtype=np.uint8)
    assert byte_entropies(noise) == pytest.approx((np.log(4), np.log(4)), abs=1e-3)
