"""Notebooks of several data sets: nbval runs the first, here the demo runs on the others."""

import pytest
from tolerances import claim_differences

from support import claims, run, stored

JOBS = run.jobs_of("demo", run.choose([]))
OTHERS = [job for job in JOBS if job.dataset not in (None, claims.DEFAULT)]


@pytest.mark.parametrize("job", OTHERS, ids=[job.name for job in OTHERS])
def test_the_demo_on_its_other_data_sets(job, tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_RUNS", str(tmp_path))
    run.run(job.path, tmp_path / f"{job.name}.ipynb", job.parameters)
    name = f"{job.number}_verdicts.json"
    fresh = claims.read_record(stored.folder("runs", "demo", "figures") / name)
    committed = claims.read_record(claims.committed("demo") / name)
    assert not claim_differences(committed, fresh, job.dataset)


def test_there_are_others():
    assert {job.dataset for job in OTHERS} >= {"digits"}
