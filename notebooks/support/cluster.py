"""Independent work on many machines: refits, seeds, attacks, and notebooks with other parameters.

`distributed` (Dask) hands out the tasks, tries again what failed and replaces workers that died.
A task that keeps what it has finished (`stored.checkpoint`, a finished notebook) loses nothing.
"""

import hashlib
import json
import os
from pathlib import Path
from unittest.mock import patch

import dask
from distributed import Client, as_completed
from tqdm.auto import tqdm

from support import run


def connect(scheduler=None, *, security=None):
    """Return a client of the scheduler at an address, by default of a cluster on this machine.

    The latter has one process a core and one thread a process, listens on this machine alone, has
    no dashboard, and ends with the client. Workers elsewhere are started in a copy of this project:
    `.venv/bin/dask worker ADDRESS --nthreads 1`. Whoever reaches a scheduler can run code on its
    workers: keep it behind a firewall, or use `tls://`. security : `distributed.Security` with the
    certificates.
    """
    if scheduler is not None:
        return Client(scheduler, timeout=10, security=security)
    for part in ("scheduler", "worker"):  # for good: a worker that died is replaced later
        dask.config.set({f"distributed.{part}.http.routes": []})
    size = {"n_workers": os.cpu_count(), "threads_per_worker": 1}
    client = Client(**size, host="127.0.0.1", dashboard_address=None)
    client.cluster.scheduler.http_server.stop()  # it would listen at 127.0.0.1:8787 all the same
    return client


def spread(client, function, pieces, *, retries=2, description="tasks"):
    """Return [function(piece) for piece in pieces], each piece a task, with a progress bar.

    A task that raises is tried again `retries` times; then its error is raised here and the others
    are cancelled. `function` travels by value: let it build the objective it works on.
    """
    futures = client.map(function, pieces, retries=retries, pure=False)
    bar = tqdm(as_completed(futures), description, len(futures), unit="task", leave=False)
    try:
        found = {future.key: future.result() for future in bar}
    finally:
        client.cancel(futures)
    return [found[future.key] for future in futures]


def sweep(client, notebook, settings, folder):
    """Run a notebook once with each dict of parameters; return the paths of the executed ones.

    NAME-CHECKSUM.ipynb stands for a notebook and its parameters: one that is there is not run
    again. Its figures and verdicts go to the folder of the same name, NAME-CHECKSUM/.
    """
    source, folder = Path(notebook).resolve(), Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for parameters in map(run.plain, settings):
        text = source.read_bytes() + json.dumps(parameters, sort_keys=True).encode()
        name = f"{source.stem}-{hashlib.sha256(text).hexdigest()[:12]}.ipynb"
        jobs.append((source, folder / name, parameters))
    left = [job for job in jobs if not job[1].exists()]
    spread(client, _run, left, description=source.stem)
    return [target for _, target, _ in jobs]


def _run(job):
    source, target, parameters = job
    with patch.dict(os.environ, THESIS_RUNS=str(target.with_suffix(""))), run.alone(target):
        if not target.exists():  # another process may have run it meanwhile
            run.run(source, target, parameters)
