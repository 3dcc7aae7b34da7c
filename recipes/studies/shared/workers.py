"""The worker processes of a study: specs without a row are run, and rows appended as they come."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection
from typing import Any

from tqdm import tqdm

from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import run

# The arm's options are part of what a run is: an arm that was changed under its name is run again.
KEY = ("study", "task", "arm", "options", "seed", "max_steps", "steps_per_generation", "learning_rate")


def never() -> bool:
    return False


def execute(
    specs: Sequence[Any],
    ledger: Ledger,
    workers: int,
    time_is_up: Callable[[], bool] = never,
    run: Callable[[Any], dict[str, Any]] = run,
) -> int:
    """
    Run the specs that have no row yet, and append their rows as they come. Arms that cannot run again are left out.

    Args:
        specs (`Sequence[RunSpec]`, or what `run` takes): in the order in which they are started.
        ledger (`Ledger`): where the rows go.
        workers (`int`): processes, one thread each.
        time_is_up (`Callable`): once it is true no further run is started, and those that are running end.
        run (`Callable`): makes the row of a spec.

    Returns:
        `int`: how many were run.
    """
    done = ledger.done()
    keys = [ledger.key_of({**vars(spec), "options": json.dumps(spec.definition.key)}) for spec in specs]
    todo = [spec for spec, key in zip(specs, keys, strict=True) if key not in done and not spec.definition.removed]
    # Read by torch when a worker starts.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Workers live to the end: replacing them deadlocks (max_tasks_per_child, python/cpython#115634).
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    progress = tqdm(total=len(specs), initial=len(specs) - len(todo), unit="run", smoothing=0.05)
    count, waiting = 0, iter(todo)
    running: set[Future[dict[str, Any]]] = set()
    with pool, progress:
        while True:
            while len(running) < workers and not time_is_up() and (spec := next(waiting, None)) is not None:
                running.add(pool.submit(run, spec))
            if not running:
                return count
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                row = future.result()
                ledger.append(row)
                progress.set_postfix_str(f"{row['task']} {row['arm']} reward {row['auc']:.3f}")
                progress.update()
                count += 1


def _start_worker() -> None:
    """One thread, no line of its own from every trainer that is built, and an end when the study is killed."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """A pool's worker does not notice that its parent was killed: it would wait for work, for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)
