"""Deployment files: the Dockerfile passes its linter, the manifests are valid, and their commands exist."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from babydoctor.serve.settings import load_settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "configs" / "deploy"
GRACE_S = 10


def run(*command: str) -> None:
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}") or shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed (pip install 'babydoctor[dev]')")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, cwd=DEPLOY)
    assert done.returncode == 0, done.stdout + done.stderr


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def commands() -> dict[str, list[str]]:
    """The arguments of every container, each with a name for the test."""
    found = {f"compose-{name}": service["command"] for name, service in compose().items()}
    for manifest in manifests():
        if manifest["kind"] == "Deployment":
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            found[f"kubernetes-{container['name']}"] = container["args"]
    return found


def test_the_dockerfile_is_linted() -> None:
    run("hadolint", "Dockerfile")


def test_the_manifests_are_valid() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    run("kubernetes-validate", "--strict", "kubernetes.yaml")


@pytest.mark.parametrize("name", sorted(commands()))
def test_all_commands_and_settings_exist(name: str) -> None:
    command, *arguments = commands()[name]
    program = "import sys; from babydoctor.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program, command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option in done.stdout, option
    settings = [argument for argument in arguments if "=" in argument]
    loaded = load_settings(None, settings)
    assert part_host(loaded, command) == "0.0.0.0"


def part_host(settings: Any, command: str) -> str:
    return str(getattr(settings, {"web": "page"}.get(command, command)).host)


def test_a_worker_has_time_to_drain() -> None:
    drain = load_settings(None).worker.drain_s + GRACE_S
    assert float(compose()["worker"]["stop_grace_period"].removesuffix("s")) >= drain
    (worker,) = [m for m in manifests() if m["kind"] == "Deployment" and m["metadata"]["name"] == "worker"]
    assert worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= drain


def test_workers_export_the_autoscalers_metric() -> None:
    (scaler,) = [m for m in manifests() if m["kind"] == "HorizontalPodAutoscaler"]
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    source = (ROOT / "babydoctor/serve/worker/backend.py").read_text()
    assert f'gauge("{name.removeprefix("babydoctor_")}"' in source
