"""Imported once by the server that ranks are forked from, so that each starts at once; computes nothing."""

import transformers.models.opt.modeling_opt  # noqa: F401

import benchmarks.footprint
import benchmarks.rounds
import benchmarks.save_memory
import benchmarks.save_times
import benchmarks.standstill
import benchmarks.traffic  # noqa: F401
