"""The views and trees of lineage, on a graph run with fake engines and on small stores written by hand."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import duckdb
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from tests.conftest import make_transfer_folder
from tests.fakes import FakeModels
from tuneshift_dag import TuneshiftError
from tuneshift_dag.assets import build_assets
from tuneshift_dag.cli import app, rendering
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.home import database_file
from tuneshift_dag.method.prompting import distinct_bigrams
from tuneshift_dag.reports.lineage import Call, Prompt, down, up
from tuneshift_dag.runner import Runner
from tuneshift_dag.store import Store, tables
from tuneshift_dag.store.queries import COLUMN_SOURCES, TRANSFER_VIEWS, View
from tuneshift_dag.store.tables import SYNTHETIC_PROMPTS, TRANSFER_TABLES

DOCS = Path(__file__).parents[2] / "docs" / "lineage.md"
ROUNDS = 4


@dataclass
class Graph:
    home: Path
    transfer: Transfer
    store: Store
    metadata: dict[tuple[str, str | None], dict[str, dg.MetadataValue]]

    def rows(self, query: str, *parameters: object) -> list[tuple[object, ...]]:
        return self.store.read(query, parameters, self.transfer.name).rows()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A transfer whose every asset was materialized once; the tests of this file only read it."""
    root = tmp_path_factory.mktemp("graph")
    folder = make_transfer_folder(root)
    settings = yaml.safe_load((folder / "transfer.yaml").read_text())
    (folder / "transfer.yaml").write_text(yaml.safe_dump({**settings, "rounds": ROUNDS}))
    transfer = load_transfer(folder)
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setenv("TUNESHIFT_HOME", str(root / "home"))
        done = Runner(transfer, instance, FakeModels().resource()).run().materialized
        store = Store(database_file())
        metadata = {}
        for asset, round_ in done:
            found = instance.fetch_materializations(
                dg.AssetRecordsFilter(
                    dg.AssetKey([transfer.name, asset]), asset_partitions=[round_] if round_ else None
                ),
                limit=1,
            )
            metadata[asset, round_] = dict(found.records[0].asset_materialization.metadata)
    return Graph(root / "home", transfer, store, metadata)


@pytest.fixture
def transfer(transfer_folder: Path) -> Transfer:
    return load_transfer(transfer_folder)


def grow(store: Store, seeds: list[str], calls: dict[str, tuple[str, list[str], list[str]]]) -> None:
    """Write a history by hand: for each call its round, its seeds and the prompts that it wrote."""
    with store.transaction("banking") as connection:
        for seed in seeds:
            connection.execute("INSERT INTO seed_set VALUES (?, ?, ' answer')", [seed, f"text of {seed}"])
        for number, (call, (round_, shown, written)) in enumerate(calls.items()):
            connection.execute("INSERT INTO proposals VALUES (?, ?, ?, ?, 'a list')", [round_, call, number, shown])
            for position, prompt in enumerate(written):
                connection.execute(
                    "INSERT INTO synthetic_prompts VALUES (?, ?, ?, ?, ?)",
                    [round_, prompt, f"text of {prompt}", call, position],
                )


def outline(prompt: Prompt) -> dict[str, object]:
    """A tree as nested dicts; a node that is drawn elsewhere ends with an ellipsis."""
    calls: dict[str, object] = {}
    for call in prompt.calls:
        children: dict[str, object] = {}
        for child in call.prompts:
            children |= {f"{child.prompt_id}…": {}} if child.repeated else outline(child)
        calls |= {f"{call.proposal_id}…": {}} if call.repeated else {call.proposal_id: children}
    return {prompt.prompt_id: calls}


# --- the views ---


@pytest.mark.parametrize("view", TRANSFER_VIEWS, ids=lambda view: view.name)
def test_the_documentation_describes_the_columns_of_a_view(store, view):
    columns = store.read(f"DESCRIBE {view.name}", schema="banking").select("column_name", "column_type").rows()
    assert re.findall(rf"\| `{view.name}` \| `(\w+)` \| (\w+) \|", DOCS.read_text()) == columns


@pytest.mark.parametrize("view", TRANSFER_VIEWS, ids=lambda view: view.name)
def test_views_of_a_transfer_without_rows_are_empty(store, view):
    assert store.read(f"FROM {view.name}", schema="banking").is_empty()


def test_a_view_of_older_code_is_replaced_and_its_description_is_in_the_database(store, monkeypatch):
    older = View("rejections", "Old.", "SELECT 1 AS one")
    monkeypatch.setattr("tuneshift_dag.store.TRANSFER_VIEWS", (older,))
    assert store.read("FROM rejections", schema="banking").rows() == [(1,)]
    monkeypatch.undo()
    monkeypatch.setattr("tuneshift_dag.store.file._READY", {})  # as in another process
    fresh = Store(store.path)
    assert fresh.read("FROM rejections", schema="banking").is_empty()
    comment = fresh.read("SELECT comment FROM duckdb_views() WHERE view_name = 'rejections'", schema="banking").item()
    assert comment.startswith("Everything that was dropped")


def test_views_read_the_tables_of_their_own_transfer(store, transfer):
    grow(store, ["5eed"], {"c1": ("round_01", ["5eed"], ["a1"])})
    assert store.read("SELECT count(*) FROM lineage", schema="other").item() == 0
    assert store.read("SELECT count(*) FROM banking.lineage", schema="other").item() == 4


def test_every_prompt_leads_back_to_the_seed_set(graph):
    lost = graph.rows(
        "SELECT prompt_id FROM synthetic_prompts WHERE prompt_id NOT IN"
        " (SELECT root_prompt_id FROM lineage WHERE kind = 'seed')"
    )
    assert lost == []
    assert graph.rows("SELECT count(*) FROM lineage WHERE kind = 'gone'") == [(0,)]


def test_the_nearest_steps_of_a_prompt_are_its_call_and_that_calls_seeds(graph):
    found = graph.rows(
        "SELECT prompt_id, proposal_id, kind = 'call', list_sort(seed_ids), list_sort(list(id)), any_value(led_to)"
        " FROM synthetic_prompts JOIN proposals USING (proposal_id) JOIN lineage ON root_prompt_id = prompt_id"
        " WHERE depth = 1 GROUP BY ALL"
    )
    assert len(found) == 2 * graph.rows("SELECT count(*) FROM synthetic_prompts")[0][0]
    for prompt_id, proposal_id, is_call, seeds, ids, led_to in found:
        assert (ids, led_to) == (([proposal_id], prompt_id) if is_call else (seeds, proposal_id))


def test_a_view_has_the_same_steps_as_the_tree(graph):
    def edges(prompt: Prompt) -> set[tuple[str, str]]:
        found = set()
        for call in prompt.calls:
            found.add((call.proposal_id, prompt.prompt_id))
            for seed in call.prompts:
                found |= {(seed.prompt_id, call.proposal_id)} | edges(seed)
        return found

    for (prompt_id,) in graph.rows("SELECT prompt_id FROM synthetic_prompts WHERE round = 'round_04' LIMIT 3"):
        steps = graph.rows("SELECT id, led_to FROM lineage WHERE root_prompt_id = ? AND depth > 0", prompt_id)
        assert len(steps) == len(set(steps))
        assert set(steps) == edges(up(graph.store, graph.transfer, str(prompt_id)))


def test_the_round_summary_adds_up(graph):
    rows = graph.store.read("FROM round_summary", schema="banking")
    assert rows["round"].to_list() == graph.transfer.round_keys
    for column, table in (
        ("generator_calls", "proposals"),
        ("prompts", "synthetic_prompts"),
        ("rejected_prompts", "rejected_prompts"),
        ("scored", "scored_pairs"),
        ("kept", "filtered_dataset"),
    ):
        assert rows[column].sum() == graph.rows(f"SELECT count(*) FROM {table}")[0][0]
    assert rows["kept_share"].to_list() == (rows["kept"] / rows["scored"]).to_list()
    assert [(rows["new_responses"].sum(),)] == graph.rows("SELECT count(DISTINCT trim(response)) FROM filtered_dataset")
    assert (rows["mean_ppl_base"] > rows["mean_ppl_fine_tuned"]).all()
    for row in rows.iter_rows(named=True):
        prompts = graph.store.read("SELECT prompt FROM synthetic_prompts WHERE round = ?", [row["round"]], "banking")
        assert row["distinct_bigrams"] == pytest.approx(distinct_bigrams(prompts["prompt"]))
        assert (row["repetition"], row["similarity"]) == (0, None)


def test_the_round_summary_sees_words_as_the_method_does(store, transfer):
    prompts = ["Where’s my “card”?", "Where's my card\t(the new one)?", "it is it is it is it is", "Card?"]
    rows = [
        {"round": "round_01", "prompt_id": str(i), "prompt": prompt, "proposal_id": "x", "position": i}
        for i, prompt in enumerate(prompts)
    ]
    store.replace("banking", SYNTHETIC_PROMPTS, SYNTHETIC_PROMPTS.frame(rows))
    (row,) = store.read("FROM round_summary", schema="banking").to_dicts()
    assert row["distinct_bigrams"] == pytest.approx(distinct_bigrams(prompts))
    assert row["repetition"] == pytest.approx((1 - 2 / 5) / 4), "of one prompt two 4-grams of five"


def test_a_round_that_had_nothing_to_do_is_in_the_summary(store, transfer):
    with store.transaction("banking") as connection:
        connection.execute("INSERT INTO steps (run_id, asset, round) VALUES ('r', 'synthetic_prompts', 'round_01')")
    (row,) = store.read("FROM round_summary", schema="banking").to_dicts()
    assert (row["round"], row["generator_calls"], row["scored"], row["kept_share"]) == ("round_01", 0, 0, None)


def test_every_dropped_item_and_pair_is_a_rejection_and_no_kept_one_is(graph):
    assert graph.rows("SELECT stage, count(*) FROM rejections GROUP BY stage ORDER BY stage") == [
        ("pair", graph.rows("SELECT count(*) FROM rejected_pairs")[0][0]),
        ("prompt", graph.rows("SELECT count(*) FROM rejected_prompts")[0][0]),
    ]
    assert graph.rows("SELECT count(*) FROM rejections WHERE prompt IS NULL OR proposal_id IS NULL") == [(0,)]
    assert graph.rows("SELECT count(*) FROM rejections JOIN filtered_dataset USING (round, prompt_id)") == [(0,)]


# --- the trees ---


def test_up_leads_from_a_prompt_through_its_calls_to_the_seeds(store, transfer):
    grow(
        store,
        ["5eed1", "5eed2"],
        {"c1": ("round_01", ["5eed1", "5eed2"], ["a1", "a2"]), "c2": ("round_02", ["a1", "5eed1"], ["b1"])},
    )
    assert outline(up(store, transfer, "b1")) == {"b1": {"c2": {"a1": {"c1": {"5eed1": {}, "5eed2": {}}}, "5eed1": {}}}}
    assert outline(up(store, transfer, "5eed1")) == {"5eed1": {}}


def test_down_leads_from_a_seed_to_every_prompt(store, transfer):
    grow(
        store,
        ["5eed"],
        {
            "c1": ("round_01", ["5eed"], ["a1", "a2"]),
            "c2": ("round_02", ["a1", "a2"], ["b1"]),
            "c3": ("round_02", ["5eed"], []),
        },
    )
    assert outline(down(store, transfer, "5eed")) == {
        "5eed": {"c1": {"a1": {"c2": {"b1": {}}}, "a2": {"c2…": {}}}, "c3": {}}
    }
    assert outline(down(store, transfer, "b1")) == {"b1": {}}


def test_ancestors_that_two_branches_share_are_expanded_once(store, transfer):
    calls = {"c0": ("round_01", ["5eed"], ["p0a", "p0b"])}
    for n in range(1, 12):
        calls[f"c{n}"] = (f"round_{n + 1:02}", [f"p{n - 1}a", f"p{n - 1}b"], [f"p{n}a", f"p{n}b"])
    grow(store, ["5eed"], calls)
    text = json.dumps(outline(up(store, transfer, "p11a")))
    assert len(re.findall(r'"c\d+"', text)) == 12
    assert store.read("SELECT max(depth) FROM lineage", schema="banking").item() == 12


def test_a_cycle_ends(store, transfer):
    """round_01 was grown anew and now holds no a1; round_03 wrote it again, from what it had led to."""
    grow(
        store,
        ["5eed"],
        {"c2": ("round_02", ["a1", "5eed"], ["b1"]), "c3": ("round_03", ["b1"], ["a1"])},
    )
    assert outline(up(store, transfer, "b1")) == {"b1": {"c2": {"a1": {"c3": {"b1…": {}}}, "5eed": {}}}}
    assert outline(down(store, transfer, "b1")) == {"b1": {"c3": {"a1": {"c2": {"b1…": {}}}}}}
    steps = store.read(
        "SELECT depth, kind, id, led_to FROM lineage WHERE root_prompt_id = 'b1' ORDER BY ALL", schema="banking"
    )
    assert steps.rows() == [
        (0, "prompt", "b1", None),
        (1, "call", "c2", "b1"),
        (1, "prompt", "a1", "c2"),
        (1, "seed", "5eed", "c2"),
        (2, "call", "c3", "a1"),
        (2, "prompt", "b1", "c3"),
    ]


def test_a_seed_whose_round_was_grown_anew_is_gone_and_still_found(store, transfer):
    grow(store, [], {"c2": ("round_02", ["a1"], ["b1"])})
    (gone,) = up(store, transfer, "b1").calls[0].prompts
    assert (gone.prompt_id, gone.prompt, gone.round, gone.fate) == ("a1", None, None, "gone")
    assert outline(down(store, transfer, "a1")) == {"a1": {"c2": {"b1": {}}}}
    steps = store.read("SELECT kind, text FROM lineage WHERE id = 'a1'", schema="banking")
    assert steps.rows() == [("gone", None)]


def test_a_prompts_fate_is_told(graph):
    fates: dict[str, set[str]] = {"kept": set(), "dropped": set(), "seed": set()}
    seen = set()

    def walk(prompt: Prompt) -> None:
        fates[prompt.fate].add(prompt.prompt_id)
        seen.add(prompt.prompt_id)
        assert (prompt.reason is not None) == (prompt.fate == "dropped")
        assert (prompt.response is not None) == prompt.trained_on == (prompt.fate == "kept")
        for call in prompt.calls:
            for child in call.prompts:
                walk(child)

    for (seed,) in graph.rows("SELECT prompt_id FROM seed_set"):
        walk(down(graph.store, graph.transfer, str(seed)))
    assert fates["kept"] == {i for (i,) in graph.rows("SELECT prompt_id FROM filtered_dataset")}
    assert fates["dropped"] == {i for (i,) in graph.rows("SELECT prompt_id FROM rejected_pairs")}
    assert seen == {i for (i,) in graph.rows("SELECT prompt_id FROM synthetic_prompts")} | fates["seed"]


def test_before_scoring_and_before_the_filter_a_prompt_has_no_verdict(store, transfer):
    grow(store, ["5eed"], {"c1": ("round_01", ["5eed"], ["a1", "a2"])})
    with store.transaction("banking") as connection:
        connection.execute("INSERT INTO scored_pairs (round, prompt_id) VALUES ('round_01', 'a2')")
        connection.execute("INSERT INTO rejected_prompts VALUES ('round_01', 'c1', 2, 'A', 'duplicate')")
    (call,) = down(store, transfer, "5eed").calls
    assert [prompt.fate for prompt in call.prompts] == ["unscored", "unjudged"]
    assert (call.round, call.number, call.written, call.dropped) == ("round_01", 0, 2, 1)


def test_the_beginning_of_one_id_is_enough(store, transfer):
    grow(store, ["5eed"], {"c1": ("round_01", ["5eed"], ["abc1", "abc2", "ab"])})
    assert up(store, transfer, " 5e ").prompt_id == "5eed"
    assert up(store, transfer, "abc2").prompt_id == "abc2"
    assert up(store, transfer, "ab").prompt_id == "ab"
    with pytest.raises(TuneshiftError, match=r"'abc' begins 2 prompt ids of banking \(abc1, abc2\)\. Give more digits"):
        down(store, transfer, "abc")


def test_the_text_of_a_prompt_names_it(graph):
    assert up(graph.store, graph.transfer, "where is my card").prompt == "Where is my card?"


@pytest.mark.parametrize("given", ["ffff", "", "What was that?", "5eed%"])
def test_an_unknown_prompt_is_refused_with_where_to_find_ids(store, transfer, given):
    grow(store, ["5eed"], {})
    with pytest.raises(
        TuneshiftError, match=r"banking has no prompt .*prompt_id of seed_set, synthetic_prompts"
    ) as error:
        up(store, transfer, given)
    assert str(store.path) in str(error.value)


# --- the command line ---


def run_cli(graph: Graph, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setenv("TUNESHIFT_HOME", str(graph.home))
    monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(graph.transfer.folder.parent))
    # The console was made at import, for another standard output.
    monkeypatch.setattr(rendering, "out", Console(width=300))
    result = CliRunner().invoke(app, ["lineage", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_draws_the_tree(graph, monkeypatch):
    ((prompt_id, prompt, response),) = graph.rows(
        "SELECT prompt_id, prompt, trim(response) FROM filtered_dataset WHERE round = 'round_02' LIMIT 1"
    )
    lines = run_cli(graph, monkeypatch, "banking", str(prompt_id)).splitlines()
    assert lines[0] == f"{prompt_id} {prompt} [round_02, kept, trained on] → {response}"
    assert re.fullmatch(r"└── generator call \d of round_02 \(new prompts: 4, dropped: 1\)", lines[1])
    assert sum("Where is my card? [seed set]" in line for line in lines) >= 1


def test_the_command_draws_what_a_seed_led_to(graph, monkeypatch):
    text = run_cli(graph, monkeypatch, "banking", "Where is my card?", "--down")
    assert "dropped: fine_tuned_not_confident]" in text
    assert "continued elsewhere in this tree" in text
    assert "generator call 0 of round_01" in text.splitlines()[1]


def test_the_command_prints_one_json_object(graph, monkeypatch):
    ((prompt_id,),) = graph.rows("SELECT max(prompt_id) FROM filtered_dataset WHERE round = 'round_03'")
    found = json.loads(run_cli(graph, monkeypatch, "banking", str(prompt_id)[:15], "--json"))
    assert (found["transfer"], found["direction"], found["root"]["prompt_id"]) == ("banking", "up", prompt_id)
    assert len(found["root"]["calls"][0]["prompts"]) == 2
    assert json.loads(run_cli(graph, monkeypatch, "banking", str(prompt_id), "--down", "--json"))["direction"] == "down"


def test_prompts_are_never_read_as_markup(graph):
    prompt = Prompt("a1", "[bold]not[/bold] [/] markup", "round_01", "kept", None, " [red]", False)
    prompt.calls.append(Call("c1", "round_01", 0, 1, 0))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rendering.prompt_line(prompt))
    assert "[bold]not[/bold] [/] markup [round_01, kept] → [red]" in console.export_text()


# --- docs/lineage.md ---

QUERIES = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
MAY_BE_EMPTY = "trained on, no longer kept"


def documented(graph: Graph, query: str) -> tuple[list[str], list[tuple[object, ...]]]:
    """Columns and rows of a documented query, after the variables of the first block."""
    with duckdb.connect(str(graph.store.path), read_only=True) as connection:
        connection.execute("USE banking")
        connection.execute(QUERIES[0])
        result = connection.execute(query)
        return [column[0] for column in result.description], result.fetchall()


def test_the_documentation_has_queries():
    assert len(QUERIES) > 8
    assert all("SET VARIABLE" in line for line in QUERIES[0].splitlines())


@pytest.mark.parametrize("query", QUERIES[1:], ids=lambda query: query.strip().splitlines()[0][:40])
def test_every_documented_query_runs_and_finds_something(graph, query):
    columns, rows = documented(graph, query)
    assert len(set(columns)) == len(columns)
    assert rows or MAY_BE_EMPTY in query


def test_the_documented_queries_answer_what_they_say(graph):
    def answer(part: str) -> list[tuple[object, ...]]:
        (query,) = [q for q in QUERIES if part in q]
        return documented(graph, query)[1]

    assert len(answer("depth = 1 AND kind <> 'call';")) == 2
    assert {text for _, text in answer("AND kind = 'seed';")} == set(graph.transfer.seeds)
    assert len(answer("getvariable('seed_id')")) == graph.rows("SELECT count(*) FROM synthetic_prompts")[0][0]
    assert (
        sum(row[3] for row in answer("SELECT round, stage, reason, count(*)"))
        == (graph.rows("SELECT count(*) FROM rejections")[0][0])
    )
    assert {row[1] for row in answer("AS first_round")} == {
        response for (response,) in graph.rows("SELECT trim(response) FROM filtered_dataset")
    }
    assert answer(MAY_BE_EMPTY) == []


def test_the_documentation_names_every_view_and_every_reason():
    text = DOCS.read_text()
    for view in TRANSFER_VIEWS:
        assert f"| `{view.name}` |" in text
    source = (Path(tables.__file__).parents[1] / "method" / "filters.py").read_text()
    for reason in re.findall(r"THEN '(\w+)'", source):
        assert f"`{reason}`" in text


# --- Dagster ---


def test_column_sources_name_every_column_of_a_table_and_real_columns_above_it():
    known = {table.name: {column.name for column in table.columns} for table in TRANSFER_TABLES}
    for table, columns in COLUMN_SOURCES.items():
        assert set(columns) == known[table]
        for sources in columns.values():
            assert sources
            for source, column in sources:
                assert column in known[source]


@pytest.mark.parametrize("asset", list(COLUMN_SOURCES))
def test_materializations_carry_their_column_lineage(graph, asset):
    lineage = graph.metadata[asset, "round_01"]["dagster/column_lineage"].value
    assert set(lineage.deps_by_column) == set(COLUMN_SOURCES[asset])
    for deps in lineage.deps_by_column.values():
        assert all(dep.asset_key.path[0] == "banking" for dep in deps)


def test_prompts_say_which_round_seeded_them(graph):
    first, second = graph.metadata["synthetic_prompts", "round_01"], graph.metadata["synthetic_prompts", "round_02"]
    assert first["seeded_by"].asset_key == dg.AssetKey(["banking", "seed_set"])
    assert "seeded_by_partition" not in first
    assert first["seeds_from"].value == {"seed_set": 2}
    assert second["seeded_by"].asset_key == dg.AssetKey(["banking", "filtered_dataset"])
    assert second["seeded_by_partition"].value == "round_01"
    assert set(second["seeds_from"].value) == {"round_01"}


def test_the_model_links_the_dataset_that_it_was_trained_on(graph):
    metadata = graph.metadata["distilled_model", None]
    assert metadata["dataset"].asset_key == dg.AssetKey(["banking", "filtered_dataset"])
    assert graph.rows("SELECT dataset_version FROM distilled_models") == [(metadata["dataset_version"].value,)]
    records = [record.data for record in metadata["dataset_materializations"].records]
    assert [record["round"] for record in records] == graph.transfer.round_keys
    assert all(re.fullmatch(r"[0-9a-f]{16}", str(record["data_version"])) for record in records)
    assert sum(metadata["pairs_by_round"].value.values()) == metadata["pairs"].value


def test_every_asset_links_to_its_code_and_its_settings(transfer, recwarn):
    assets = build_assets(transfer)
    assert not [warning for warning in recwarn if issubclass(warning.category, dg.BetaWarning)]
    for asset in assets:
        for spec in [asset] if isinstance(asset, dg.AssetSpec) else asset.specs:
            references = spec.metadata["dagster/code_references"].code_references
            files = [Path(reference.file_path) for reference in references]
            assert transfer.folder / "transfer.yaml" in files
            (code,) = [file for file in files if file.suffix == ".py"]
            assert code.is_file() and code.parent.name == "assets"
            # round_seeds is no function: seed_set draws the first of them.
            assert code.stem == spec.key.path[-1].replace("round_seeds", "seed_set")
