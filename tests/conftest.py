"""Settings of every test: hypothesis profiles, and the folder of tests that want a GPU."""

import hypothesis

# Derandomized: a red run is red again. Longer and random fuzzing is a profile of its own, never this one.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("tests")
