"""The examples in docs/deploy are what they say: syntax, the commands and settings that they name, their bounds."""

import datetime as dt
import http.server
import json
import re
import shlex
import shutil
import subprocess
import threading
from importlib.resources import files
from pathlib import Path
from zoneinfo import ZoneInfo

import kubernetes_validate
import pytest
import typer
import yaml
from cronsim import CronSim
from jsonschema.validators import validator_for

from outbox.cli import app
from outbox.settings import Settings, load

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs/deploy"
UNITS = sorted([*DEPLOY.glob("*/*.service"), *DEPLOY.glob("*/*.timer")])
MANIFESTS = [
    document for path in sorted(DEPLOY.glob("kubernetes/*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
PAGES = [ROOT / "docs" / page for page in ("deploy.md", "aws.md", "roles.md")]
DRAIN_S = Settings().drain_s
NOW = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)
COMMANDS = typer.main.get_command(app).commands
SECRETS = {"OUTBOX_DATABASE_URL": "postgresql://db/app", "OUTBOX_SMTP_URL": "smtp://mail:25"}


def takes(*words):
    """Whether `outbox` has this command with these options and arguments; raises click's sentence if not."""
    command = COMMANDS[words[0]]
    return command.make_context(words[0], list(words[1:])) is not None


def seconds(text):
    """A time span of systemd's or compose's, of one unit."""
    number, unit = re.fullmatch(r"(\d+)(s|min|m|h|)", str(text)).groups()
    return int(number) * {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}[unit]


# ── everywhere ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_settings_of_the_examples_and_pages_load(tmp_path):
    settings = load(DEPLOY / "outbox.toml", SECRETS)
    assert list(settings.reports) == ["progress"]
    blocks = [
        b for page in PAGES for b in re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        (tmp_path / "outbox.toml").write_text(block)
        load(tmp_path / "outbox.toml", {})


def test_every_variable_that_is_named_is_a_setting():
    of_a_script = {"METADATA_URL", "SCALE_IN_EVERY_S"}
    known = {key.upper() for key in Settings.model_fields} | {"CONFIG", "HTTP"} | of_a_script
    for path in [*DEPLOY.rglob("*"), *PAGES]:
        if path.is_file():
            named = set(re.findall(r"\bOUTBOX_([A-Z_]*[A-Z])\b", path.read_text()))
            assert {name.removesuffix("_FILE") for name in named} <= known, path


def test_every_command_in_the_pages_is_one_of_ours():
    for page in PAGES:
        text = page.read_text()
        shown = re.findall(r"^\$ (?:\w+=\S+ )*outbox (.*)$", text, re.MULTILINE)
        named = re.findall(r"`outbox ([a-z][^`…]*)`", text)
        for line in [*shown, *named]:
            words = shlex.split(re.split(r" (?:\||2?>)", line)[0])
            assert words[0] in COMMANDS, line
            assert len(words) == 1 or takes(*words), line


# ── cron ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_line_of_the_crontab_is_a_time_a_user_and_a_command_of_ours():
    lines = [line for line in (DEPLOY / "crontab").read_text().splitlines() if line and not line.startswith("#")]
    jobs = [line.split(maxsplit=7) for line in lines if not re.match(r"[A-Z_]+=\S", line)]
    assert len(jobs) == 3
    for *when, user, program, rest in jobs:
        CronSim(" ".join(when), NOW)
        assert user == "outbox"
        assert program.endswith("/bin/outbox")
        assert takes(*shlex.split(rest))
        assert "%" not in rest  # cron makes a line break of it


# ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────

MANY = {"Environment", "LoadCredential", "SystemCallFilter"}  # may be given more than once
HARDENING = {
    "CapabilityBoundingSet": "", "AmbientCapabilities": "", "NoNewPrivileges": "yes", "ProtectSystem": "strict",
    "ProtectHome": "yes", "PrivateTmp": "yes", "PrivateDevices": "yes", "ProtectProc": "invisible", "ProcSubset": "pid",
    "ProtectClock": "yes", "ProtectHostname": "yes", "ProtectControlGroups": "yes", "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes", "ProtectKernelTunables": "yes", "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes", "RestrictSUIDSGID": "yes", "LockPersonality": "yes", "MemoryDenyWriteExecute": "yes",
    "SystemCallArchitectures": "native", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6", "UMask": "0077",
}  # fmt: skip
KNOWN = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec", "StartLimitBurst", "ConditionDirectoryNotEmpty"},
    "Service": {
        "Type", "NotifyAccess", "ExecStart", "TimeoutStartSec", "TimeoutStopSec", "Restart", "RestartSec",
        "RestartPreventExitStatus", "WatchdogSec", "WatchdogSignal", "KillMode", "SystemCallErrorNumber",
        "SuccessExitStatus", "MemoryMax", "TasksMax", "Nice", "User", "DynamicUser", "ReadWritePaths",
        *MANY, *HARDENING,
    },
    "Timer": {"OnCalendar", "AccuracySec", "RandomizedDelaySec", "Persistent"},
    "Install": {"WantedBy"},
}  # fmt: skip


def unit(path):
    """A unit's sections, strictly: known sections, known keys, none twice but for lists."""
    found, section = {}, None
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
            assert section in KNOWN
            assert section not in found, line
            found[section] = {}
            continue
        key, equals, value = line.partition("=")
        assert equals, line
        assert key in KNOWN[section], line
        assert key in MANY or key not in found[section], line
        found[section].setdefault(key, []).append(value)
    return {name: {k: v if k in MANY else v[0] for k, v in keys.items()} for name, keys in found.items()}


def test_the_units_are_units_of_systemd_and_run_our_commands(tmp_path):
    for path in UNITS:
        parts = unit(path)
        started = parts.get("Service", {}).get("ExecStart", "")
        if started.startswith("/opt/outbox/bin/outbox "):
            assert takes(*started.split()[1:])
        # Where there are neither our programs nor a manager, `verify` still judges every key and value.
        runnable = path.read_text().replace(started or "\0", "/bin/true").replace("User=reports", "User=root")
        (tmp_path / path.name).write_text(runnable)
    if shutil.which("systemd-analyze"):
        for path in UNITS:
            done = subprocess.run(
                ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", tmp_path / path.name],
                capture_output=True,
                text=True,
                check=False,
            )
            assert not [line for line in done.stderr.splitlines() if path.name in line], done.stderr
    when = unit(DEPLOY / "systemd/outbox-generate.timer")["Timer"]["OnCalendar"]
    days, zone = re.fullmatch(r"(Mon) \*-\*-\* 06:00:00 (\S+)", when).groups()
    assert (days, ZoneInfo(zone)) == ("Mon", load(DEPLOY / "outbox.toml", {}).reports["progress"].zone)


def services():
    """The units that run a command of ours, by its name."""
    paths = (DEPLOY / "systemd").glob("*.service")
    return {path.stem.removeprefix("outbox-"): unit(path)["Service"] for path in paths}


def test_the_services_are_hardened_and_the_relay_has_the_time_to_finish():
    assert set(services()) == {"relay", "generate", "web", "bounce"}
    for name, service in services().items():
        assert HARDENING.items() <= service.items(), name
        assert service["SystemCallFilter"] == ["@system-service", "~@privileged"]
        loaded = {one.partition(":")[0] for one in service["LoadCredential"]}
        given = {one.partition("=%d/")[2] for one in service["Environment"] if "=%d/" in one}
        assert loaded == given
    relay, generate, web, bounce = (services()[name] for name in ("relay", "generate", "web", "bounce"))
    for service in (relay, generate, web):
        assert service["DynamicUser"] == "yes"
        assert service["RestartPreventExitStatus"] == "2"
    assert (relay["Type"], relay["NotifyAccess"], relay["Restart"]) == ("notify", "main", "always")
    assert seconds(relay["WatchdogSec"]) > 3 * Settings().lease_s
    assert seconds(relay["TimeoutStopSec"]) > DRAIN_S + 5
    assert seconds(relay["TimeoutStartSec"]) > 2 * Settings().lease_s
    assert (generate["Type"], generate["Restart"]) == ("oneshot", "on-failure")
    assert (web["Type"], web["Restart"]) == ("exec", "always")
    assert seconds(web["TimeoutStopSec"]) > DRAIN_S + 5
    # Maildir messages are moved, so the mailbox's owner runs this; and nothing else of the disk can be written.
    assert bounce["User"] not in ("root", "")
    assert bounce["ExecStart"].endswith(f" {bounce['ReadWritePaths']}")
    condition = unit(DEPLOY / "systemd/outbox-bounce.service")["Unit"]["ConditionDirectoryNotEmpty"]
    assert condition == f"{bounce['ReadWritePaths']}/new"
    assert (bounce["Type"], bounce["SuccessExitStatus"]) == ("oneshot", "1")


def test_every_service_has_a_bound_on_its_memory_which_is_that_of_its_pod():
    for path in UNITS:
        if path.suffix == ".service":
            service = unit(path)["Service"]
            assert re.fullmatch(r"[1-9]\d+M", service["MemoryMax"]), path
            assert int(service["TasksMax"]) > 0
    memory = {pod["containers"][0]["name"]: pod["containers"][0]["resources"]["limits"]["memory"] for pod in pods()}
    assert (memory["relay"], memory["web"]) == ("256Mi", "256Mi")
    for name, service in services().items():
        assert service["MemoryMax"] + "i" == memory.get(name, "256Mi"), name


def test_the_exposed_services_open_no_board_and_no_role_but_their_own():
    web, bounce = services()["web"], services()["bounce"]
    assert web["ExecStart"].split()[1:] == ["web", "--pages-only"]
    for name, service in (("web", web), ("bounce", bounce)):
        assert service["LoadCredential"] == [f"database_url:/etc/outbox/{name}_database_url"]


# ── Docker ───────────────────────────────────────────────────────────────────────────────────────────────────────────

INSTRUCTIONS = {
    "ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD",
}  # fmt: skip


def dockerfile():
    """The instructions of the two stages."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.split(maxsplit=1) for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line]
    assert {name for name, _ in lines} <= INSTRUCTIONS
    final = max(number for number, (name, _) in enumerate(lines) if name == "FROM")
    return lines[:final], lines[final:]


def test_the_image_is_small_runs_as_nobody_and_copies_what_is_there():
    build, final = dockerfile()
    for name, said in build:
        if name == "COPY":
            *sources, _ = said.split()
            assert all((ROOT / source).exists() for source in sources), said
    last = dict(final)
    assert last["USER"] == "10001:10001"
    assert last["COPY"] == "--from=build /opt/outbox /opt/outbox"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) == ["outbox"]
    assert takes(*json.loads(last["CMD"]))
    check = json.loads(last["HEALTHCHECK"].partition(" CMD ")[2])
    assert check[:2] == ["python", "-c"]
    compile(check[2], "healthcheck", "exec")
    (port,) = re.findall(r"127.0.0.1:(\d+)/livez", check[2])
    assert f"OUTBOX_HTTP=0.0.0.0:{port}" in last["ENV"]
    assert last["EXPOSE"] == port
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert (DEPLOY / compose["x-outbox"]["build"]["context"]).resolve() == ROOT


def test_the_image_installs_nothing_from_the_index_without_a_hash():
    installs = [
        call
        for name, said in dockerfile()[0]
        if name == "RUN"
        for call in re.split(r"\s*&&\s*", said)
        if re.search(r"/pip (--python \S+ )?(install|wheel)", call)
    ]
    assert len(installs) == 4
    for call in installs:
        if "--require-hashes" in call:
            assert "--only-binary :all:" in call  # no compiler, and no code of a package that runs before it is needed
            (listed,) = re.findall(r" -r (\S+)", call)
            assert any(name == "COPY" and listed in said for name, said in dockerfile()[0])
        else:
            # Our own source, and the wheels that were made before.
            assert "--no-deps" in call
            assert "--no-build-isolation" in call or "--no-index" in call


def test_every_image_is_named_by_a_digest_or_the_build_stops(tmp_path):
    build, final = dockerfile()
    assert build[:3] == [["ARG", "PYTHON_IMAGE"], ["FROM", "${PYTHON_IMAGE} AS build"], ["ARG", "PYTHON_IMAGE"]]
    assert final[0] == ["FROM", "${PYTHON_IMAGE}"]
    assert build[3][0] == "RUN"  # before anything is installed
    for image, code in ((f"python:3.13-slim@sha256:{'a' * 64}", 0), ("python:3.13-slim", 1), ("", 1)):
        done = subprocess.run(["sh", "-c", build[3][1]], env={"PYTHON_IMAGE": image}, capture_output=True, check=False)
        assert done.returncode == code, image
    compose = (DEPLOY / "compose.yaml").read_text()
    wanted = set(re.findall(r"\$\{([A-Z_]+):\?run docs/deploy/pin-images\}", compose))
    assert [line for line in re.findall(r"(?m)^ +image: (.*)$", compose) if not line.startswith("${")] == ["outbox"]
    assert "/.env" not in (ROOT / ".gitignore").read_text()  # it belongs to the repository of those who deploy
    # With a docker that knows every image, pin-images writes what Compose asks for; without a digest, nothing.
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\necho sha256:{'b' * 64}\n")
    docker.chmod(0o755)
    script = tmp_path / "deploy/pin-images"
    script.parent.mkdir()
    shutil.copy(DEPLOY / "pin-images", script)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run([script], env=environment, check=True, capture_output=True)
    lines = (script.parent / ".env").read_text().splitlines()
    assert {line.partition("=")[0] for line in lines} == wanted
    assert all(line.endswith(f"@sha256:{'b' * 64}") for line in lines)
    docker.write_text("#!/bin/sh\nexit 1\n")
    failed = subprocess.run([script], env=environment, capture_output=True, check=False)
    assert failed.returncode != 0
    assert (script.parent / ".env").read_text().splitlines() == lines


def test_the_composition_is_one_and_the_relays_have_the_time_to_finish():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    validator_for(schema)(schema).validate(compose)
    services = compose["services"]
    assert services["relay"]["deploy"]["replicas"] == 3
    assert seconds(services["relay"]["stop_grace_period"]) > DRAIN_S + 5
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services)
        if name not in ("postgres", "mail"):
            assert takes(*service["command"])
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
            assert re.fullmatch(r"\d+m", service["mem_limit"])
            settings = load(DEPLOY / compose["configs"]["settings"]["file"], service["environment"])
            assert settings.smtp_url is not None
            assert settings.smtp_url.name == "mail:1025"
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists()


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def of_kind(name):
    return [one for one in MANIFESTS if one["kind"] == name]


def kind(name):
    (found,) = of_kind(name)
    return found


def workloads():
    """Return the manifests that run pods."""
    return [*of_kind("Job"), *of_kind("Deployment"), *of_kind("CronJob")]


def template(workload):
    spec = workload["spec"]
    return spec["jobTemplate"]["spec"]["template"] if workload["kind"] == "CronJob" else spec["template"]


def pods():
    """The pod of each workload."""
    return [template(one)["spec"] for one in workloads()]


def deployment(name):
    (found,) = [one["spec"] for one in of_kind("Deployment") if one["metadata"]["name"] == name]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_manifests_are_valid_and_name_what_is_there():
    for manifest in MANIFESTS:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    assert kind("ConfigMap")["data"]["outbox.toml"] == (DEPLOY / "outbox.toml").read_text()
    secret = kind("Secret")["stringData"]
    for pod in pods():
        (container,) = pod["containers"]
        assert takes(*container["args"])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        items = {item["path"]: item["key"] for item in volumes["secrets"]["secret"]["items"]}
        places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert places["settings"] == "/etc/outbox"
        given = {one["name"]: one["value"] for one in container["env"] if one["name"].endswith("_FILE")}
        assert {f"{places['secrets']}/{path}" for path in items} == set(given.values())
        urls = {name.removesuffix("_FILE"): secret[items[Path(at).name]] for name, at in given.items()}
        load(DEPLOY / "outbox.toml", urls).require("database_url")
        variables = {one["name"]: one["value"] for one in container["env"] if not one["name"].endswith("_FILE")}
        load(DEPLOY / "outbox.toml", {name: value for name, value in variables.items() if name != "OUTBOX_HTTP"})
    for one in of_kind("Deployment"):
        spec = one["spec"]
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert kind("PodDisruptionBudget")["spec"]["selector"] == deployment("outbox-relay")["selector"]
    assert kind("Service")["spec"]["selector"] == deployment("outbox-web")["selector"]["matchLabels"]
    (port,) = kind("Service")["spec"]["ports"]
    assert port["targetPort"] in [
        one["name"] for one in deployment("outbox-web")["template"]["spec"]["containers"][0]["ports"]
    ]


def test_the_pods_are_hardened_and_the_relay_has_the_time_to_finish():
    for pod in pods():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        for volume in pod["volumes"]:
            assert set(volume) <= {"name", "configMap", "secret"}
    relay = deployment("outbox-relay")["template"]["spec"]
    assert deployment("outbox-web")["template"]["spec"]["terminationGracePeriodSeconds"] > DRAIN_S + 5
    (container,) = relay["containers"]
    assert relay["terminationGracePeriodSeconds"] > DRAIN_S + 5
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    (port,) = container["ports"]
    assert {"name": "OUTBOX_HTTP", "value": f"0.0.0.0:{port['containerPort']}"} in container["env"]
    cron = kind("CronJob")["spec"]
    assert ZoneInfo(cron["timeZone"]) == load(DEPLOY / "outbox.toml", {}).reports["progress"].zone
    CronSim(cron["schedule"], NOW)


def test_no_two_parts_share_a_secret_and_the_pages_have_no_board():
    read = {}
    for workload in workloads():
        pod = template(workload)["spec"]
        (secrets,) = [volume["secret"]["items"] for volume in pod["volumes"] if "secret" in volume]
        for item in secrets:
            assert item["key"] not in read, item
            read[item["key"]] = workload["metadata"]["name"]
    assert read["web"] == "outbox-web"
    (web,) = deployment("outbox-web")["template"]["spec"]["containers"]
    assert web["args"] == ["web", "--pages-only"]


def test_every_image_of_a_pod_is_named_by_a_digest_that_is_yours_to_fill_in():
    for pod in pods():
        (container,) = pod["containers"]
        assert re.fullmatch(r"registry\.example\.com/outbox@sha256:0{64}", container["image"])


def chosen(policy, labels):
    """Return True if a policy, or a selector of one of its peers, matches pods with these labels."""
    return policy["matchLabels"].items() <= labels.items()


def test_the_network_policies_let_in_and_out_what_each_part_needs_and_no_more():
    policies = of_kind("NetworkPolicy")
    allowed = {}
    for workload in workloads():
        labels = template(workload)["metadata"]["labels"]
        mine = [one["spec"] for one in policies if chosen(one["spec"]["podSelector"], labels)]
        # Both directions are closed by some policy, so only what is listed passes.
        assert {kind for one in mine for kind in one["policyTypes"]} == {"Ingress", "Egress"}
        allowed[workload["metadata"]["name"]] = {
            way: sorted(
                f"{port['protocol']}/{port['port']}"
                for one in mine
                for rule in one.get(way, [])
                for port in rule["ports"]  # a rule without ports is one for all of them
            )
            for way in ("ingress", "egress")
        }
        for one in mine:
            for rule in [*one.get("ingress", []), *one.get("egress", [])]:
                assert rule.get("from") or rule.get("to"), "a rule without peers is one for everybody"
    base = ["TCP/53", "TCP/5432", "UDP/53"]
    assert allowed == {
        "outbox-init": {"ingress": [], "egress": base},
        "outbox-generate": {"ingress": [], "egress": base},
        "outbox-relay": {"ingress": ["TCP/9464"], "egress": sorted([*base, "TCP/587"])},
        "outbox-web": {"ingress": ["TCP/8025"], "egress": base},
    }
    (smtp,) = [
        peer["ipBlock"] for one in policies for rule in one["spec"].get("egress", []) for peer in rule["to"]
        if rule["ports"] == [{"protocol": "TCP", "port": 587}]
    ]  # fmt: skip
    for private in ("10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8"):
        assert private in smtp["except"]
    assert ":587" in kind("Secret")["stringData"]["smtp"]
    listening = {
        template(one)["metadata"]["labels"]["app.kubernetes.io/component"]: port["containerPort"]
        for one in workloads() for port in template(one)["spec"]["containers"][0].get("ports", [])
    }  # fmt: skip
    assert listening == {"relay": 9464, "web": 8025}


# ── AWS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_scale_in_stops_the_timer_and_the_relay_when_it_comes_and_not_before(tmp_path):
    script = DEPLOY / "aws/outbox-scale-in"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert unit(DEPLOY / "aws/outbox-scale-in.service")["Service"]["ExecStart"].endswith("/outbox-scale-in")
    if not shutil.which("curl"):
        return
    states = ["InService", "InService", "Terminated"]
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            self.say("token")

        def do_GET(self):
            asked.append((self.path, self.headers["X-aws-ec2-metadata-token"]))
            self.say(states[min(len(asked), len(states)) - 1])

        def say(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    stub = tmp_path / "systemctl"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/stopped\n')
    stub.chmod(0o755)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin",
            "OUTBOX_METADATA_URL": f"http://127.0.0.1:{server.server_port}",
            "OUTBOX_SCALE_IN_EVERY_S": "0.05",
        }
        done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=20, check=False)
        server.shutdown()
    assert (done.returncode, done.stderr) == (0, "")
    assert asked == [("/latest/meta-data/autoscaling/target-lifecycle-state", "token")] * 3
    assert (tmp_path / "stopped").read_text() == "stop outbox-generate.timer outbox-relay.service\n"
