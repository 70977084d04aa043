"""Tables and pictures of what a probe measured."""

from sinkbed.train.report.model_figures import pictures
from sinkbed.train.report.model_tables import tables


def test_the_table_of_sinks_has_columns_for_what_differs():
    rates = {eps: [[10.0, 30.0]] for eps in ("0.2", "0.3", "0.5", "0.8")}
    figures = {"rate": rates, "mass": [[0.1, 0.3]], "loss": 3.0, "bits_per_byte": 1.0}
    placed = figures | {"rate_placed": rates, "mass_placed": figures["mass"]}

    def header(sinks):
        return tables({"sinks": sinks})[0].header

    natural = {"natural": {"bos": {"0": figures}, "text": {"0": figures}}}
    assert not {"input read", "key"} & {*header(natural)} and "mode" in header(natural)
    learned = ("raw sink mass", "rate of shares %", "sink share", "mass on the learned key")
    assert not {*learned} & {*header(natural)}
    shares = figures | {"rate_share": rates, "share": [[0.2, 0.4]], "learned_mass": [[0.5, 0.7]]}
    shares["mass_raw"] = [[1.5, 2.5]]
    [table] = tables({"sinks": {"natural": {"bos": {"0": shares}}}})
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert [round(row[name], 6) for name in learned] == [2.0, 20.0, 0.3, 0.6]
    assert "input read" in header(natural | {"random": {"bos": {"0": figures}}})
    assert "key" in header({"natural": {"bos": {"0": figures, "1": placed}}})


def test_the_learned_key_has_a_picture_where_there_is_one():
    def names(**figures):
        return [p.name for p in pictures({"sinks": {"natural": {"text": {"0": {"mass": [[0.1, 0.2]], **figures}}}}})]

    assert names() == names(learned_mass=None) == ["sink_heads"]
    assert names(learned_mass=[[0.5, 0.7]]) == ["sink_heads", "learned_key"]
