"""`vla-post`: one command line over every room. Data goes to stdout, everything else to stderr.

A command's module is imported when that command is called, so `--help` is quick and `doctor` works
where half of the packages are missing.
"""

import importlib
import os
import sys
import traceback

import tyro

from vla_post.cli.errors import UserError

COMMANDS = {
    "demo": ("vla_post.cli.demo:Demo", "the whole loop on a simulated cell, with a report"),
    "up": ("vla_post.cli.up:Up", "run a cell's processes: robot side, operator, learner"),
    "fleet": ("vla_post.cli.fleet:Fleet", "several simulated cells, few operators"),
    "uplink": ("vla_post.cli.uplink:UplinkCommand", "deliver a robot's episodes to the fleet"),
    "operate": ("vla_post.cli.operate:Operate", "start, label, take over, resume, stop; status"),
    "teleop": ("vla_post.cli.teleop:TeleopCommand", "drive with keyboard, gamepad, SpaceMouse"),
    "console": ("vla_post.cli.console:Console", "the operator's web page for cells"),
    "train": ("vla_post.cli.train:train_command", "train a policy from stores, by recipe"),
    "uni-o4": ("vla_post.cli.uni_o4:uni_o4_command", "one objective, offline and then online"),
    "ptr": ("vla_post.cli.ptr:ptr_command", "which chunks PTR trusts, and what they look like"),
    "critic": ("vla_post.cli.critic:critic_command", "what a critic says of recorded episodes"),
    "study": ("vla_post.cli.study:study_command", "compare learners, as in docs/experiments.md"),
    "data": ("vla_post.cli.data:data_command", "make data sets: locomotion, noisy experts, D4RL"),
    "eval": ("vla_post.cli.evaluate:Evaluate", "compare two policies on the same seeds"),
    "export": ("vla_post.cli.export:Export", "checkpoint to ONNX, proven equal"),
    "serve": ("vla_post.cli.serve:Serve", "a policy for robots on other machines"),
    "policy": ("vla_post.cli.policy:policy_command", "import lerobot policies, show checkpoints"),
    "registry": ("vla_post.cli.registry:registry_command", "list, activate, canary, roll back"),
    "store": ("vla_post.cli.store:store_command", "look at, check and convert trajectory stores"),
    "contract": ("vla_post.cli.contract:contract_command", "check, show and compare contracts"),
    "doctor": ("vla_post.cli.doctor:Doctor", "is this machine ready? one line a check"),
}
"""Name -> (module:type or union of types with a `run` method, one line)."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `vla-post` script."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("vla-post"))
        return
    name = arguments[0]
    if name not in COMMANDS:
        print(f"vla-post: no command {name!r}\n\n{overview()}", file=sys.stderr)
        sys.exit(2)
    try:
        _run(name, arguments[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vla-post: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # `vla-post store ls | head` closes our stdout; that is not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, ValueError, OSError) as error:
        # Rooms raise ValueError or OSError subclasses for a caller's mistake: wrong files, values,
        # contracts. Anything else is a bug and keeps its traceback.
        if os.environ.get("VLA_POST_DEBUG"):
            traceback.print_exc()
        print(f"vla-post: {error}", file=sys.stderr)
        sys.exit(1)


def overview() -> str:
    """What `vla-post --help` prints."""
    lines = ["usage: vla-post COMMAND [options]   (vla-post COMMAND --help says more)", ""]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "A user's mistake is one line; VLA_POST_DEBUG=1 shows the traceback as well."]
    return "\n".join(lines)


def _run(name: str, arguments: list[str]) -> None:
    module, attribute = COMMANDS[name][0].split(":")
    try:
        command = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("vla_post", "trajectory_store", "sim"):
            raise
        raise UserError(
            f"`vla-post {name}` needs the package {error.name!r}, which is not installed: run "
            "`make setup`, or `pip install 'vla-post[all]' -c constraints.txt`"
        ) from error
    tyro.cli(command, prog=f"vla-post {name}", args=arguments).run()


if __name__ == "__main__":
    main()
