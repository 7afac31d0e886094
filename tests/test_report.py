"""The report's files: their schema, that they ask nothing of the network, and that no text of theirs is taken for markup."""

import json
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest

from daekit.report import Report, Row, Sample, format_table, read_rows, write_report
from daekit.report.html import render_html
from daekit.report.markdown import render_markdown
from daekit.report.metrics import format_interval, format_seconds, format_value
from daekit.report.plots import bars_svg, curves_svg, drawn_metrics, gain_forgetting_figure
from daekit.report.tables import bar_of, blocks, breakdowns, pivot

NASTY = '<script>alert(1)</script> & "$x$" | `*'
VOID = {"meta", "br", "img", "link", "input", "hr"}


def measured(model, shop, general):
    return [
        Row(model, "shop", "exact_match", shop, shop - 0.02, min(1.0, shop + 0.02), 100),
        Row(model, "shop", "nll", 2 - shop, 1.9 - shop, 2.1 - shop, 100),
        Row(model, "general", "exact_match", general, general - 0.02, min(1.0, general + 0.02), 400),
    ]


def compared(model, gain, forgetting):
    return [
        Row(model, "shop", "exact_match_gain", gain, gain - 0.02, gain + 0.02, 100),
        Row(model, "general", "exact_match_forgetting", forgetting, forgetting - 0.02, forgetting + 0.02, 400),
    ]


def example(name="dae"):
    rows = [*measured("kd", 0.1, 0.99), *measured(name, 0.97, 0.98), *measured("sft", 0.97, 0.2)]
    return Report(
        title=f"run {name}",
        rows=[*rows, *compared(name, 0.87, 0.01), *compared("sft", 0.87, 0.79)],
        baseline="kd",
        samples=[Sample(name, "shop", 0, f"prompt {name}", "yes", None, f"answer {name}", False, None)],
        curves={name: [{"step": step, "loss": 9 / step, f"kl/{name}": 1 / step} for step in (10, 20, 30)]},
        notes=[f"note {name}"],
        versions={"daekit": "0.1.0", name: name},
        seconds={name: 61.0},
        provenance={"commit": name},
        recipe=f"name: {name}\n",
    )


class Page(HTMLParser):
    """What a browser would make of the page: its tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def test_report_json_holds_exactly_the_rows(tmp_path):
    report = example()
    write_report(tmp_path, report)
    entries = json.loads((tmp_path / "report.json").read_text())
    assert isinstance(entries, list)
    assert all(list(entry) == ["model", "domain", "metric", "value", "low", "high", "n"] for entry in entries)
    assert read_rows((tmp_path / "report.json").read_text()) == list(report.rows)
    (sample,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["generated"] == "answer dae"


def test_a_diverged_model_is_reported_as_such(tmp_path):
    lost = Row("sft", "shop", "nll", math.nan, math.nan, math.inf, 100)
    report = replace(example(), rows=[*measured("kd", 0.5, 0.5), lost, Row("sft", "shop", "nll_gain", *[math.nan] * 3, 1)])
    write_report(tmp_path, report)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert next(entry for entry in json.loads(text) if entry["model"] == "sft")["value"] is None
    assert math.isnan(next(row for row in read_rows(text) if row.model == "sft").value)
    for name in ("report.html", "report.md"):
        assert "not finite" in (tmp_path / name).read_text()
    assert "not finite" in format_table(report.rows)


def test_the_page_asks_nothing_of_the_network(tmp_path):
    write_report(tmp_path, example())
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert page.open == [], "unclosed tags"
    assert "svg" in page.tags
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "img", "base", "form"})
    loading = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert loading and all(value.startswith("#") for _, _, value in loading)
    assert re.findall(r"url\((?!#)", html) == [] and "@import" not in html
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    allowed = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of namespaces, never fetched
    assert set(re.findall(r"https?://[^\s\"<]+", html)) <= allowed


def test_all_text_is_escaped():
    report = example(NASTY)
    page = Page(render_html(report))
    assert "script" not in page.tags
    shown = (f"run {NASTY}", f"prompt {NASTY}", f"answer {NASTY}", f"note {NASTY}", f"name: {NASTY}")
    assert [text for text in shown if text not in page.text] == []
    assert page.text.count(NASTY) >= 12, "a name is missing from the tables or the plots"
    markdown = render_markdown(report, "plot.png")
    before_recipe = markdown[: markdown.index("<details>")]
    assert "<" not in before_recipe
    tables = [block.splitlines() for block in before_recipe.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "a name broke a table"


def test_a_metric_of_any_name_is_text():
    """Names of lm-eval's tasks and of a suite's files become metrics."""
    rows = [Row("m", "shop", NASTY, 0.5, 0.4, 0.6, 10), Row("m", "shop", "acc", 0.5, 0.4, 0.6, 10)]
    page = Page(render_html(replace(example(), rows=rows)))
    assert "script" not in page.tags and NASTY in page.text
    table = next(block for block in render_markdown(replace(example(), rows=rows), None).split("\n\n") if "| metric |" in block)
    assert "<" not in table and re.findall(r"(?<!\\)[`*$]", table) == []
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_domain_that_begins_with_a_line_has_its_curve_in_the_legend():
    assert "_shop" in curves_svg("kd", [{"step": 1, "kl/_shop": 1.0}, {"step": 2, "kl/_shop": 0.5}], ["_shop"]).svg


def test_half_a_surrogate_pair_ends_no_report(tmp_path):
    sample = Sample("m", "shop", 0, "prompt", "", None, "half: \ud83d", None, None)
    write_report(tmp_path, replace(example(), samples=[sample]))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["generated"] == sample.generated
    assert r"half: \ud83d" in (tmp_path / "report.html").read_text()


def test_no_recipe_closes_its_own_fence():
    markdown = render_markdown(replace(example(), recipe="a: |\n  ```\n  ````\n  # heading\n"), None)
    assert markdown.count("`````") == 2


def test_equal_reports_give_equal_files(tmp_path):
    for folder in ("a", "b"):
        write_report(tmp_path / folder, example())
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["gain_forgetting.png", "report.html", "report.json", "report.md", "samples.jsonl"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_report_without_baseline_or_rows_has_no_empty_sections(tmp_path):
    write_report(tmp_path, example())
    write_report(tmp_path, Report("empty", rows=[]))
    assert not (tmp_path / "gain_forgetting.png").exists(), "the plot of another report was left"
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.isdisjoint({"table", "svg", "h2"})
    assert "|" not in (tmp_path / "report.md").read_text()
    write_report(tmp_path, replace(example(), rows=measured("kd", 0.1, 0.9), baseline=None))
    assert "Gain" not in (tmp_path / "report.html").read_text()


def test_every_value_of_the_rows_is_on_the_page():
    report = example()
    page, markdown, text = Page(render_html(report)).text, render_markdown(report, None), format_table(report.rows)
    for row in report.rows:
        value = format_value(row.value, row.metric)
        assert value in page and value in markdown
        assert format_interval(row) in page and format_interval(row) in markdown
        if not row.metric.endswith(("gain", "forgetting")):
            assert value in text


def test_best_of_a_column():
    rows = [Row(m, "d", "nll", v, v, v, 9) for m, v in (("a", 1.0), ("b", 0.5), ("c", 0.5), ("d", math.nan))]
    rows += [Row(m, "d", "exact_match", v, v, v, 9) for m, v in (("a", 1.0), ("b", 0.5))]
    rows += [Row(m, "d", "nll_gain", v, v, v, 9) for m, v in (("a", 1.0), ("b", 0.5))]
    rows += [Row(m, "d", "nll_forgetting", v, v, v, 9) for m, v in (("a", 1.0), ("b", 0.5))]
    table = pivot(rows, ("nll", "exact_match", "nll_gain", "nll_forgetting"))
    assert [set(table.best[column]) for column in table.columns] == [{"b", "c"}, {"a"}, {"a"}, {"b"}]
    assert pivot(measured("kd", 0.5, 0.5)).best == dict.fromkeys(pivot(measured("kd", 0.5, 0.5)).columns, frozenset())


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.98765, "exact_match", "98.8%"),
        (1.23456, "nll", "1.235"),
        (-0.1, "exact_match_gain", "−10.0 pt"),
        (0.1, "exact_match_forgetting", "+10.0 pt"),
        (-0.00001, "nll_gain", "0.000"),
        (1234567.0, "perplexity", "1.23e+06"),
        (math.nan, "nll", "not finite"),
        (7.333, "judge_score", "7.33"),
        (45.678, "win_rate", "45.7%"),
        (3.0, "missing_judgments", "3"),
        (0.5, "accuracy", "50.0%"),
    ],
)
def test_format_value(value, metric, text):
    assert format_value(value, metric) == text


def test_format_seconds():
    assert [format_seconds(s) for s in (0.4, 59.6, 185, 7800)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]


def test_terminal_table_is_aligned():
    lines = format_table(example().rows).splitlines()
    assert len(lines) == 3 + 3
    starts = [lines[1].index("exact match"), lines[1].index("NLL"), lines[1].rindex("exact match")]
    for line, value in zip(lines[3:], ("1.900", "1.030", "1.030"), strict=True):
        assert line.index(value) == starts[1]
    assert lines[0].index("shop") == starts[0] and lines[0].index("general") == starts[2]


def test_gain_and_forgetting_are_drawn_for_metrics_that_say_something():
    def both(metric, value):
        return [Row("dae", d, f"{metric}_{k}", value, value, value, 9) for d, k in (("s", "gain"), ("g", "forgetting"))]

    assert drawn_metrics([*both("exact_match", 0.5), *both("nll", 1.0)]) == ["exact_match", "nll"]
    assert drawn_metrics([*both("exact_match", 0.0), *both("token_accuracy", 0.1)]) == ["token_accuracy"]
    assert drawn_metrics(both("exact_match", 0.0)) == ["exact_match"]
    nothing_to_forget = [both("exact_match", 0.5)[0], Row("dae", "g", "exact_match_forgetting", 0.0, 0.0, 0.0, 9)]
    assert drawn_metrics([*nothing_to_forget, *both("token_accuracy", 0.1)]) == ["token_accuracy"]
    assert drawn_metrics(nothing_to_forget) == ["exact_match"]
    assert drawn_metrics(both("nll", 1.0)[:1]) == []


def test_a_model_that_takes_on_the_style_of_general_rows_is_drawn_at_its_kl():
    def rows(drift_of_baseline):
        drifts = {"kd": drift_of_baseline, "dae": 0.01, "sft": 0.23}
        nll = [("dae", 0.97, 0.006), ("sft", 0.95, -0.24)]
        compared = [
            Row(m, d, f"nll_{k}", v, v, v, 9) for m, g, f in nll for d, k, v in (("s", "gain", g), ("g", "forgetting", f))
        ]
        return compared + [Row(m, d, "kl_to_reference", v, v, v, 9) for m, v in drifts.items() for d in ("s", "g")]

    def xs(figure):
        (ax,) = figure.axes
        return [bars.lines[0].get_xydata()[0].tolist()[0] for bars in ax.containers]

    assert xs(gain_forgetting_figure(rows(0.0), ("kd", "dae", "sft"), "kd", "#000000")) == [0.01, 0.23]
    assert xs(gain_forgetting_figure(rows(0.5), ("kd", "dae", "sft"), "kd", "#000000")) == [0.006, -0.24], "another reference"


def test_models_stand_at_their_forgetting_and_gain():
    figure = gain_forgetting_figure([*compared("dae", 0.8, 0.1), *compared("sft", 0.7, 0.6)], ("dae", "sft"), "kd", "#000000")
    (ax,) = figure.axes
    points = [bars.lines[0].get_xydata()[0].tolist() for bars in ax.containers]
    assert points == [[pytest.approx(10), pytest.approx(80)], [pytest.approx(60), pytest.approx(70)]]
    assert [text.get_text() for text in ax.texts] == ["kd", "dae", "sft"]


def test_differences_are_coloured_when_their_interval_leaves_out_zero():
    html = render_html(example())
    for value, colour in (("+87.0 pt", "good"), ("+1.0 pt", ""), ("+79.0 pt", "bad")):
        assert f'<span class="number {colour}">{value}</span>' in html
    assert '<span class="number good">97' not in html


def test_curves_show_domains_and_skip_what_cannot_be_drawn():
    history = [{"step": 1, "loss": 2.0, "kl": 1.0, "kl/shop": 0.5, "kl/general": 1.5}, {"train_runtime": 3.0}]
    history += [{"step": 2, "loss": math.inf, "kl/shop": 0.4, "kl/general": 1.2, "eval_loss": 1.0}]
    curves = curves_svg("dae", history, ["general", "shop"])
    assert curves.panels == 2
    for text in ("loss", "KL to teacher", "shop", "general", "evaluation"):
        assert f">{text}" in curves.svg
    assert curves.svg.count(">training") == 1, "the total is drawn beside its domains"
    assert "<style" not in curves.svg, "would apply to the whole page"
    others = curves_svg("kd", [{"step": 1, "jsd": 1.0, "hidden_mse": 2.0, "grad_norm": 3.0}], [])
    assert others.panels == 2 and ">jsd to teacher" in others.svg and ">hidden states (squared" in others.svg
    assert ">$x$ < y<" in curves_svg("s", [{"step": 1, "kl/$x$ < y": 1.0}], []).svg.replace("&lt;", "<")
    assert curves_svg("lost", [{"step": 1, "loss": math.nan}], []) is None
    assert curves_svg("empty", [{"step": 1, "learning_rate": 0.1}], []) is None


def parts(model, count, value=0.5, metric="accuracy", whole="blimp"):
    rows = [Row(model, whole, metric, value, value - 0.1, value + 0.1, 10 * count)]
    return rows + [Row(model, f"{whole}/part_{at}", metric, value, value - 0.1, value + 0.1, 10) for at in range(count)]


def test_many_parts_of_a_domain_stand_apart():
    few, many = parts("a", 4), [*parts("a", 5), *parts("b", 5, 0.7)]
    assert len(pivot(few).columns) == 5 and breakdowns(few) == []
    assert [column.domain for column in pivot(many).columns] == ["blimp"]
    (breakdown,) = breakdowns(many)
    assert breakdown.parts == tuple(f"part_{at}" for at in range(5)) and breakdown.models == ("a", "b")
    assert breakdown.cells["part_3", "b"].value == 0.7
    assert pivot(many).best[pivot(many).columns[0]] == {"b"}
    report = replace(example(), rows=[*many, *parts("a", 8, 7.5, "judge_score", "mt_bench")])
    html, markdown = render_html(report), render_markdown(report, None)
    for text in ("blimp: accuracy", "part_4", "mt_bench: score, 1 to 10", "part_7"):
        assert text in html
        assert text.replace("_", r"\_") in markdown
    assert bars_svg(breakdown, ["a", "b"]) is not None
    assert bars_svg(breakdowns(parts("a", 67))[0], ["a"]) is None, "67 bars cannot be told apart"


def test_a_wide_table_is_shown_in_blocks():
    rows = [Row("a", f"d{at}", metric, 0.5, 0.4, 0.6, 9) for at in range(5) for metric in ("exact_match", "nll", "accuracy")]
    table = pivot(rows)
    found = blocks(table)
    assert [len(block.columns) for block in found] == [6, 6, 3]
    assert sum((block.columns for block in found), ()) == table.columns
    assert blocks(pivot(rows[:6])) == [pivot(rows[:6])]
    wide = replace(example(), rows=[Row("a", "d", f"m{at}", 0.5, 0.4, 0.6, 9) for at in range(3)])
    assert [len(block.columns) for block in blocks(pivot(wide.rows, ("m0", "m1", "m2")), 2)] == [3], "a domain stays together"


def test_parts_without_a_whole_are_domains_of_their_own():
    rows = [row for row in parts("a", 9) if "/" in row.domain]
    assert breakdowns(rows) == [] and len(pivot(rows).columns) == 9


def test_bars_are_shares_of_the_most_there_can_be():
    assert bar_of(Row("a", "d", "judge_score", 7.0, 6.0, 8.0, 80)) == (0.7, 0.6, 0.8)
    assert bar_of(Row("a", "d", "win_rate", 50.0, 40.0, 101.0, 80)) == (0.5, 0.4, 1.0)
    assert bar_of(Row("a", "d", "accuracy", 0.5, 0.4, 0.6, 80)) == (0.5, 0.4, 0.6)
    assert bar_of(Row("a", "d", "nll", 0.5, 0.4, 0.6, 80)) is None
    assert bar_of(Row("a", "d", "accuracy", math.nan, 0.4, 0.6, 80)) is None


def test_open_answers_show_what_the_judge_said_and_no_cross():
    sample = Sample("a", "mt_bench", 81, "ask", "", None, "say", None, None, mark="8 · 7")
    report = replace(example(), samples=[sample])
    html, markdown = render_html(report), render_markdown(report, None)
    assert "8 · 7" in html and "8 · 7" in markdown
    assert "✗" not in html and "reference</th>" not in html and "*reference*" not in markdown


def test_the_sizes_of_many_parts_are_not_listed_below_the_headline():
    rows = [
        Row("a", f"blimp{part}", "accuracy", 0.5, 0.4, 0.6, n) for part, n in [("", 400), *((f"/p{i}", 20) for i in range(20))]
    ]
    page = render_markdown(replace(example(), rows=tuple(rows), baseline=None), None)
    assert "(blimp: n = 400)." in page


def test_rows_have_the_seven_keys():
    assert [field.name for field in fields(Row)] == ["model", "domain", "metric", "value", "low", "high", "n"]
