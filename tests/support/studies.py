"""A study of two tiny arms, and its table."""

import contextlib
import csv
import subprocess
import sys

from tests.support.runs import write_run_config


def write_study(folder, store):
    """A study file of two arms, fixed BOS and none, with its configs beside it."""
    write_run_config(folder / "run.yaml", store)
    (folder / "none.yaml").write_text("data: {strategy: {first_token: none}}\n")
    (folder / "bos.yaml").write_text("data: {strategy: {first_token: bos}}\n")
    path = folder / "study.yaml"
    path.write_text(
        f"""
title: A study <of> two arms
question: Which?
out: {folder / "out"}
base: [run.yaml]
workers: 2
arms:
  fixed: [bos.yaml]
  absent: [none.yaml]
published:
  fixed: {{bos: [90.84, 2.69]}}
"""
    )
    return path


def table(path):
    with (path.parent / "out" / "report" / "table.csv").open() as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def locked(folder):
    """Another process that holds a folder: a lock of this process would let this process in."""
    code = f"from sinkbed.train.run import directory as d; held = d.lock(d.Path({str(folder)!r})); "
    code += "print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        yield
