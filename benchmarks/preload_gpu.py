"""Imported once by the server that contenders on a GPU are forked from; computes nothing and touches no GPU."""

import transformers.models.opt.modeling_opt  # noqa: F401

import benchmarks.trainee  # noqa: F401
