"""`sinkbed report`: what a study found, as a table, figures and one self-contained HTML page.

Reads the run directories only, so it can be made again at any time, also of runs that have not finished.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sinkbed.train.cli.study import chosen
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.report.runs import check_alike, load_folder, of_all_seeds, split_finished
from sinkbed.train.study.arms import ArmRun, plan
from sinkbed.train.study.file import StudyConfig, load_study


def run(command: str, argv: Sequence[str]) -> int:
    """Make the report of a study anew, or one of any runs."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", type=Path, nargs="+", help="study files, or run directories and folders of them")
    parser.add_argument("--size", help="of study files: one of their sizes (default: demo, or the first)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of study files: seeds (default: the file's, and others that are finished)"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of one study file: arms (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        help="of one study file: the study's folder, with its runs (default: the file's); of folders: where report/ is "
        "written (default: the one folder); of several study files: where their page is written",
    )
    arguments = parser.parse_args(list(argv))
    folders = [path for path in arguments.what if path.is_dir()]
    for name in ("size", "seeds", "arms"):
        if folders and getattr(arguments, name):
            raise ValueError(f"--{name}: expected study files, of which it chooses, got the folder {folders[0]}")
    if not folders and len(arguments.what) > 1:
        return _digest(arguments)
    if not folders:
        arguments.study = arguments.what[0]
        study = chosen(arguments)
        runs = plan(study) if arguments.seeds else of_all_seeds(study)
    else:
        missing = [path for path in arguments.what if path not in folders]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: expected study files only, or folders only; got no folder")
        only = folders[0] if len(folders) == 1 else None
        if arguments.out is None and only and (only / "report").exists() and (only / "runs").exists():
            raise ValueError(
                f"{only}: expected the study's file, which has its expected effects, got its folder; sinkbed report "
                f"STUDY.yaml --out {only}, or give another --out for a report without effects"
            )
        if arguments.out is None and len(folders) > 1:
            raise ValueError("report: expected --out, the folder for the report of several folders; got none")
        runs = [
            ArmRun(arm=arm, seed=seed, folder=path, names=(), config={}, settings={})
            for folder in folders
            for path, arm, seed in load_folder(folder)
        ]
        check_alike(runs)
        out = arguments.out or folders[0]
        study = StudyConfig(title=f"Runs of {', '.join(map(str, folders))}", out=out, base=[out], arms={"any": [out]})
    _, results, missing = split_finished(runs)
    if not results:
        more = [f"{len(missing) - 3} more"] if len(missing) > 3 else []
        others = f" ({'; '.join([*missing[:3], *more])})" if missing else ""
        raise ValueError(
            f"{', '.join(map(str, arguments.what))}: expected at least one run that was measured, got none in "
            f"{study.out}{others}; name another folder with --out, or start one with `sinkbed study` or `sinkbed fit`"
        )
    from sinkbed.train.report.study import write_report  # which imports matplotlib

    write_report(study, results, missing)
    return 0


def _digest(arguments: argparse.Namespace) -> int:
    """One page of several studies, of the seeds that are finished where none are named."""
    if arguments.out is None:
        raise ValueError("report: expected --out, the folder for the page of several studies; got none")
    if arguments.arms:
        raise ValueError(f"--arms: expected one study file, got {len(arguments.what)}")
    studies = []
    for path in arguments.what:
        study = load_study(path, arguments.size)
        runs = plan(dataclasses.replace(study, seeds=arguments.seeds)) if arguments.seeds else of_all_seeds(study)
        if all(run.status() == "new" for run in runs):
            print(f"not on the page: {path} (no run in {study.out})")
            continue
        _, results, missing = split_finished(runs)
        missing += [f"{r.arm}, seed {r.seed} (not finished: {r.progress})" for r in results if r.progress]
        print("".join(f"not on the page: {what}\n" for what in missing), end="")
        if results := [r for r in results if not r.progress]:
            studies.append((study, results))
    if not studies:
        raise ValueError("report: expected a study with a finished run, got none; start one with `sinkbed study`")
    from sinkbed.train.report.index import write_digest

    print(f"page: {write_digest(studies, arguments.out)}")
    return 0
