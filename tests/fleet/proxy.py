"""Optuna's gRPC proxy before a storage, in a process of its own, as long as somebody needs it."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

import optuna

from harness.shared import open_storage


@contextlib.contextmanager
def proxy(storage: str) -> Iterator[str]:
    """The address of a proxy before the storage at the address `storage`."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fleet.proxy", storage, str(port)], stderr=subprocess.DEVNULL
    )
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    optuna.storages.run_grpc_proxy_server(open_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
