"""Settings of every test: one thread each, as several tests run at a time, and hypothesis profiles."""

import os

# Before torch is imported, and for child processes as well. Threads that wait for one another on a core that another test
# has make small tensors ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

torch.set_num_threads(1)

# Derandomized: a red run is red again. Longer and random fuzzing is a profile of its own, never this one.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("tests")
