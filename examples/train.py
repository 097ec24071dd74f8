"""Your own LightningModule, trained by the gemini strategy.

    python examples/train.py                           # one process
    python examples/train.py --devices 2               # two ranks, started by Lightning
    torchrun --nproc-per-node 2 examples/train.py --devices 2
    python examples/train.py --device_memory 600KiB    # on a device that is too small for the model

All of them print the losses in examples/train.out: where the chunks live changes no number.
"""

import argparse
import logging
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gemini import GeminiStrategy

WIDTH, CLASSES, BATCH = 256, 10, 64


class Classifier(L.LightningModule):  # nothing in it knows of gemini
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(32, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(),
            torch.nn.Linear(WIDTH, CLASSES),
        )  # fmt: skip

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Printer(L.Callback):
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print(trainer.strategy.engine.layout, flush=True)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch}: loss {trainer.callback_metrics['loss']:.3f}", flush=True)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, 32, generator=generator)
    labels = torch.randint(CLASSES, (2048,), generator=generator)
    return TensorDataset(centers[labels] + 1.5 * torch.randn(2048, 32, generator=generator), labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--device_memory", default="auto")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    L.seed_everything(0)
    trainer = L.Trainer(
        strategy=GeminiStrategy(device_memory=args.device_memory),
        accelerator="cpu", devices=args.devices, max_epochs=3, callbacks=[Printer()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(data(), batch_size=BATCH // args.devices, shuffle=True))


if __name__ == "__main__":
    main()
