"""A PostgreSQL that is there as long as somebody needs it: its own folder, on the loopback address only.

`python -m tests.fleet.postgres COMMAND...` runs a command with `{storage}` in it replaced by the address of one.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# PostgreSQL refuses to run as root; Debian's package makes this user.
_USER = "postgres"


def programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`, or None where no PostgreSQL is installed (or none that root may start)."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folder = next((one for one in folders if (one / "pg_ctl").exists()), None)
    if folder is None or os.getuid() != 0:
        return folder
    with contextlib.suppress(KeyError):
        pwd.getpwnam(_USER)
        return folder
    return None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A server, by the address that `--storage` takes."""
    found = programs()
    if found is None:
        raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="flashtune-postgres-") as made, _free_port() as port:
        folder = Path(made)
        if os.getuid() == 0:
            shutil.chown(folder, _USER)
        data, secret = folder / "data", folder / "secret"
        secret.write_text("once\n")
        secret.chmod(0o644)
        _run(found / "initdb", "-D", data, "-U", "flashtune", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        _run(found / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        try:
            yield f"postgresql://flashtune:once@127.0.0.1:{port}/postgres"
        finally:
            _run(found / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    yield port


def _run(*words: str | Path) -> None:
    command = [str(word) for word in words]
    if os.getuid() == 0:
        command = ["runuser", "-u", _USER, "--", *command]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    with postgres() as address:
        sys.exit(subprocess.run([word.replace("{storage}", address) for word in sys.argv[1:]]).returncode)
