"""The scaling model: what is in docs/scaling.md comes from it, and it behaves as the relay does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scripts.tools import scaling, scaling_inputs
from scripts.tools.scaling import Result, as_data, markdown, page, rounded, sheets, sized, work_out
from scripts.tools.scaling_inputs import InputError, Inputs, Stage, load
from scripts.tools.scaling_lots import Groups, groups, traffic
from scripts.tools.scaling_model import UNDIVIDED, plan, predicted

# Working out all stages takes half a minute, and on a machine that does other things many times as long.
pytestmark = pytest.mark.timeout(900)

DRAWN = 1000


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return load()


@pytest.fixture(scope="module")
def result(inputs: Inputs) -> Result:
    return work_out(inputs)


def node(inputs: Inputs, *, rate: float = 500, nodes: int = 10, lanes: int = 1, slow: float = 1) -> Groups:
    return groups(inputs, traffic(inputs, DRAWN), rate=rate, nodes=nodes, lanes=lanes, slow=slow, count=DRAWN)


# The page


@pytest.mark.faults
def test_the_page_has_exactly_the_tables_that_the_script_makes(result: Result) -> None:
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert page(text, markdown(sheets(result))) == text, "run scripts/scaling --write"


@pytest.mark.faults
def test_the_same_figures_make_the_same_tables(inputs: Inputs, result: Result) -> None:
    last = inputs.stages[-1]
    assert plan(inputs, last) == result.plans[-1]


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(InputError, match="must have the lines"):
        page("no marks", "tables")


@pytest.mark.faults
def test_an_outdated_page_is_found_and_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: Result
) -> None:
    monkeypatch.setattr(scaling, "work_out", lambda _: result)
    monkeypatch.setattr(scaling, "PAGE", tmp_path / "scaling.md")
    scaling.PAGE.write_text(f"# Mine\n\n{scaling.BEGIN}\noutdated\n{scaling.END}\nkept\n")
    run = CliRunner().invoke
    found = run(scaling.app, ["--check"])
    assert (found.exit_code, found.stderr) == (
        1,
        "scaling: docs/scaling.md is out of date: run scripts/scaling --write\n",
    )
    assert run(scaling.app, ["--write"]).exit_code == 0
    assert run(scaling.app, ["--check"]).exit_code == 0
    text = scaling.PAGE.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("kept\n")
    assert "outdated" not in text


@pytest.mark.faults
def test_what_is_written_for_machines_holds_every_stage_lever_and_figure(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs, result: Result
) -> None:
    monkeypatch.setattr(scaling, "work_out", lambda _: result)
    found = CliRunner().invoke(scaling.app, ["--json", "-"])
    data = json.loads(found.output)
    assert data == json.loads(json.dumps(as_data(result)))
    assert [one["messages"] for one in data["stages"]] == [stage.messages for stage in inputs.stages]
    assert data["stages"][-1]["nodes"] == result.plans[-1].nodes
    assert len(data["levers"]) == len(inputs.levers)
    assert data["figures"]["connection_kb"] == {
        "value": 20.3,
        "unit": "kB",
        "kind": "measured",
        "source": inputs.figures["connection_kb"].source,
    }


# The figures


def test_every_measured_figure_names_its_bench_and_day(inputs: Inputs) -> None:
    source = ""
    for figure in inputs:
        if figure.kind != "measured":
            continue
        # "the same" goes on with the figure before it.
        source = source if figure.source.startswith("the same") else figure.source
        assert source.startswith(("scripts/bench ", "docs/performance.md, ")), figure.name
        assert ", 2026-11-2" in source, figure.name


def test_ten_million_devices_a_million_connected_and_a_hundred_thousand_messages_are_worked_out(
    inputs: Inputs,
) -> None:
    last = inputs.stages[-1]
    assert (last.devices, last.connected, last.messages) == (10_000_000, 1_000_000, 100_000)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[figures", "cannot be read"),
        ("[figures.a]\nvalue = 1\nunit = 's'\nkind = 'guessed'\nsource = 'x'\n", "a needs a unit"),
        ("[figures.a]\nvalue = 1\nunit = 's'\nkind = 'assumed'\nsource = ' '\n", "a needs a unit"),
        ("[[levers]]\nname = 'x'\nbuilt = true\nvalues = { unheard = 1 }\n", "no figure unheard"),
    ],
)
def test_figures_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path, broken: str, said: str) -> None:
    file = tmp_path / "scaling.toml"
    rest = {
        "figures": "[figures]",
        "stages": "stages = []",
        "levers": "levers = []",
        "observed": "observed = []",
    }
    kept = [line for name, line in rest.items() if name not in broken and name != "figures"]
    file.write_text("\n".join([*kept, broken if "figures" in broken else f"{broken}\n[figures]"]))
    with pytest.raises(InputError, match=said) as error:
        load(file)
    assert "\n" not in str(error.value)


# The model


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_the_model_agrees_with_what_was_measured(inputs: Inputs, place: int) -> None:
    seen = inputs.observed[place]
    said = predicted(inputs, seen)
    # Runs of the bench itself differ by a third from hour to hour.
    assert said.relay == pytest.approx(seen.relay, rel=0.5)
    assert said.mongod == pytest.approx(seen.mongod, rel=0.5)


def test_group_commits_shrink_to_single_messages_as_nodes_and_lanes_grow(inputs: Inputs) -> None:
    few = node(inputs, rate=2000, lanes=1).send_commits
    many = node(inputs, rate=2000, lanes=30).send_commits
    slow = node(inputs, rate=50, lanes=1).send_commits
    assert few < 0.25
    assert many > 3 * few
    assert 0.8 < slow <= 1


def test_a_slower_store_makes_larger_groups(inputs: Inputs) -> None:
    assert node(inputs, slow=4).send_commits < 0.7 * node(inputs).send_commits


def test_a_group_goes_to_no_more_nodes_than_there_are_or_than_it_has_recipients(inputs: Inputs) -> None:
    alone = inputs.changed({"group_messages": 0, "recipient_online": 1, "receipts_ms": 1e9})
    assert node(alone, nodes=1).publications == 0
    two, many = node(alone, rate=2000, nodes=2), node(alone, rate=2000, nodes=1000)
    # Half of the recipients are at the sender's node.
    assert two.copies == pytest.approx(0.5, abs=0.1)
    assert 0.95 < many.copies <= 1
    assert two.publications < 0.5
    assert many.publications > 0.9


def test_a_message_waits_for_its_slowest_recipient(inputs: Inputs) -> None:
    single = traffic(inputs.changed({"group_messages": 0}), DRAWN)
    grouped = traffic(inputs.changed({"group_messages": 1, "group_median": 30}), DRAWN)
    assert single.kept_seconds == single.kept_names
    assert single.documents == single.deliveries == 1
    assert grouped.kept_seconds > 3 * single.kept_seconds
    assert grouped.kept_names > grouped.kept_seconds
    assert grouped.documents < grouped.deliveries


def test_who_is_always_connected_leaves_nothing_behind(inputs: Inputs) -> None:
    assert traffic(inputs.changed({"recipient_online": 1}), DRAWN).kept_seconds == 0


@pytest.mark.faults
def test_a_plan_suffices_and_less_would_not(inputs: Inputs, result: Result) -> None:
    for one in result.plans:
        assert one.nodes >= 1
        assert one.shards >= 1
        names = ["relay CPU", "connections of a node", "MongoDB disk"]
        if not one.broken:
            names += ["MongoDB CPU", *UNDIVIDED]
        for name in names:
            needed, has = one.limits[name]
            assert needed <= has, (one.stage.name, name)
    small = plan(inputs, Stage("small", 10, 1, 1))
    assert (small.nodes, small.shards, small.redis) == (1, 1, 0)


def test_a_lever_changes_only_what_it_names(inputs: Inputs) -> None:
    lever = next(one for one in inputs.levers if set(one.values) == {"fate_hours"})
    pulled = inputs.pulled(lever)
    assert pulled["fate_hours"] == 24
    assert {name for name in inputs.figures if inputs[name] != pulled[name]} == {"fate_hours"}
    with pytest.raises(InputError, match="no figure unheard"):
        inputs.pulled(replace(lever, values={"unheard": 1}))


def test_numbers_are_shown_in_two_digits() -> None:
    assert [rounded(value) for value in (0, 0.0123, 1.26, 12.6, 1264)] == ["0", "0.012", "1.3", "13", "1,300"]
    assert [sized(value) for value in (0, 999, 1_260, 3.49e9, 2.2e12)] == [
        "0 B",
        "1,000 B",
        "1.3 kB",
        "3.5 GB",
        "2.2 TB",
    ]


def test_the_figures_lie_beside_the_page() -> None:
    assert scaling_inputs.FILE.parent == scaling.PAGE.parent
