"""Imported once by the server that test ranks are forked from."""

import importlib

import torch

# what the ranks import anyway, some of it late
for name in ("peft", "torch._dynamo", "tests.cases", "tests.lightning_cases"):
    importlib.import_module(name)
for name in ("bert", "llama", "mixtral", "opt", "t5"):
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")

# a thread pool made here would be a dead one in the ranks
torch.set_num_threads(1)
