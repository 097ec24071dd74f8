"""An optimizer of your own: SophiaG, whose second backward every few steps estimates the curvature.

    python examples/sophia.py                           # one process
    python examples/sophia.py --devices 2               # two ranks, started by Lightning
    python examples/sophia.py --strategy auto           # the same program in plain Lightning
    python examples/sophia.py --precision bf16-mixed

A small language model learns which token follows which two. In 32-true all of them print the same losses.
"""

import argparse
import logging
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import lightning_gemini  # noqa: F401, registers "gemini"

VOCAB, LENGTH, WIDTH, BATCH, EVERY = 16, 32, 64, 32, 10


class SophiaG(torch.optim.Optimizer):
    """Algorithm 3 of Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training" (arXiv 2305.14342), with the Gauss-Newton-Bartlett estimator, its Algorithm 2.

    Nothing in it knows of chunks. It works on them because each element's update is its own affair, and because both
    ways to use a gradient go through ``step()``, the only place where gradients are at hand.

    Args:
        params: parameters or groups.
        lr: the largest change of an element in one step; the paper's eta.
        betas: how much the averages keep, of gradients at each step and of curvatures at each estimate.
        rho: the paper's gamma; a smaller one has more elements clipped.
        weight_decay: decoupled, as in AdamW.
        eps: the smallest curvature to divide by, rho included.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        eps: float = 1e-12,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**settings, "sampled": 0})

    def estimate(self, tokens: int) -> None:
        """Takes the gradient as that of a mean over ``tokens`` sampled labels; the weights stay as they are."""
        # by the groups, not by an argument of step(): on chunks the rule is called for each, and is given its groups
        for group in self.param_groups:
            group["sampled"] = tokens
        try:
            self.step()
        finally:
            for group in self.param_groups:
                group["sampled"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if not state:
                        state["exp_avg"], state["hessian"] = torch.zeros_like(param), torch.zeros_like(param)
                    if group["sampled"]:
                        curvature = param.grad.square() * group["sampled"]
                        state["hessian"].lerp_(curvature, 1 - group["betas"][1])
                    else:
                        self._update(param, state, group)
        return loss

    @staticmethod
    def _update(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        momentum = state["exp_avg"].lerp_(param.grad, 1 - group["betas"][0])
        newton = momentum / (group["rho"] * state["hessian"]).clamp_(min=group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(newton.clamp_(-1, 1), alpha=group["lr"])


def sampled_labels(logits: Tensor, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """Labels from the model's own distribution, by the Gumbel-max trick.

    The noise is drawn for the whole batch, of which a rank has every ``ranks``-th row, so that the number of ranks
    changes nothing.
    """
    generator = torch.Generator().manual_seed(step)
    noise = -torch.empty(len(logits) * ranks, *logits.shape[1:]).exponential_(generator=generator).log()
    return (logits.detach().float() + noise[rank::ranks].to(logits.device)).argmax(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # there are two backwards, and two ways to use a gradient
        self.token, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        # without biases: that of the keys changes nothing, and would go where rounding errors point
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True, bias=False
        )
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        future = places > places[:, None]
        return self.head(self.blocks(self.token(tokens) + self.position(places), mask=future, is_causal=True))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        tokens, labels = batch[:, :-1], batch[:, 1:]
        if self.global_step % EVERY == 0:
            self.estimate_curvature(tokens)
        loss = cross_entropy(self(tokens), labels)
        optimizer = self.optimizers()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)

    def estimate_curvature(self, tokens: Tensor) -> None:
        logits, ranks = self(tokens), self.trainer.world_size
        labels = sampled_labels(logits, self.global_step, self.global_rank, ranks)
        optimizer = self.optimizers(use_pl_optimizer=False)  # Lightning's own would count a step
        self.manual_backward(cross_entropy(logits, labels))
        optimizer.estimate(labels.numel() * ranks)  # a gradient is the mean over the tokens of all ranks
        optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # the paper would have 10% to 50% of the elements not clipped; few estimates, as here, need a larger rho
        return SophiaG(self.parameters(), rho=1.0)

    def train_dataloader(self) -> DataLoader:
        # one order however the program is started: plain Lightning on one process would have torch's own
        rows, ranks = data(), self.trainer.world_size
        return DataLoader(rows, BATCH // ranks, sampler=DistributedSampler(rows, ranks, self.global_rank))


class Printer(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch}: loss {trainer.callback_metrics['loss']:.3f}", flush=True)


def data(rows: int = 1024) -> Tensor:
    """Each token is given by the two before it, but for one in ten, which is any: 0.63 nats at best."""
    generator = torch.Generator().manual_seed(0)
    rule = torch.randint(VOCAB, (VOCAB, VOCAB), generator=generator)
    tokens = torch.randint(VOCAB, (rows, LENGTH + 1), generator=generator)
    follows = torch.rand(tokens.shape, generator=generator) < 0.9
    for i in range(2, LENGTH + 1):
        tokens[:, i] = torch.where(follows[:, i], rule[tokens[:, i - 2], tokens[:, i - 1]], tokens[:, i])
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="gemini")
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    L.seed_everything(0)
    trainer = L.Trainer(
        strategy=args.strategy, precision=args.precision,
        accelerator="cpu", devices=args.devices, max_epochs=3, callbacks=[Printer()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LanguageModel())


if __name__ == "__main__":
    main()
