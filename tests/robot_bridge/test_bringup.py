"""The node list as data, and the process group with real processes (no ROS in them)."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import robot_bridge.dds
import sim
from robot_bridge.bringup import (
    BringupError,
    CellConfig,
    NodeSpec,
    ProcessGroup,
    cell_nodes,
)
from robot_bridge.dds import profile_path, use_default_profile
from robot_bridge.dds.leftovers import clean_shared_memory

CONTRACT = Path(sim.__file__).parent / "contracts" / "metaworld_state.yaml"
DEADLINE_S = 20.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S} s"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that a child process can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, body: str) -> NodeSpec:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        return NodeSpec(name=name, module=name, namespace="/cell", parameters={})

    return write


SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("grandchild", child.pid, flush=True)
time.sleep(600)
"""


class TestCellNodes:
    def test_a_simulated_cell_with_everything(self, tmp_path):
        specs = cell_nodes(
            CellConfig(
                contract=CONTRACT,
                registry=tmp_path / "registry",
                store=tmp_path / "store",
                operator={"episodes": 3, "tasks": ["reach"]},
                events_log=tmp_path / "events.jsonl",
            )
        )
        by_name = {spec.name: spec for spec in specs}
        assert [s.name for s in specs] == [
            "supervisor", "recorder", "arbiter", "runner", "robot", "operator",
        ]  # fmt: skip
        assert by_name["supervisor"].parameters["managed_nodes"] == [
            "recorder",
            "arbiter",
            "runner",
        ]
        assert by_name["runner"].parameters["registry"] == str(tmp_path / "registry")
        assert by_name["operator"].restart == "never"
        assert {s.namespace for s in specs} == {"/sawyer_state"}
        assert all(s.parameters["use_sim_time"] is True for s in specs)
        assert 'tasks:=["reach"]' in by_name["operator"].arguments()

    def test_a_real_cell_has_no_simulator_and_remaps_to_its_controller(self, tmp_path):
        target = "/joint_trajectory_controller/joint_trajectory"
        specs = cell_nodes(
            CellConfig(
                contract=CONTRACT,
                policy=tmp_path,
                simulated=False,
                remappings={"command": target},
            )
        )
        assert [s.name for s in specs] == ["supervisor", "arbiter", "runner"]
        arbiter = specs[1]
        assert arbiter.parameters["use_sim_time"] is False
        assert arbiter.parameters["stamp_commands"] is False
        assert f"command:={target}" in arbiter.arguments()

    def test_without_a_policy_there_is_no_runner_to_wait_for(self):
        specs = cell_nodes(CellConfig(contract=CONTRACT))
        assert [s.name for s in specs] == ["supervisor", "arbiter", "robot"]
        assert specs[0].parameters["managed_nodes"] == ["arbiter"]

    def test_a_registry_and_a_policy_exclude_each_other(self, tmp_path):
        with pytest.raises(ValueError, match="runs one"):
            CellConfig(contract=CONTRACT, registry=tmp_path, policy=tmp_path)

    def test_text_that_yaml_would_read_as_something_else_stays_text(self):
        spec = NodeSpec(
            name="n",
            module="m",
            namespace="/c",
            parameters={"operator": "on", "x": 1.0, "f": False},
        )
        assert spec.arguments()[3:] == ["-p", 'operator:="on"', "-p", "x:=1.0", "-p", "f:=false"]


class TestProcessGroup:
    def test_leaving_the_block_ends_every_process_and_its_children(self, module, tmp_path):
        specs = [module("sleeper", SLEEPER), module("stubborn", STUBBORN)]
        with ProcessGroup(specs, log_dir=tmp_path / "logs", patience_s=0.5) as group:
            pids = group.pids()
            assert set(pids) == {"sleeper", "stubborn"}
            wait_until(lambda: "grandchild" in group.last_words("stubborn"), "the grandchild")
            pids["grandchild"] = int(group.last_words("stubborn").split()[-1])
        assert group.pids() == {}
        wait_until(lambda: not any(alive(p) for p in pids.values()), "the end of all")

    def test_a_crashed_node_is_started_again_and_a_users_mistake_is_not(self, module, tmp_path):
        crashing = module("crashing", "import os\nprint('up', flush=True)\nos._exit(7)\n")
        mistaken = module("mistaken", "raise SystemExit(2)\n")
        ended = []
        with ProcessGroup([crashing, mistaken], log_dir=tmp_path, max_restarts=1) as group:
            wait_until(lambda: bool(ended.extend(group.poll())) or len(ended) == 3, "three ends")
        crashes = [(e.status, e.restarting) for e in ended if e.name == "crashing"]
        assert crashes == [(7, True), (7, False)]
        assert [(e.status, e.restarting) for e in ended if e.name == "mistaken"] == [(2, False)]
        assert (tmp_path / "crashing.log").read_text() == "up\nup\n"

    def test_waiting_reports_another_process_that_fails_with_its_last_words(self, module, tmp_path):
        broken = module("broken", "print('no contract at /x')\nraise SystemExit(2)\n")
        group = ProcessGroup([module("sleeper", SLEEPER), broken], log_dir=tmp_path)
        with group, pytest.raises(BringupError, match="broken ended with status 2") as caught:
            group.wait("sleeper", 20)
        assert "no contract at /x" in str(caught.value)

    def test_children_follow_a_parent_that_is_killed(self, module, tmp_path):
        module("sleeper", SLEEPER)
        parent = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, time\nfrom pathlib import Path\n"
                "from robot_bridge.bringup import NodeSpec, ProcessGroup\n"
                "s = NodeSpec(name='s', module='sleeper', namespace='/', parameters={})\n"
                "g = ProcessGroup([s], log_dir=Path(sys.argv[1]))\ng.start()\n"
                "while 'up' not in g.last_words('s'): time.sleep(0.02)\n"
                "print(g.pids()['s'], flush=True)\ntime.sleep(600)\n",
                str(tmp_path),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        wait_until(lambda: not alive(pid), "the child's end")

    def test_ctrl_c_ends_the_group_and_reaches_the_caller(self, module, tmp_path):
        group = ProcessGroup([module("sleeper", SLEEPER)], log_dir=tmp_path)
        with pytest.raises(KeyboardInterrupt), group:  # noqa: PT012 (the group must be running)
            pid = group.pids()["sleeper"]
            wait_until(lambda: "up" in group.last_words("sleeper"), "the start")
            os.kill(os.getpid(), signal.SIGINT)
            group.wait("sleeper", 20)
        wait_until(lambda: not alive(pid), "the end")

    def test_output_is_copied_with_the_name_in_front(self, module, tmp_path, capsys):
        spec = module("talker", "print('hello')\n")
        with ProcessGroup([spec], log_dir=tmp_path, echo=sys.stderr) as group:
            assert group.wait("talker", 20) == 0
        assert "[talker] hello" in capsys.readouterr().err

    def test_two_nodes_of_one_name_are_refused(self, module, tmp_path):
        spec = module("twice", SLEEPER)
        with pytest.raises(ValueError, match="share a name: twice, twice"):
            ProcessGroup([spec, spec], log_dir=tmp_path)


class TestSharedMemory:
    def old(self, path: Path) -> Path:
        path.write_bytes(b"x" * 16)
        os.utime(path, (time.time() - 60,) * 2)
        return path

    def test_only_old_unmapped_segments_of_dds_are_removed(self, tmp_path):
        dead = self.old(tmp_path / "fastrtps_dead")
        other = self.old(tmp_path / "somebody_else")
        young = tmp_path / "fastrtps_young"
        young.write_bytes(b"x")
        used = self.old(tmp_path / "fastrtps_used")
        with used.open("rb"):
            assert clean_shared_memory(tmp_path) == [dead.name]
        assert other.exists()
        assert young.exists()
        assert used.exists()


class TestProfile:
    def test_the_default_is_loopback_and_a_users_choice_wins(self):
        env: dict[str, str] = {}
        assert use_default_profile(environment=env) == profile_path("loopback")
        assert env["FASTDDS_DEFAULT_PROFILES_FILE"] == profile_path("loopback")
        env = {"FASTRTPS_DEFAULT_PROFILES_FILE": "/mine.xml"}
        assert use_default_profile(environment=env) == "/mine.xml"
        assert env["FASTDDS_DEFAULT_PROFILES_FILE"] == "/mine.xml"

    def test_an_unknown_profile_is_named(self):
        with pytest.raises(ValueError, match="'wifi'"):
            profile_path("wifi")

    def test_loopback_listens_on_one_address_only(self):
        import xml.etree.ElementTree as ET

        names = {name: ET.parse(profile_path(name)).getroot() for name in ("loopback", "network")}
        space = "{http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles}"
        addresses = [e.text for e in names["loopback"].iter(f"{space}address")]
        assert addresses == ["127.0.0.1"]
        assert list(names["network"].iter(f"{space}address")) == []
        assert robot_bridge.dds.LOOPBACK == "loopback"
