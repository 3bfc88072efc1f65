"""Following a job through everything that an API server does to its clients; the client is the real one."""

from __future__ import annotations

import threading

import pytest
from kube_double import DROP

from vitpipe.cluster import launcher
from vitpipe.cluster.launcher import run_job
from vitpipe.cluster.train_job import train_job
from vitpipe.contracts.errors import EngineError, InputError, RunError

NAME = "pretrain-x"


@pytest.fixture
def start(api, job, settings):
    """Runs the job of the fixtures; returns what was said."""

    def run(of=job, given=settings, is_usable=True):
        run_job(api, of, given, is_usable=lambda: is_usable, say=run.said.append)
        return run.said

    run.said = []
    return run


def succeeds(kube, *before):
    """A controller that does these steps, then completes the job."""

    def play(name):
        kube.put_pod("pod-0", name)
        kube.at_work(name)
        for step in before:
            step(name)
        kube.put_pod("pod-0", name, phase="Succeeded", exit_code=0, reason="Completed")
        kube.condition(name, "Complete", reason="AllJobsCompleted")

    kube.on_create = play


def test_a_job_is_created_followed_and_its_log_shown_once(kube, start):
    def work(name):
        kube.write_log("pod-0", "step 1", "step 2")
        kube.wait_for(lambda: kube.count("log"))
        kube.write_log("pod-0", "step 3")

    succeeds(kube, work)
    said = start()
    assert [line for line in said if line.startswith("step")] == ["step 1", "step 2", "step 3"]
    place = f"TrainJob {NAME} in namespace vit"
    assert said[0] == f"{place} was created"
    assert said[-1] == f"{place} is complete (AllJobsCompleted)" or said[-1].startswith("step")
    created = next(body for kind, body in kube.bodies if kind == "create")
    assert created["metadata"]["namespace"] == "vit"


def test_a_job_that_is_there_is_adopted_whatever_order_things_happen_in(kube, start, job):
    kube.create({**job, "metadata": {**job["metadata"]}})
    kube.condition(NAME, "Complete")
    said = start()
    assert "is there already and was adopted" in said[0]
    assert kube.count("create") == 0


def test_a_conflict_on_creation_leads_to_adoption(kube, start, job):
    """Its own first request got through, but the answer was lost."""
    succeeds(kube)
    real = kube.create

    def answer_lost(body):
        kube.create = real
        real(body)
        return 504, {"kind": "Status", "message": "gateway timeout"}

    kube.create = answer_lost
    said = start()
    assert any("Kubernetes answered 504 (gateway timeout); trying again" in line for line in said)
    assert any("was adopted" in line for line in said)
    assert kube.count("create") == 1


def test_another_launcher_was_faster(kube, start, job):
    succeeds(kube)
    real = kube.create

    def slower(body):
        kube.create = real
        real(body)
        return real(body)

    kube.create = slower
    assert any("was adopted" in line for line in start())


def test_somebody_elses_job_is_refused(kube, start, job):
    kube.create({**job, "metadata": {"name": NAME, "labels": {}}})
    with pytest.raises(InputError, match="vitpipe has not made"):
        start()
    assert NAME in kube.jobs
    assert kube.count("delete") == 0


def test_another_specification_at_work_is_refused_and_an_ended_one_made_again(kube, start, settings):
    other = train_job(NAME, settings.model_copy(update={"image": "older"}), ["vitpipe", "run", "pretrain"])
    kube.create(other)
    kube.at_work(NAME)
    with pytest.raises(InputError, match="with another specification") as caught:
        start()
    assert f"kubectl delete trainjob {NAME} -n vit" in str(caught.value)
    assert kube.count("delete") == 0
    kube.condition(NAME, "Failed")
    succeeds(kube)
    assert any("it is made again" in line for line in start())
    assert kube.jobs[NAME]["spec"]["trainer"]["image"] == settings.image


@pytest.mark.parametrize("end", ["Failed", "Complete"])
def test_an_ended_job_without_a_usable_result_is_made_again(kube, start, job, end):
    kube.create(job)
    kube.condition(NAME, end)
    first = kube.jobs[NAME]["metadata"]["uid"]
    succeeds(kube)
    start(is_usable=False)
    assert kube.jobs[NAME]["metadata"]["uid"] != first
    assert kube.count("create") == 1


def test_a_job_that_is_being_deleted_is_waited_for(kube, start, job):
    kube.create(job)
    kube.update(NAME, deletion=True)
    succeeds(kube)
    threading.Timer(1.0, kube.remove, [NAME]).start()
    said = start()
    assert sum("is being deleted" in line for line in said) == 1
    assert kube.count("delete") == 0
    assert kube.count("create") == 1


@pytest.mark.parametrize("fault", [410, DROP, 500, 429], ids=str)
def test_a_watch_that_breaks_is_begun_anew(kube, start, fault):
    def work(name):
        kube.wait_for(lambda: kube.count("watch") >= 3)

    kube.fail("watch", fault, fault)
    succeeds(kube, work)
    start()
    assert kube.count("list") >= 4  # before the creation, and for each watch


def test_a_version_that_the_server_has_forgotten_is_read_anew(kube, start):
    """The end of the job lies between the list and the watch, and its event is gone."""
    real = kube.listed

    def then_everything_is_compacted():
        found = real()
        if found["items"]:
            kube.listed = real
            kube.condition(NAME, "Complete")
            kube.forget_events()
            found["items"] = [{**item, "status": {}} for item in found["items"]]
        return found

    kube.listed = then_everything_is_compacted
    start()
    assert kube.count("watch") == 1
    assert kube.count("list") == 3


@pytest.mark.parametrize("kind", ["list", "create"])
def test_errors_of_the_server_pass(kube, start, kind):
    kube.fail(kind, 500, DROP, 503)
    succeeds(kube)
    said = start()
    # The client itself tries a broken connection again.
    assert sum("trying again" in line for line in said) >= 2


def test_a_server_that_stays_away_ends_the_launcher_and_not_the_job(kube, start, job, settings):
    kube.create(job)
    kube.at_work(NAME)
    kube.fail("list", None, *[503] * 50)
    with pytest.raises(EngineError, match="has not answered for 1 s") as caught:
        start(given=settings.model_copy(update={"unreachable_seconds": 1}))
    assert "adopts the job" in caught.value.fix
    assert kube.count("delete") == 0
    assert NAME in kube.jobs


@pytest.mark.parametrize(
    ("status", "kind", "part"),
    [
        (401, EngineError, "service account or a KUBECONFIG"),
        (403, EngineError, "service account create TrainJobs"),
        (404, EngineError, "install Kubeflow Trainer"),
        (422, InputError, "correct --job"),
    ],
)
def test_what_does_not_pass_ends_at_once_with_a_fix(kube, start, status, kind, part):
    kube.fail("create", status)
    with pytest.raises(kind) as caught:
        start()
    assert part in caught.value.fix
    assert f"the test asked for {status}" in str(caught.value)
    assert kube.count("create") == 1


def test_a_queue_and_a_pre_emption_are_said_and_the_job_goes_on(kube, start):
    def work(name):
        kube.condition(name, "Suspended", reason="Suspended", message="no quota")
        kube.wait_for(lambda: any("no quota" in line for line in start.said))
        taken = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        kube.put_pod("pod-1", name, index=1, phase="Failed", conditions=[taken], exit_code=143)
        kube.condition(name, "Suspended", status="False", reason="Resumed")
        kube.wait_for(lambda: any("was pre-empted" in line for line in start.said))

    succeeds(kube, work)
    said = "\n".join(start())
    assert "is suspended: it waits in its queue, or has lost its place there (Suspended: no quota)" in said
    assert said.count("the pod pod-1 was pre-empted: its node was tainted, as before a spot node goes") == 1
    assert "is complete" in said


@pytest.mark.parametrize(
    ("pod", "parts"),
    [
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
             "exit_code": 143},
            ["a pod of higher priority took its place", "it resumes from the saved state"],
        ),
        ({"exit_code": 137, "reason": "OOMKilled"}, ["out of memory: raise 'memory'"]),
        ({"exit_code": 2}, ["the stage refuses its input", "a retry meets the same"]),
    ],
)  # fmt: skip
def test_a_failed_job_says_why_and_what_to_do(kube, start, pod, parts):
    def fail(name):
        kube.put_pod("pod-0", name, phase="Failed", **pod)
        kube.write_log("pod-0", "last words")
        kube.condition(name, "Failed", reason="FailedJobs", message="jobset failed")

    kube.on_create = fail
    with pytest.raises(RunError) as caught:
        start()
    assert "last words" in start.said
    assert caught.value.exit_code == 1
    assert "has failed (FailedJobs: jobset failed)" in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_deadline_names_its_setting(kube, start):
    kube.on_create = lambda name: kube.condition(name, "Failed", reason="DeadlineExceeded")
    with pytest.raises(RunError, match="raise active_deadline_seconds"):
        start()


def test_a_job_that_somebody_deletes_ends_the_launcher(kube, start):
    def play(name):
        kube.wait_for(lambda: kube.count("watch"))
        kube.remove(name)

    kube.on_create = play
    with pytest.raises(RunError, match="deleted by somebody else"):
        start()


def test_a_job_that_takes_too_long_is_deleted(kube, start, settings):
    with pytest.raises(RunError, match=r"longer than time_limit_seconds \(1\)"):
        start(given=settings.model_copy(update={"time_limit_seconds": 1}))
    assert kube.jobs == {}


def test_a_log_survives_broken_connections_and_a_new_pod_without_a_line_twice(kube, start):
    def work(name):
        kube.write_log("pod-0", "a", "a", "b")
        kube.wait_for(lambda: kube.count("log") >= 4)
        # The pod of node 1 has a log of its own.
        kube.put_pod("pod-1", name, index=1)
        kube.write_log("pod-1", "not shown")
        kube.put_pod("pod-0", name, phase="Failed", exit_code=143)
        kube.put_pod("pod-0-again", name)
        kube.write_log("pod-0-again", "c")
        kube.wait_for(lambda: any("pod-0-again" in path for kind, path in kube.requests if kind == "log"))
        kube.put_pod("pod-0-again", name, phase="Succeeded", exit_code=0)

    kube.fail("log", DROP, 400, DROP)
    succeeds(kube, work)
    said = start()
    assert [line for line in said if not line.startswith("TrainJob")] == ["a", "a", "b", "c"]


def test_the_last_lines_are_shown_although_the_job_has_ended_before_they_came(kube, start, monkeypatch):
    monkeypatch.setattr(launcher, "_LAST_LINES_SECONDS", 60.0)

    def play(name):
        kube.put_pod("pod-0", name)
        kube.wait_for(lambda: kube.count("log"))
        kube.condition(name, "Complete")
        kube.write_log("pod-0", "the end")
        kube.put_pod("pod-0", name, phase="Succeeded", exit_code=0)

    kube.on_create = play
    assert "the end" in start()
