"""The closed loop of `vla-post demo`: prepare, run the graph and the learner, compare, report."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robot_bridge.bringup import (
    BringupError,
    CellConfig,
    NodeSpec,
    ProcessGroup,
    Restart,
    Value,
    cell_nodes,
)
from vla_post.cli.console import ConsoleLink
from vla_post.cli.errors import UserError
from vla_post.cli.progress import Progress
from vla_post.cli.signals import ends_in_order
from vla_post.export.registry import Registry

if TYPE_CHECKING:
    from vla_post.cli.demo import Demo
    from vla_post.recipes.demo import DemoRecipe

STALL_S = 180.0
"""Wall time without a single event after which the session counts as stuck."""


@dataclass(frozen=True, kw_only=True)
class Command(NodeSpec):
    """A process of the group that is no ROS node: `python -m MODULE WORDS`."""

    namespace: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    restart: Restart = "never"
    words: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        return list(self.words)


class ClosedLoop:
    """One demonstration run; every stage leaves its files in the run folder."""

    def __init__(self, options: "Demo") -> None:
        self.options = options
        self.started = time.monotonic()
        self.stages: dict[str, float] = {}
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.run_folder = (options.out or Path("runs") / f"{stamp}-{options.policy}").resolve()
        if self.run_folder.exists() and any(self.run_folder.iterdir()) and not options.keep_going:
            raise UserError(
                f"{self.run_folder}: exists and is not empty; name another --out, or pass "
                "--keep-going to overwrite it"
            )
        if options.keep_going:
            for name in ("stores", "registry", "events.jsonl", "metrics.jsonl", "learner"):
                path = self.run_folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.registry = Registry(self.run_folder / "registry")
        self.events = self.run_folder / "events.jsonl"
        self.metrics = self.run_folder / "metrics.jsonl"
        self._address_file = self.run_folder / "console.address"

    def run(self) -> None:
        """Everything; ends with the report.

        Raises:
            UserError: the machine lacks something, or a process failed; the message says which.
        """
        _check_machine()
        self.run_folder.mkdir(parents=True, exist_ok=True)
        try:
            with ends_in_order():
                self._run()
        except KeyboardInterrupt:
            raise UserError(
                f"interrupted; everything that was recorded is in {self.run_folder} "
                f"(`vla-post store ls {self.run_folder / 'stores'}`)"
            ) from None
        except BringupError as error:
            raise UserError(f"{error}\n  the run folder is {self.run_folder}") from error

    def _run(self) -> None:
        options = self.options
        from vla_post.recipes import recipe as named_recipe

        recipe = named_recipe(f"demo_{options.policy}")
        episodes = options.episodes or recipe.episodes
        self._write_run_card(recipe, episodes)
        progress = Progress(episodes=episodes, events=self.events, metrics=self.metrics)
        with progress:
            with self._stage(progress, "prepare: demonstrations and the weak starting policy"):
                start = self._prepare(recipe)
            with self._stage(progress, "learn while the robot works"):
                self._session(progress, recipe, start, episodes)
            with self._stage(progress, "compare the first with the last version"):
                outcome = self._compare(progress, recipe)
            with self._stage(progress, "report"):
                from vla_post.cli.run_report import write_run_report

                report = write_run_report(
                    self.run_folder,
                    recipe=recipe,
                    outcome=outcome,
                    stages=self.stages,
                    total_s=time.monotonic() - self.started,
                )
        self._say_result(outcome, report)

    # Stages --------------------------------------------------------------------------------------

    def _prepare(self, recipe: "DemoRecipe") -> Path:
        """Demonstrations into their store, and the starting checkpoint."""
        from sim.demonstrations import write_demonstrations
        from vla_post.recipes.pretrain import demonstration_seed

        contract = recipe.load_contract()
        shutil.copy(recipe.contract, self.run_folder / "contract.yaml")
        demonstrations = self.run_folder / "stores" / "demonstrations"
        write_demonstrations(
            demonstrations,
            contract,
            tasks=recipe.tasks,
            episodes_per_task=recipe.pretrain.demonstrations,
            seed=demonstration_seed(recipe.pretrain.seed),
            noise=recipe.pretrain.noise,
        )
        if recipe.shipped_start is not None:
            return recipe.shipped_start
        from vla_post.recipes.pretrain import pretrain

        return pretrain(
            recipe.pretrain,
            contract,
            self.run_folder / "start",
            demonstrations=demonstrations,
        )

    def _session(
        self, progress: Progress, recipe: "DemoRecipe", start: Path, episodes: int
    ) -> None:
        """The robot works, the operator corrects, the learner publishes, the robot adopts."""
        self.registry.publish(start, contract=recipe.load_contract(), metrics={"note": "start"})
        words = [recipe.name, "--start", str(start), "--run", str(self.run_folder)]
        learner = Command(
            name="learner",
            module="vla_post.recipes.learner",
            words=(*words, "--seed", str(self.options.seed)),
        )
        operator = {
            "episodes": episodes,
            "tasks": list(recipe.tasks),
            "seed": recipe.online_seed + 1_000 * self.options.seed,
            "reset_s": recipe.reset_s,
        } | _changed_fields(recipe.operator)
        nodes = cell_nodes(
            CellConfig(
                contract=self.run_folder / "contract.yaml",
                store=self.run_folder / "stores" / "online",
                registry=self.run_folder / "registry",
                events_log=self.events,
                operator=operator,
                console=self._console() if self.options.console else None,
            )
        )
        # The learner outlives the robot: what the last episodes taught is still learned and
        # published on its way out.
        with self._group([learner], patience_s=60.0) as teacher, self._group(nodes) as cell:
            self._watch(progress, cell, teacher)
        progress.refresh()

    def _console(self) -> dict[str, Value]:
        return {
            "metrics": str(self.metrics),
            "address_file": str(self._address_file),
            "token_file": str(self.run_folder / "console.tokens"),
            "nice": 10,  # the robot and the learner come first
        }

    def _watch(self, progress: Progress, cell: ProcessGroup, teacher: ProcessGroup) -> None:
        """Until the operator has played all episodes, or the time is over."""
        begun: float | None = None
        last_event, seen = time.monotonic(), -1
        link = ConsoleLink(self._address_file, progress.say)
        while True:
            for ended in cell.poll() + teacher.poll():
                if ended.name == "operator" and ended.status == 0:
                    return
                if not ended.restarting and ended.essential:
                    group = teacher if ended.name == "learner" else cell
                    raise BringupError(
                        f"{ended.name} ended with status {ended.status}, see {ended.log}:\n"
                        + group.last_words(ended.name)
                    )
            progress.refresh()
            link.look()
            now, state = time.monotonic(), progress.state
            if state.events != seen:
                seen, last_event = state.events, now
            if begun is None and state.driver == "policy":
                begun = now
            if now - last_event > STALL_S:
                raise BringupError(
                    f"nothing has happened on the cell for {STALL_S:.0f} s; the operator's log "
                    f"ends with:\n{cell.last_words('operator')}"
                )
            if begun is not None and now - begun > self.options.learn_s:
                return
            time.sleep(0.1)

    def _compare(self, progress: Progress, recipe: "DemoRecipe") -> dict[str, Any]:
        """Paired evaluation on one core, export and its parity check on the other."""
        options = self.options
        active = self.registry.active()
        assert active is not None
        if active.number == 1:
            raise UserError(
                "the learner published nothing in this session; see "
                f"{self.run_folder / 'logs' / 'learner.log'}. Longer sessions: --learn-s, "
                "--episodes"
            )
        total = options.evaluation_episodes or recipe.evaluation_episodes
        out = self.run_folder / "evaluation.json"
        commands = [
            Command(
                name="evaluate",
                module="vla_post.cli.main",
                words=(
                    *("eval", "--registry", str(self.registry.root)),
                    *("--first", "1", "--last", str(active.number)),
                    *("--episodes", str(max(1, total // len(recipe.tasks)))),
                    *("--tasks", *recipe.tasks),
                    *("--seed", str(recipe.evaluation_seed)),
                    *("--out", str(out), "--frames", str(self.run_folder / "frames.npz")),
                ),
            )
        ]
        if options.export:
            commands.append(
                Command(
                    name="export",
                    module="vla_post.cli.main",
                    words=(
                        *("export", str(self.registry.path(active.number))),
                        *("--store", str(self.run_folder / "stores")),
                        *("--out", str(self.run_folder / "export")),
                    ),
                )
            )
        with self._group(commands) as group:
            waiting = {command.name for command in commands}
            while waiting:
                for ended in group.poll():
                    waiting.discard(ended.name)
                    if ended.status != 0:
                        raise BringupError(
                            f"{ended.name} ended with status {ended.status}, see {ended.log}:\n"
                            + group.last_words(ended.name)
                        )
                progress.refresh()
                time.sleep(0.2)
        return json.loads(out.read_text())

    # ---------------------------------------------------------------------------------------------

    def _group(self, specs: Sequence[NodeSpec], patience_s: float = 10.0) -> ProcessGroup:
        environment = {
            "HF_HUB_OFFLINE": "1",
            # A domain of our own: another robot or run on this machine must not hear us.
            "ROS_DOMAIN_ID": os.environ.get("ROS_DOMAIN_ID", str(1 + os.getpid() % 100)),
        }
        return ProcessGroup(
            specs,
            log_dir=self.run_folder / "logs",
            environment=environment,
            patience_s=patience_s,
        )

    @contextmanager
    def _stage(self, progress: Progress, name: str) -> Generator[None]:
        progress.stage(name)
        begun = time.monotonic()
        yield
        self.stages[name] = round(time.monotonic() - begun, 1)

    def _write_run_card(self, recipe: "DemoRecipe", episodes: int) -> None:
        """What repeats this run: command, seed, commit, versions, recipe."""
        import dataclasses
        from importlib.metadata import version

        packages = ("torch", "lerobot", "mujoco", "metaworld", "zarr", "icechunk", "onnxruntime")
        card = {
            "command": shlex.join(["vla-post", *sys.argv[1:]]),
            "seed": self.options.seed,
            "episodes": episodes,
            "commit": _commit(),
            "contract_sha256": recipe.load_contract().sha256,
            "python": platform.python_version(),
            "machine": f"{os.cpu_count()} x {_processor()}, {platform.system()}",
            "versions": {name: version(name) for name in packages},
            "recipe": dataclasses.asdict(recipe),
        }
        path = self.run_folder / "run.json"
        path.write_text(json.dumps(card, indent=2, default=str) + "\n")

    def _say_result(self, outcome: dict[str, Any], report: Path) -> None:
        from vla_post.cli.evaluate import as_table

        minutes = (time.monotonic() - self.started) / 60
        print(as_table(outcome))
        print(f"{minutes:.1f} minutes; report: {report}")


def _check_machine() -> None:
    """Fails early, with the remedy, on what would otherwise fail in a child process."""
    from vla_post.cli.doctor import run_checks

    failed = [check for check in run_checks() if check.required and not check.ok]
    if failed:
        raise UserError("this machine is not ready:\n" + "\n".join(map(str, failed)))


def _changed_fields(operator: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, as the operator node's parameters."""
    import dataclasses

    return {
        field.name: getattr(operator, field.name)
        for field in dataclasses.fields(operator)
        if getattr(operator, field.name) != field.default
    }


def _commit() -> str:
    """Of the checkout that runs, `unknown` for an installed package."""
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
