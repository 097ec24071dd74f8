"""Imported once by the server that test ranks are forked from."""

import torch

import tests.cases  # noqa: F401

# a thread pool made here would be a dead one in the ranks
torch.set_num_threads(1)
