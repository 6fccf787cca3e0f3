"""A real Ray cluster and a real PostgreSQL for the tests of this folder, both on the loopback address, both gone afterwards."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before ray is imported: nothing is reported to anybody, and nothing listens beyond the loopback address.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from harness import fleet
from harness.fleet_study import MODEL
from tests.fleet.postgres import postgres, programs


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'flashtune[fleet]'")
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql (tests/services.sh does it)")
    with postgres() as address:
        yield address


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with four accelerators, to which others can be added."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'flashtune[fleet]'")
    from ray.cluster_utils import Cluster

    own = {"include_dashboard": False, "node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "resources": {fleet.RESOURCE + MODEL: 4}, **own}
    )
    fleet.connect(found.address)
    try:
        yield found
    finally:
        fleet.disconnect()
        with contextlib.suppress(Exception):
            found.shutdown()
