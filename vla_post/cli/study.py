"""`vla-post study`: the comparisons behind docs/experiments.md, each one command that resumes."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vla_post.cli.errors import UserError
from vla_post.recipes.study_aloe import AloeStudy, read_results, run_study
from vla_post.recipes.study_report import as_text, summary


@dataclass(frozen=True, kw_only=True)
class StudyAloe:
    """ALOE against AWR, DAgger and cloning on state cells, from one start and one buffer.

    Prints tables of success, intervals and paired differences. What is in --out is not run again,
    so an interrupted study goes on where it was.
    """

    out: Path
    """Folder of results, stores and checkpoints."""
    study: Annotated[AloeStudy, tyro.conf.arg(name="")] = field(default_factory=AloeStudy)

    def run(self) -> None:
        run_study(self.study, self.out, say=lambda line: print(line, file=sys.stderr, flush=True))
        Report(out=self.out).run()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Print the tables of what a study has found so far."""

    out: Annotated[Path, tyro.conf.Positional]
    """The study's folder, or a file of its results."""

    def run(self) -> None:
        path = self.out if self.out.is_file() else self.out / "results.jsonl"
        results = read_results(path)
        if not results:
            raise UserError(f"{path}: no results yet; `vla-post study aloe --out` makes them")
        found = summary(results)
        if self.out.is_dir():
            (self.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
        print(as_text(found))


study_command = (
    Annotated[StudyAloe, tyro.conf.subcommand("aloe")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)
