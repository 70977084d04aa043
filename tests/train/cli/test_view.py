"""`sinkbed view`: what W&B is sent, on a server of this machine; W&B's own was never asked."""

import json

import pytest

from sinkbed.train.cli.main import main
from sinkbed.train.cli.view import panels
from sinkbed.train.run import directory
from tests.support.wandb_server import serving

pytest.importorskip("wandb_workspaces")


def test_every_panel_is_of_something_that_a_run_logs(fit):
    _, folder = fit("--model.decoder.n_layers", "3")
    points = list(directory.read_metrics(folder / directory.METRICS))
    charts = [panel for section in panels(["bos", "text"]).values() for panel in section if hasattr(panel, "y")]
    wanted = {str(getattr(metric, "name", metric)) for panel in charts for metric in panel.y}
    assert len(wanted) > 12 and not wanted - {key for point in points for key in point}


def test_a_view_without_a_server_is_a_file(tmp_path):
    path = tmp_path / "view.json"
    assert main(["view", "team/sinkbed", "--group", "packing", "--modes", "text", "--out", str(path)]) == 0
    view = json.loads(path.read_text())
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "sinkbed", "Sinks of packing")
    assert [s["name"] for s in sections] == ["Sink", "Layers and heads", "Losses", "Optimizer"]
    first = sections[0]["panels"][0]["config"]
    assert first["metrics"] == ["sink/rate_eps0.3/text"] and first["xAxis"] == "train/tokens" and first["xLogScale"]
    assert "packing" in json.dumps(view["spec"]["section"]["runSets"][0]["filters"])


def test_a_workspace_and_a_report_are_saved(monkeypatch, capsys):
    with serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert main(["view", "sinkbed", "--report"]) == 0
    workspace, report = server.views
    assert (workspace["entityName"], workspace["projectName"], report["type"]) == ("tester", "sinkbed", "runs/draft")
    assert "sink/mass/bos" in workspace["spec"] and "sink/mass/bos" in report["spec"]
    assert capsys.readouterr().out.count("http") == 2


def test_without_a_login_it_says_so(capsys):
    assert main(["view", "sinkbed"]) == 1
    assert "view: expected a W&B login that may write to sinkbed, got none (" in capsys.readouterr().err
    assert main(["view", "sinkbed", "--modes", "boss"]) == 1
    assert "inference mode: expected one of" in capsys.readouterr().err
