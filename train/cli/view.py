"""`sinkbed view`: W&B's page of a project as code: sink curves, losses, maps of layers and heads, runs by arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkbed.data.files import write_atomic
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.measure.modes import MODE_LABELS, check_modes

_OF_MODES: dict[str, dict[str, str]] = {
    "Sink": {
        "sink rate, % (eps 0.3)": "sink/rate_eps0.3/{}",
        "sink mass": "sink/mass/{}",
        "sink rate, layers 3 and up": "sink/rate_deep_eps0.3/{}",
        "strongest head": "sink/strongest_head/{}",
    },
    "Losses": {"loss, nats": "val/loss/{}", "bits per byte": "val/bits_per_byte/{}"},
}
"""Section -> title -> metric of an inference mode."""
_ALONE: dict[str, dict[str, tuple[str, ...]]] = {
    "Sink": {
        "packed rows: document starts against row starts": ("sink/packed_document_mass", "sink/packed_first_key_mass")
    },
    "Losses": {"training loss": ("train/loss",)},
    "Optimizer": {
        "learning rate": ("train/lr",),
        "gradient norm": ("train/grad_norm",),
        "decay so far, Σ lr · wd": ("train/accumulated_decay",),
        "tokens a second": ("train/tokens_per_second",),
    },
}
_MAPS = ("sink_maps/heads/{}", "sink_maps/mass/{}", "state/first_token_norm_ratio/{}", "state/value_norm_ratio/{}")


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, make the workspace and, where it is asked for, the report; save them, or write what would be sent."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("project", help="W&B project, such as sinkbed, or entity/project")
    parser.add_argument("--group", help="only the runs of this study: its folder's name")
    parser.add_argument("--modes", nargs="+", default=["bos", "text", "as_trained"], help="inference modes")
    parser.add_argument("--report", action="store_true", help="also a W&B report, a draft, with the same panels")
    parser.add_argument(
        "--out", type=Path, help="write the workspace, without a report, to this JSON file, and send nothing"
    )
    arguments = parser.parse_args(list(argv))
    modes = check_modes(arguments.modes)
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise ValueError("view: wandb-workspaces is missing; pip install -e '.[view]'") from None
    entity, _, project = arguments.project.rpartition("/")
    if arguments.out is not None:
        view = workspace(entity, project, arguments.group, modes)
        write_atomic(arguments.out, view._to_model().model_dump_json(by_alias=True, indent=1) + "\n")
        print(f"{arguments.out}: the workspace as JSON; nothing was sent")
        return 0
    import wandb

    try:
        entity = entity or str(wandb.Api().default_entity)
        print(workspace(entity, project, arguments.group, modes).save().url)
        if arguments.report:
            print(report(entity, project, arguments.group, modes).save(draft=True).url)
    except wandb.errors.Error as error:
        raise ValueError(
            f"view: expected a W&B login that may write to {arguments.project}, got none ({error}); --out FILE sends "
            "nothing"
        ) from None
    return 0


def panels(modes: Sequence[str]) -> dict[str, list[Any]]:
    """Section -> panels; tokens on a logarithmic axis, as sinks form early."""
    import wandb_workspaces.reports.v2 as wr

    def lines(title: str, metrics: Sequence[str]) -> Any:
        x, scale = "train/tokens", "tokens"
        return wr.LinePlot(title=title, x=x, y=list(metrics), log_x=True, title_x=scale, groupby_rangefunc="minmax")

    sections: dict[str, list[Any]] = {}
    for section, charts in _OF_MODES.items():
        sections[section] = [
            lines(f"{title}: {MODE_LABELS[mode]}", [metric.format(mode)])
            for title, metric in charts.items()
            for mode in modes
        ]
    for section, alone in _ALONE.items():
        sections.setdefault(section, []).extend(lines(title, metrics) for title, metrics in alone.items())
    maps = [wr.MediaBrowser(title=MODE_LABELS[mode], media_keys=[m.format(mode) for m in _MAPS]) for mode in modes]
    return {"Sink": sections.pop("Sink"), "Layers and heads": maps, **sections}


def _filter(group: str | None) -> str:
    return "" if group is None else f"Group = {group!r}"


def workspace(entity: str, project: str, group: str | None, modes: Sequence[str]) -> Any:
    """A saved view; the runs of a study are grouped by their tag, the arm, so that seeds are one line with a range."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import Tags

    by_arm: list[Any] = [] if group is None else [Tags()]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Sinks of {group or project}",
        sections=[
            ws.Section(name=name, panels=inside, is_open=name in ("Sink", "Losses"))
            for name, inside in panels(modes).items()
        ],
        settings=ws.WorkspaceSettings(x_axis="train/tokens"),
        runset_settings=ws.RunsetSettings(filters=_filter(group), groupby=by_arm),
    )


def report(entity: str, project: str, group: str | None, modes: Sequence[str]) -> Any:
    """A W&B report: the sections of the workspace one below the other."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = []
    for name, inside in panels(modes).items():
        by_arm = [] if group is None else ["tags"]
        runs = wr.Runset(entity=entity, project=project, filters=_filter(group), groupby=by_arm)
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=inside)]
    return wr.Report(entity=entity, project=project, title=f"Sinks of {group or project}", blocks=blocks)
