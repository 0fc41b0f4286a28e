"""What deploy/ starts servers with: well-formed files, of commands that take the options they are given."""

from __future__ import annotations

import json
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from tiny_llm.commands.serve import app

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
ROOT = DEPLOY.parent
UNITS = ("tiny-llm@.service", "tiny-llm-gateway.service")


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8")))


def objects() -> dict[str, dict[str, Any]]:
    """Kubernetes' objects by kind and name."""
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def unit(name: str) -> dict[str, str]:
    """A systemd unit's settings."""
    text = (DEPLOY / name).read_text("utf-8").replace("\\\n", " ")
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))


def entry_point(dockerfile: str) -> list[str]:
    found = re.search(r"^ENTRYPOINT (.*)$", (DEPLOY / dockerfile).read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return list(json.loads(found[1]))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command that a file of deploy/ runs, by where it is said."""
    for name, service in compose()["services"].items():
        file = Path(service["build"]["dockerfile"]).name
        yield f"compose {name}", entry_point(file) + [word.replace("${", "") for word in service["command"]]
    for name, one in objects().items():
        for container in one["spec"].get("template", {"spec": {"containers": []}})["spec"]["containers"]:
            file = "Dockerfile.gateway" if "gateway" in name else "Dockerfile"
            yield f"kubernetes {name}", entry_point(file) + container["args"]
    for name in UNITS:
        yield name, shlex.split(unit(name)["ExecStart"].replace("%i", "8001"))
    yield "plist", plistlib.loads((DEPLOY / "tiny-llm.plist").read_bytes())["ProgramArguments"]


OURS = [pytest.param(words, id=where) for where, words in commands() if "serve" in words]
GATEWAYS = [pytest.param(words, id=where) for where, words in commands() if "launch" in words]


@pytest.mark.parametrize("words", OURS)
def test_serve_knows_the_options(words: list[str]) -> None:
    options = [re.sub(r"^TINY_LLM_\w+:-(.*)}$", r"\1", word) for word in words[words.index("serve") + 1 :]]
    given = typer.main.get_command(app).make_context("serve", options).params
    assert given["drain_seconds"] == 30


@pytest.mark.parametrize("words", GATEWAYS)
def test_smg_knows_the_options(words: list[str]) -> None:
    program = Path(sys.executable).with_name("smg")
    if not program.exists():
        pytest.skip("smg is not installed: the extra `test` has it")
    told = subprocess.run([program, "launch", "--help"], capture_output=True, text=True, timeout=60).stdout
    asked = {word for word in words if word.startswith("--")}
    assert {"--host", "--policy", "--worker-urls"} <= asked <= set(re.findall(r"--[a-z-]+", told))


def seconds(text: str | int) -> int:
    return int(str(text).removesuffix("s"))


def test_what_stops_a_server_waits_for_its_drain() -> None:
    drain = 30  # as test_serve_knows_the_options finds it everywhere
    waits = [service["stop_grace_period"] for service in compose()["services"].values()]
    pods = [one["spec"]["template"]["spec"] for one in objects().values() if "template" in one["spec"]]
    waits += [pod["terminationGracePeriodSeconds"] for pod in pods]
    waits += [unit(name)["TimeoutStopSec"] for name in UNITS]
    waits += [plistlib.loads((DEPLOY / "tiny-llm.plist").read_bytes())["ExitTimeOut"]]
    assert len(waits) == 8 and all(seconds(wait) > drain + 4 for wait in waits), waits


def test_the_images_have_all_that_they_copy() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    copied = [
        word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    let_in = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert copied and all((ROOT / name).exists() and f"!{name}" in let_in for name in copied)


def test_compose_starts_servers_before_their_gateway() -> None:
    services = compose()["services"]
    urls = {word for word in services["gateway"]["command"] if word.startswith("http")}
    servers = services.keys() - {"gateway"}
    assert urls == {f"http://{name}:8000" for name in servers} and len(urls) == 2
    assert services["gateway"]["depends_on"].keys() == servers
    for one in services.values():
        assert one["restart"] == "unless-stopped" and one["healthcheck"]["test"][0] == "CMD"
        compile(one["healthcheck"]["test"][-1], "healthcheck", "exec")
    assert all(port.startswith("127.0.0.1:") for port in services["gateway"]["ports"])


def test_docker_reads_the_compose_file() -> None:
    docker = shutil.which("docker")
    found = docker and subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60)
    if not found or found.returncode:
        pytest.skip("docker compose is not there")
    command = [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_kubernetes_knows_each_field() -> None:
    for one in objects().values():
        kubernetes_validate.validate(one, "1.37", strict=True)


def test_kubernetes_asks_our_health_and_finds_the_servers() -> None:
    found = objects()
    servers, gateway = found["StatefulSet/tiny-llm"]["spec"], found["Deployment/tiny-llm-gateway"]["spec"]
    [server], [smg] = (one["template"]["spec"]["containers"] for one in (servers, gateway))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert server["resources"]["limits"]["memory"] and server["resources"]["requests"]["cpu"]
    urls = [word for word in smg["args"] if word.startswith("http")]
    assert urls == [f"http://tiny-llm-{n}.{servers['serviceName']}:8000" for n in range(servers["replicas"])]
    for spec in (servers, gateway):
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    for service, spec in (("tiny-llm-replicas", servers), ("tiny-llm", gateway)):
        assert found[f"Service/{service}"]["spec"]["selector"] == spec["selector"]["matchLabels"]


@pytest.mark.parametrize("name", UNITS)
def test_systemd_knows_each_setting(name: str, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not there")
    for other in UNITS:  # with a program that is there
        text = re.sub(
            r"^ExecStart=\S+", f"ExecStart={sys.executable}", (DEPLOY / other).read_text("utf-8"), flags=re.M
        )
        for number in ("8001", "8002"):
            (tmp_path / other.replace("@", f"@{number}")).write_text(text, "utf-8")
    command = [program, "verify", "--man=no", str(tmp_path / name.replace("@", "@8001"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "tiny-llm" in line]
    assert not ours, ours


def test_launchd_gets_a_list_of_its_own_keys() -> None:
    told = plistlib.loads((DEPLOY / "tiny-llm.plist").read_bytes())
    kinds: dict[str, type | Sequence[type]] = {
        "Label": str,
        "ProgramArguments": list,
        "RunAtLoad": bool,
        "KeepAlive": bool,
        "ThrottleInterval": int,
        "ExitTimeOut": int,
        "StandardErrorPath": str,
    }
    assert told.keys() == kinds.keys() and all(isinstance(told[key], kind) for key, kind in kinds.items())
