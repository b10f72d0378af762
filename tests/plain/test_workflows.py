"""The workflows and the forms of issues: GitHub reads them, and says nothing about an error before it is too late."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
yaml = pytest.importorskip("yaml")
if not (ROOT / ".github").is_dir():
    pytest.skip("the workflows are not here", allow_module_level=True)
WORKFLOWS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
FORMS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
CONFIG = FORMS.pop("config.yml")
JOBS = [
    pytest.param(workflow, name, job, id=f"{workflow}-{name}")
    for workflow, content in WORKFLOWS.items()
    for name, job in content["jobs"].items()
]
PUBLISHING = {"contents": "read", "id-token": "write", "attestations": "write"}


def steps(job):
    return job.get("steps", [])


def test_a_workflow_may_do_nothing_until_a_job_says_so():
    assert set(WORKFLOWS) >= {"test.yml", "wheel.yml", "release.yml"}
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {}, name
        # YAML takes the key `on` for a truth value. This trigger would give strangers the rights of the repository.
        assert "pull_request_target" not in workflow[True], name


@pytest.mark.parametrize(("workflow", "name", "job"), JOBS)
def test_a_job_may_read_and_only_the_release_may_publish(workflow, name, job):
    is_publishing = (workflow, name) == ("release.yml", "publish")
    assert job["permissions"] == (PUBLISHING if is_publishing else {"contents": "read"})
    assert ("environment" in job) == is_publishing
    assert "secrets" not in str(job)


@pytest.mark.parametrize(("workflow", "name", "job"), JOBS)
def test_actions_are_pinned_and_no_text_from_outside_becomes_a_command(workflow, name, job):
    if "uses" in job:
        assert job["uses"].removeprefix("./.github/workflows/") in WORKFLOWS
    text = (ROOT / ".github/workflows" / workflow).read_text("utf-8")
    for step in steps(job):
        assert ("uses" in step) != ("run" in step)
        assert "${{" not in step.get("run", ""), "pass it by `env`"
        if "uses" in step:
            assert re.search(rf"uses: {re.escape(step['uses'])} # v[\d.]+$", text, re.MULTILINE), step
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize(("workflow", "name", "job"), JOBS)
def test_what_a_job_needs_is_there(workflow, name, job):
    needed = job.get("needs", [])
    jobs = WORKFLOWS[workflow]["jobs"]
    assert {needed} if isinstance(needed, str) else set(needed) <= set(jobs)
    for step in steps(job):
        for path in re.findall(r"\b(?:python|bash) ([\w./]+(?:\.py|/run))", step.get("run", "")):
            assert (ROOT / path).is_file(), path
        for path in re.findall(r"\btests/[\w/]+\.py", step.get("run", "")):
            assert (ROOT / path).is_file(), path


def test_what_is_published_is_what_was_tested():
    """The wheel is built in one job, and each other job takes that one."""
    wheel = WORKFLOWS["wheel.yml"]["jobs"]
    uploaded = [step["with"]["name"] for step in steps(wheel["build"]) if "upload-artifact" in step.get("uses", "")]
    assert "wheel" in uploaded
    release = WORKFLOWS["release.yml"]["jobs"]
    assert release["publish"]["needs"] == "wheel"
    assert release["wheel"]["uses"] == WORKFLOWS["test.yml"]["jobs"]["wheel"]["uses"] == "./.github/workflows/wheel.yml"
    takers = [wheel["linux"], wheel["others"], release["publish"]]
    for job in takers:
        taken = [step["with"] for step in steps(job) if "download-artifact" in step.get("uses", "")]
        assert taken == [{"name": "wheel", "path": "dist"}]
        assert not any("build" in step.get("run", "") for step in steps(job))
    assert all(job.get("needs") == "build" for job in takers[:2])
    used = [step["uses"].partition("@")[0] for step in steps(release["publish"])]
    assert used == [
        "actions/download-artifact", "actions/attest-build-provenance", "pypa/gh-action-pypi-publish",
    ]  # fmt: skip


def test_every_python_and_platform_of_the_readme_is_tested():
    linux, others = (WORKFLOWS["wheel.yml"]["jobs"][name]["strategy"]["matrix"] for name in ("linux", "others"))
    readme = (ROOT / "README.md").read_text("utf-8")
    first, last = re.search(r"\| 3\.(\d+) to 3\.(\d+) \|", readme).groups()
    assert linux["python"] == [f"3.{minor}" for minor in range(int(first), int(last) + 1)]
    systems = {"ubuntu": "Linux (x86_64, aarch64)", "macos": "macOS", "windows": "Windows"}
    run = {*linux["os"], *others["os"], *(each["os"] for each in linux["include"])}
    assert {name.partition("-")[0] for name in run} == set(systems)
    assert any("arm" in name for name in run)
    assert all(text in readme for text in systems.values())


ELEMENTS = {
    "markdown": {"value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
    "input": {"label", "description", "placeholder", "value"},
    "dropdown": {"label", "description", "multiple", "options", "default"},
    "checkboxes": {"label", "description", "options"},
}
"""The elements of a form, and what each may have."""


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_form_is_one_that_github_shows(form):
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "body"}
    assert form["name"]
    assert form["description"]
    found = [element["id"] for element in form["body"] if "id" in element]
    assert len(found) == len(set(found))
    assert any(element["type"] != "markdown" for element in form["body"])
    for element in form["body"]:
        attributes = element["attributes"]
        assert set(element) <= {"type", "id", "attributes", "validations"}
        assert set(attributes) <= ELEMENTS[element["type"]]
        assert attributes["value" if element["type"] == "markdown" else "label"]
        assert re.fullmatch(r"[\w-]+", element.get("id", "none"))
        assert set(element.get("validations", {})) <= {"required"}
        assert len(set(attributes.get("options", ()))) == len(attributes.get("options", ()))


def test_the_forms_ask_for_the_output_of_doctor():
    assert set(FORMS) == {"bug.yml", "feature.yml", "question.yml"}
    assert CONFIG == {"blank_issues_enabled": False}
    for name, form in FORMS.items():
        (doctor,) = [element for element in form["body"] if element.get("id") == "doctor"]
        assert "numba-dequant doctor --json" in doctor["attributes"]["label"]
        assert doctor.get("validations", {}).get("required", False) == (name == "bug.yml")
    named = {form["name"] for form in FORMS.values()}
    assert set(re.findall(r"form \*([\w ]+)\*", (ROOT / "SUPPORT.md").read_text("utf-8"))) == named
