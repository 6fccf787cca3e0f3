"""What recorded spaces allow a search to know: usage: what_spaces_allow.py DIR

Per space: how many configs lie within 1, 5 and 10 % of the optimum; what a random forest that was told the time of every other
config expects of the optimum, as a fraction of it, and how many configs are truly faster than that expectation (a search that
follows such a model tries those first). Then, for spaces of one kernel: the place, in another device's order, of the first config
that is within 5 % of the optimum here (a warm start from that device alone tries those before it first).
"""

import sys
from itertools import permutations
from pathlib import Path

import numpy as np

from harness.forest import grow
from harness.landscape import Landscape, landscapes
from harness.surrogate import points
from harness.untried import Untried


def times_of(land: Landscape) -> dict:
    return {config: found.time_ms for config, found in land.recordings.items() if found.time_ms is not None}


def main(folder: str) -> None:
    lands = landscapes(Path(folder))
    print(f"{'space':22} {'legal':>6} {'ran':>6} {'>=0.99':>7} {'>=0.95':>7} {'>=0.90':>7} {'expected':>9} {'faster':>7}")
    for land in lands:
        untried = Untried(land.space)
        known = times_of(land)
        times = np.array([known.get(config, np.nan) for config in land.space.legal])
        ran = np.flatnonzero(np.isfinite(times))
        best = ran[np.argmin(times[ran])]
        others = ran[ran != best]
        at = points(land.space, untried.coordinates)
        forest = grow(at[others], np.log(times[others]), np.random.default_rng(0), trees=200)
        expected = float(np.exp(forest.predict(at[[best]])[0][0]))
        fractions = times[best] / times[ran]
        within = [int((fractions >= line).sum()) for line in (0.99, 0.95, 0.90)]
        faster = int((times[ran] < expected).sum())
        print(f"{land.name:22} {len(times):6} {len(ran):6} {within[0]:7} {within[1]:7} {within[2]:7} "
              f"{times[best] / expected:9.2f} {faster:7}")
    print(f"\n{'here':22} {'told by':22} {'first within 5 % comes':>24}")
    for here, there in permutations(lands, 2):
        if here.kernel != there.kernel or here.device == there.device:
            continue
        known, told = times_of(here), times_of(there)
        order = sorted((config for config in told if config in known), key=told.__getitem__)
        line = min(known.values()) / 0.95
        place = next((place for place, config in enumerate(order, 1) if known[config] <= line), None)
        print(f"{here.name:22} {there.name:22} {place or 'never':>24}")


main(*sys.argv[1:])
