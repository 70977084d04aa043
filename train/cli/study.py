"""`sinkbed study`: a set of arms, each a run of its own process, then one report.

A study file names a base run, overlays for each arm, and seeds. An arm that finished under the same
configuration is not run again; one that was interrupted resumes; one that failed is reported and does
not stop the rest.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from sinkbed.data.files import remove_temporaries
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.report.effects import check, check_measured
from sinkbed.train.report.runs import of_all_seeds, split_finished
from sinkbed.train.run import directory
from sinkbed.train.study.arms import LOG, SECONDS_FOR_THE_DEAD, ArmRun, check_configs, conclude, hold, make_ready, plan
from sinkbed.train.study.file import StudyConfig, load_study

SECONDS_BETWEEN_LOOKS = 2.0
"""While another process makes the token store."""


def build_parser(command: str) -> argparse.ArgumentParser:
    """Options of `sinkbed study`."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=Path, help="study file, such as configs/study/packing.yaml")
    parser.add_argument("--size", help="one of the file's sizes (default: demo, or its first)")
    parser.add_argument("--workers", type=int, help="arms at a time on this machine (default: the file's, or by cores)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: the file's)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="arms, with the effects between them (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the study (default: the file's)")
    parser.add_argument(
        "--dry_run", action="store_true", help="arms, tokens, FLOPs, hours and disk, and whether it fits; runs nothing"
    )
    parser.add_argument("--force", action="store_true", help="run anew what was made under another configuration")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run the arms on a Ray cluster: its address, auto, or local for this machine"
    )
    parser.add_argument("--retries", type=int, help="with --ray: times an arm goes on when its node is lost (3)")
    parser.add_argument("--sweep", type=Path, metavar="PATH", help="write a W&B sweep of the same arms, run nothing")
    # What the agent of such a sweep calls: one arm, without a report.
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return parser


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, run the arms, write the report. Exit status 1 when an arm has no result."""
    arguments = build_parser(command).parse_args(list(argv))
    _check_together(arguments)
    study = chosen(arguments)
    if arguments.sweep is not None:
        from sinkbed.train.study.sweep import write_sweep

        return write_sweep(study, arguments.sweep)
    if arguments.arm is not None:
        return _run_one(study, arguments)

    from sinkbed.train.study.processes import call, warm_up

    warm_up()
    runs = plan(study)
    todo = [r for r in runs if r.status() != "finished"]
    from sinkbed.train.study.cost import check_fits, check_stores, print_plan

    if todo and (complaint := call(check_configs, todo) or call(check_stores, todo)):
        raise ValueError(complaint)

    check_measured(study, runs)

    if arguments.dry_run:
        print_plan(study, runs)
        _print_seeds(study)
    check_fits(study, runs, cluster=arguments.ray is not None)  # before hours of preparing, too
    if arguments.dry_run:
        return 0
    _prepare(study.prepare.values(), arguments.quiet)

    while True:
        failed = _run_arms(study, arguments)
        finished, results, _ = split_finished(of_all_seeds(study))
        wide = [item.name for item in check(results, study.effects, {}) if item.too_wide]
        if failed or not wide or len(study.seeds) >= (study.most_seeds or 0):
            break
        study = dataclasses.replace(study, seeds=[*study.seeds, max(study.seeds) + 1])
        print(f"one seed more, {len(study.seeds)} of at most {study.most_seeds}, for the interval of {wide[0]!r}")
    if finished:
        from sinkbed.train.report.study import write_report  # which imports matplotlib

        reported = _with_finished(study, arguments) if arguments.arms else study
        _, results, missing = split_finished(of_all_seeds(reported))
        write_report(reported, results, missing, log=finished)
    for name, why in failed.items():
        print(f"arm {name} failed: {why}", file=sys.stderr)
    lacking = {r.folder for r in plan(study)} - {r.folder for r in finished}  # a damaged one did not fail
    return 1 if failed or lacking else 0


def _check_together(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing; --arm and --seed of an agent are one letter from --arms and --seeds."""
    if arguments.retries is not None and arguments.ray is None:
        raise ValueError(f"--retries: expected --ray with it, got {arguments.retries} without")
    if arguments.workers is not None and arguments.ray is not None:
        raise ValueError(f"--workers: expected none with --ray, whose cluster decides it, got {arguments.workers}")
    if arguments.seed is not None and arguments.arm is None:
        raise ValueError("--seed: expected --arm with it, or --seeds; got --seed alone")
    for name in ("arms", "seeds", "dry_run", "sweep"):
        if arguments.arm is not None and getattr(arguments, name):
            raise ValueError(f"--{name}: expected --arms for some of the arms, got --arm, which trains one at once")


def _run_arms(study: StudyConfig, arguments: argparse.Namespace) -> dict[str, str]:
    """Run what is not finished; why each failed that did."""
    from sinkbed.train.study.cost import check_fits

    runs = plan(study)  # of the token store that is there now
    lock = directory.lock(study.out)
    remove_temporaries(study.out)
    runner: Any
    try:
        _refuse_others(runs, arguments.force)
        check_fits(study, runs, cluster=arguments.ray is not None)
        if arguments.ray is not None:
            from sinkbed.train.study.ray import RayRunner

            runner = RayRunner(study, runs, arguments.ray, 3 if arguments.retries is None else arguments.retries)
        else:
            from sinkbed.train.study.local import LocalRunner

            runner = LocalRunner(study, runs)
    except BaseException:
        directory.release(lock)
        raise
    # As under a scheduler: a terminated study stops its arms, which resume next time. Not by raising SIGINT, which a
    # shell has a job in the background ignore.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.perf_counter()
    runner.run(progress=not arguments.quiet)
    overhead = runner.overhead()
    beside = "" if overhead is None else f"; an arm {overhead:.1f} s beside training and measuring (median)"
    print(f"arms took {time.perf_counter() - began:.0f} s{beside}")
    lock.close()
    return dict(runner.failed)


def chosen(arguments: argparse.Namespace) -> StudyConfig:
    """The study at its size, with what the options change."""
    study = load_study(arguments.study, arguments.size)
    names = ("workers", "seeds", "out")
    changes = {k: getattr(arguments, k) for k in names if getattr(arguments, k, None) is not None}
    if "seeds" in changes:  # those, and no more
        changes["most_seeds"] = None
    study = dataclasses.replace(study, **changes)
    return _only(study, arguments.arms) if arguments.arms else study


def _only(study: StudyConfig, arms: Collection[str]) -> StudyConfig:
    """The study of some of its arms."""
    unknown = sorted(set(arms) - set(study.arms))
    if unknown:
        raise ValueError(f"--arms: expected some of {', '.join(study.arms)}; got {unknown[0]}")
    effects = [effect for effect in study.effects if {effect.arm, effect.other[0]} <= set(arms)]
    most_seeds = study.most_seeds if any(effect.half_width for effect in effects) else None
    kept = {name: overlays for name, overlays in study.arms.items() if name in arms}
    return dataclasses.replace(study, arms=kept, effects=effects, most_seeds=most_seeds)


def _with_finished(study: StudyConfig, arguments: argparse.Namespace) -> StudyConfig:
    """With those of its other arms that have a finished run in the folder: its report has them."""
    whole = load_study(arguments.study, arguments.size)
    whole = dataclasses.replace(whole, out=study.out, seeds=study.seeds, most_seeds=None)
    return _only(whole, {*study.arms, *(run.arm for run in of_all_seeds(whole) if run.status() == "finished")})


def _print_seeds(study: StudyConfig) -> None:
    """How many seeds the effects take, from the arms that are finished."""
    _, results, _ = split_finished(of_all_seeds(study))
    for item in check(results, study.effects, {}):
        if item.seeds:
            print(item.seeds)


def _prepare(configs: Iterable[Path], quiet: bool) -> None:
    """Have token stores made that are not there; of several processes one makes each, the others wait."""
    from sinkbed.train.cli.prepare import run as prepare

    for config in configs:
        waiting = False
        while True:
            try:
                if prepare("prepare", ["--config", str(config), *(["--quiet"] if quiet else [])]) == 130:
                    raise KeyboardInterrupt
                break
            except BlockingIOError as error:
                if not waiting:
                    print(f"waiting: {error.strerror}", flush=True)
                waiting = True
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _refuse_others(runs: Sequence[ArmRun], force: bool) -> None:
    """Raise ValueError for folders of another configuration; with `force`, they are cleared as their arms start."""
    other = [] if force else [r for r in runs if r.status() == "other"]
    if other:
        raise ValueError(
            f"{other[0].folder}: expected a run of this configuration, got one of another "
            f"({other[0].reason()}). Use --force to run such arms anew, or another --out to keep them"
        )


def _run_one(study: StudyConfig, arguments: argparse.Namespace) -> int:
    """Run one arm under one seed in this process, as a sweep's agent asks; finished ones are left as they are."""
    seed = study.seeds[0] if arguments.seed is None else arguments.seed
    from sinkbed.train.study.cost import check_fits, prepared_by

    study = dataclasses.replace(_only(study, [arguments.arm]), seeds=[seed], most_seeds=None)
    [run] = plan(study)
    complaint = check_configs([run])
    if not complaint:
        check_fits(study, [run])
        if config := prepared_by(study, run):
            _prepare([config], arguments.quiet)
        [run] = plan(study)  # of the token store that is there now
    with contextlib.closing(hold(run.folder, SECONDS_FOR_THE_DEAD)):  # also while it is judged and cleared
        _refuse_others([run], arguments.force)
        if run.status() == "finished":
            print(f"{run.folder}: finished already; nothing was changed")
            return 0

        from sinkbed.train.loop.trainer import run as fit

        try:
            options = make_ready(run, study.name)[1:]
            if complaint:
                raise ValueError(complaint)
            status = fit("fit", options)
        except Exception as error:
            (run.folder / LOG).write_text(f"{error}\n")
            conclude(run, 1)
            raise
    return status
