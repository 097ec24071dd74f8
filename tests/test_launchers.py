"""Ranks started by Lightning, SLURM and fork (torchrun: see the README's commands); the example does what it says."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "train.py"


def fresh_environment() -> dict[str, str]:
    """This process's environment without what a Trainer in it has set for its own ranks."""
    ours = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours}


def run(*command: str, **environment: str) -> str:
    """Runs a command to its end and returns what it printed; nothing outlives the call."""
    env = fresh_environment()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a rank that waits for one that died, too
    assert process.returncode == 0, err[-3000:]
    return out


def losses(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("epoch")]


EXPECTED = (ROOT / "examples" / "train.out").read_text()


def test_the_example_prints_what_it_says() -> None:
    assert run(sys.executable, str(EXAMPLE)) == EXPECTED
    assert len(EXAMPLE.read_text().splitlines()) < 80


def test_the_example_on_two_ranks_that_move_chunks() -> None:
    out = run(sys.executable, str(EXAMPLE), "--devices", "2", "--device_memory", "900KiB")
    assert losses(out) == losses(EXPECTED)


def test_slurm() -> None:
    """The variables that srun sets, for two tasks on one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        slurm = {
            "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost",
            "SLURM_NNODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(EXAMPLE), "--devices", "2"],
                cwd=ROOT,
                env={**fresh_environment(), "PYTHONPATH": str(ROOT), **slurm},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert losses(outputs[0][0]) == losses(EXPECTED)
    assert not losses(outputs[1][0])


def test_fork_as_in_a_notebook() -> None:
    """A notebook cannot run its own file again; Lightning forks there, before anything touched a device."""
    script = textwrap.dedent("""
        import sys
        sys.ps1 = ">>> "  # what Lightning takes for an interactive session
        sys.path.insert(0, "examples")
        import train
        import lightning as L
        trainer = L.Trainer(strategy="gemini", accelerator="cpu", devices=2, max_epochs=1, callbacks=[train.Printer()],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        assert type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher", trainer.strategy.launcher
        L.seed_everything(0)
        model = train.Classifier()
        trainer.fit(model, train.DataLoader(train.data(), batch_size=32, shuffle=True))
        assert all(p.isfinite().all() for p in model.parameters()), "the weights did not come back"
    """)
    assert losses(run(sys.executable, "-c", script, OMP_NUM_THREADS="1")) == losses(EXPECTED)[:1]
