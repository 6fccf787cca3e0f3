"""A tuner to be killed: it says when its second candidate hangs. Usage: parent.py FOLDER"""

import sys
from contextlib import closing
from pathlib import Path

from harness.store import open_journal
from harness.tune import Budget, tune
from tests.faults.injected import CALM, IDENTITY, configs, runner_in, task_of

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    order = configs("hang on the device", CALM)
    with runner_in(folder, value_s=600) as runner, closing(open_journal(folder / "run.jsonl", IDENTITY)) as journal:
        events = tune(task_of(order), runner, journal, budget=Budget(trials=len(order)), seed=0)
        for event in events:
            if event.record.trial == 0:
                sys.stdout.write("hanging\n")
                sys.stdout.flush()
