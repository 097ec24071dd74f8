"""The rules of the house: rooms, sizes, configurations that run, a README that is true."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_cases import trainer
from tests.test_causal_lm import Letters, tiny
from tests.test_launchers import EXPECTED, ROOT, losses, run

PACKAGE = ROOT / "lightning_gemini"

#: From the top: a file imports from later rows only.
ROOMS = [
    ["cli"],
    ["lightning_cli", "report_cli", "checkpoint_cli", "export_cli"],
    ["picture"],
    ["causal_lm", "callbacks", "averaging"],
    ["data"],
    ["text"],
    ["strategy"],
    ["resume"],
    ["checkpoint_strategy", "restart"],
    ["resumption"],
    ["checkpointing"],
    ["ranks", "precision", "even", "supported", "handover", "budgets", "step_file", "pretrained", "loaders"],
    ["random_state"],
    ["checkpoint"],
    ["checkpoint.automatic"],
    ["checkpoint.io", "checkpoint.plain", "checkpoint.newest", "checkpoint.consolidate", "checkpoint.summary"],
    ["checkpoint.whole", "checkpoint.huggingface"],
    ["checkpoint.loading", "checkpoint.background", "checkpoint.saving", "checkpoint.after"],
    ["checkpoint.state"],
    ["checkpoint.lazy", "checkpoint.contents"],
    ["checkpoint.flat", "checkpoint.fingerprint"],
    ["checkpoint.boxes", "checkpoint.scalars"],
    ["checkpoint.huggingface_about", "checkpoint.huggingface_files", "checkpoint.weight_file"],
    ["checkpoint.writer", "checkpoint.reader", "checkpoint.removal"],
    ["checkpoint.stored_files", "checkpoint.commit", "checkpoint.kinds"],
    ["checkpoint.full_file", "checkpoint.streamed"],
    ["checkpoint.hashing", "checkpoint.planning", "checkpoint.location", "checkpoint.sweep"],
    ["checkpoint.local", "checkpoint.remote", "checkpoint.output"],
    ["checkpoint.folder", "checkpoint.lock", "checkpoint.manifest", "checkpoint.tensor_file"],
    ["checkpoint.operations"],
    ["transformers_private"],
    ["core"],
    ["core.shard"],
    ["core.engine"],
    ["core.rest"],
    ["core.step"],
    ["core.hooks", "core.norms", "core.stand_in", "core.verdict", "core.drain"],
    ["core.ballot"],
    ["core.optimizers"],
    ["core.optimizer_state"],
    ["core.update", "core.report"],
    ["core.chunk_update"],
    ["core.segments", "core.elementwise"],
    ["core.trial"],
    ["core.placement"],
    ["core.gradients", "core.hidden", "core.summon"],
    ["core.landing", "core.reduction"],
    ["core.chunk_gradient"],
    ["core.use"],
    ["core.access", "core.guard"],
    ["core.schedule"],
    ["core.journal", "core.recorder", "core.playbook", "core.first_homes", "core.sources"],
    ["core.construct", "core.buffers", "core.average", "core.refusal", "core.speedometer"],
    ["core.adapters"],
    ["core.failure", "core.residents"],
    ["core.store"],
    ["core.arrivals", "core.host_updates"],
    ["core.agree"],
    ["core.chunk"],
    ["core.collectives", "core.masters", "core.counters"],
    ["core.footprint"],
    ["core.state_width", "core.planner"],
    ["core.homes", "core.forecast"],
    ["core.residency"],
    ["core.trace", "core.step_plan", "core.speeds"],
    ["core.update_policy"],
    ["core.slabs"],
    ["core.pinning", "core.streams", "core.watchdog"],
    ["core.timeline", "core.hang", "core.course", "core.phase"],
    [
        "core.blocks",
        "core.units",
        "core.layout",
        "core.memory",
        "core.dtypes",
        "core.peers",
        "core.pulse",
        "core.inert",
        "core.machine",
        "core.cores",
    ],
    ["core.errors", "core.worker"],
    ["optim"],
    ["optim.kernel", "optim.recognise"],
    ["optim.native"],
    ["optim.tensor_kernel"],
    ["optim.adam", "optim.sgd", "optim.adagrad", "optim.lion", "optim.operands", "optim.loss_scale"],
    ["optim.rule", "optim.masters", "optim.rounding"],
]
ROW = {name: row for row, names in enumerate(ROOMS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_gemini"):
            base = node.module.removeprefix("lightning_gemini").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                names.add(full if full in ROW else base)
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("lightning_gemini.") for a in node.names if "lightning_gemini." in a.name}
    return names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    assert name in ROW, f"{name} has no room: add it to ROOMS and to docs/design.md"
    for other in imported(path):
        assert ROW[other] > ROW[name], f"{name} imports {other}, which is not below it"


def test_only_one_file_calls_torch_distributed() -> None:
    users = [
        module_name(path)
        for path in FILES
        if module_name(path).startswith(("core", "optim")) and re.search(r"\bdist\.(?!ProcessGroup)", path.read_text())
    ]
    assert users == ["core.collectives"]


def test_the_engine_works_without_lightning() -> None:
    script = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_utilities", "transformers"):
    sys.modules[name] = None
import torch
from lightning_gemini.core import shard
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
shard(model, [optimizer])
model(torch.ones(2, 8)).sum().backward()
optimizer.step()
print("fine")
"""
    assert run(sys.executable, "-c", script) == "fine\n"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            first = node.body[1].lineno if documented and len(node.body) > 1 else node.lineno
            assert (node.end_lineno or 0) - first < 60, f"{node.name} in {module_name(path)}"


# Configurations and the README

SHORT = [
    "--trainer.limit_train_batches=6", "--trainer.val_check_interval=6", "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip


def command_line(arguments: list[str], folder: Path) -> str:
    """Runs `lightning-gemini` as it stands, but for a few steps."""
    return run(
        sys.executable, "-m", "lightning_gemini.cli", *arguments, *SHORT, f"--trainer.default_root_dir={folder}",
        XDG_CACHE_HOME=str(folder / "cache"),
    )  # fmt: skip


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_runs(config: Path, tmp_path: Path) -> None:
    out = command_line(["fit", "--config", str(config)], tmp_path)
    assert re.search(r"^chunks +kind +parameters", out, re.MULTILINE)
    assert re.search(r"validation loss: \d\.\d+ nats per byte \(its unigram", out)
    assert re.search(r"device memory of chunks: [\d.]+ MiB in use", out)
    assert re.search(r"speed: [\d,]+ tokens/s over 2 process", out) or "tokens/s" not in out
    assert "the model continues" in out
    assert (ROOT / re.search(r"last checkpoint: (.*)", out)[1]).exists()


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = (line.partition("  #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_the_readme_opens_with_the_two_commands() -> None:
    assert readme_commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", readme_commands())
def test_every_readme_command_runs(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":  # what it would do; the demo's own command is run above, and these are the tests
        out = subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert out.strip()
    elif program == "pip":
        assert arguments == ["install", "-e", "."]
    elif program == "lightning-gemini" and arguments[:2] == ["fit", "--config"] and len(arguments) == 3:
        assert (ROOT / arguments[2]).parent == ROOT / "configs"  # run above
    elif program == "lightning-gemini" and "--help" in arguments:
        assert "usage" in run(sys.executable, "-m", "lightning_gemini.cli", *arguments)
    elif program == "lightning-gemini" and arguments[0] in ("verify", "consolidate", "export"):
        fit = trainer(max_epochs=1)
        fit.fit(tiny(), datamodule=Letters())
        fit.save_checkpoint(tmp_path / "saved")
        names = {"CHECKPOINT": "saved", "DIR": "saved", "OUT.ckpt": "out.ckpt", "OUT_DIR": "out"}
        arguments = [str(tmp_path / names[one]) if one in names else one for one in arguments]
        assert run(sys.executable, "-m", "lightning_gemini.cli", *arguments)
    elif program == "lightning-gemini":
        texts = tmp_path / "my_texts"
        texts.mkdir()
        for i in range(40):
            (texts / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 600)
        assert "nats per byte" in command_line([a.replace("my_texts", str(texts)) for a in arguments], tmp_path)
    else:
        assert program in ("python", "torchrun"), f"do not know how to check {command!r}"
        launcher = ["-m", "torch.distributed.run", "--standalone"] if program == "torchrun" else []
        assert losses(run(sys.executable, *launcher, *arguments)) == losses(EXPECTED)


def test_the_table_of_what_works_names_cases_and_tests_that_exist() -> None:
    table = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[3])}
    assert len(named) > 100
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert not sorted(name for name in named if not re.search(rf"(def|class) {name}\b", sources))
