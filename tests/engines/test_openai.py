"""The server engine against a local HTTP server that answers what the fake engine answers.

tests/servers has the same against real servers.
"""

import json
import logging
import math
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from tests.conftest import Project
from tests.fake_engine import FakeEngine
from tests.fake_server import FakeServer, fail_first, save_tokenizer
from tests.fakes import FakeModels
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.schema_models import ServedModel, Server
from tuneshift_dag.engines.openai_client import OpenAIServer, ServedGenerator
from tuneshift_dag.engines.openai_source import ServedSource
from tuneshift_dag.method import SIDES, AdapterCheck, Decoding, Pair, Response, Side
from tuneshift_dag.method.scoring import Cost, generate, score_pairs
from tuneshift_dag.models.references import ModelFiles
from tuneshift_dag.reports.export import export
from tuneshift_dag.resources import EngineResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

GREEDY = Decoding(64)
TEXTS = [f"Query: {'x' * (i * 7 % 5)} {i}\nIntent:" for i in range(10)]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def serve(tokenizer: Path) -> Iterator[Callable[..., FakeServer]]:
    running: list[FakeServer] = []

    def start(**options: Any) -> FakeServer:
        running.append(FakeServer(tokenizer, **options).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def cache(store: Store) -> ResponseCache:
    return ResponseCache(store)


def source(url: str, tokenizer: Path, cross_scores: bool = True, **settings: Any) -> ServedSource:
    return ServedSource(
        OpenAIServer(Server(base_url=url, **settings), "engine.server"),
        ServedModel(model="base"),
        ServedModel(model="skill"),
        ModelFiles("org/tiny", tokenizer, "tokenizer-1"),
        ModelFiles("adapter", tokenizer, "adapter-1"),
        cross_scores,
    )


def collect(batches: Iterator[list[tuple[int, Any]]]) -> list[Any]:
    found = dict(item for batch in batches for item in batch)
    return [found[i] for i in range(len(found))]


def preflight(engine: ServedSource, texts: list[str]) -> AdapterCheck:
    return engine.check_adapter([engine.encode(text) for text in texts])


def all_pairs(engine: ServedSource, texts: list[str] = TEXTS) -> list[Pair]:
    return collect(engine.pairs([engine.encode(t) for t in texts], [{} for _ in texts], GREEDY))


def same(response: Response, expected: Response) -> None:
    assert response.text == expected.text
    assert response.finish_reason == expected.finish_reason
    assert len(response.token_ids) == len(expected.token_ids)
    assert response.sum_logprob == pytest.approx(expected.sum_logprob)
    assert response.eos_logprob == pytest.approx(expected.eos_logprob)


@pytest.mark.parametrize("style", ["vllm", "llama_cpp"])
def test_responses_are_the_servers_with_their_tokens(serve, tokenizer, style):
    server = serve(style=style)
    engine, fake = source(server.url, tokenizer), FakeEngine()
    for side in SIDES:
        responses = collect(engine.generate([engine.encode(t) for t in TEXTS], side, GREEDY))
        for text, response in zip(TEXTS, responses, strict=True):
            same(response, fake._answer(fake.encode(text), side, GREEDY))
            assert response.token_ids[-1] == engine.tokenizer.eos_token_id
            assert engine.tokenizer.decode(response.token_ids[:-1]) == response.text


def test_a_truncated_response_has_no_end_token(serve, tokenizer):
    engine = source(serve().url, tokenizer)
    response = collect(engine.generate([engine.encode(TEXTS[0])], "base", Decoding(4)))[0]
    assert (response.finish_reason, len(response.token_ids), response.eos_logprob) == ("length", 4, None)


def test_pairs_are_not_swapped_and_scores_are_those_of_the_given_tokens(serve, tokenizer):
    pairs, fake = all_pairs(source(serve().url, tokenizer)), FakeEngine()
    for text, pair in zip(TEXTS, pairs, strict=True):
        ids = fake.encode(text)
        expected = fake._pair(ids, {}, GREEDY)
        same(pair.base, expected.base)
        same(pair.fine_tuned, expected.fine_tuned)
        assert pair.base_on_fine_tuned == pytest.approx(expected.base_on_fine_tuned)
        assert pair.fine_tuned_on_base == pytest.approx(expected.fine_tuned_on_base)


def test_given_responses_are_scored_each_after_its_prompt(serve, tokenizer):
    engine, fake = source(serve().url, tokenizer), FakeEngine()
    responses = [r.fine_tuned for r in all_pairs(engine)]
    found = collect(engine.score([engine.encode(t) for t in TEXTS], [r.token_ids for r in responses], "base"))
    expected = [fake._pair(fake.encode(text), {}, GREEDY).base_on_fine_tuned for text in TEXTS]
    assert found == pytest.approx(expected)
    assert collect(engine.score([engine.encode(TEXTS[0])], [[]], "base")) == [0]


def test_known_responses_are_only_scored(serve, tokenizer):
    server = serve()
    engine = source(server.url, tokenizer)
    pairs = all_pairs(engine)
    server.bodies.clear()
    known: list[dict[Side, Response]] = [{"base": p.base, "fine_tuned": p.fine_tuned} for p in pairs]
    assert collect(engine.pairs([engine.encode(t) for t in TEXTS], known, GREEDY)) == pairs
    assert len(server.bodies) == 20
    assert all(body["echo"] for body in server.bodies)


def test_prompts_go_out_as_token_ids_and_leave_nothing_to_defaults(serve, tokenizer):
    server = serve()
    engine = source(server.url, tokenizer)
    ids = engine.encode(TEXTS[0])
    collect(engine.generate([ids], "fine_tuned", GREEDY))
    collect(engine.generate([ids], "base", Decoding(9, 0.7, 50, 0.9, stops=("\n\n",)), seeds=[2**40 + 5]))
    greedy, sampled = server.bodies
    assert (greedy["prompt"], greedy["model"], greedy["temperature"], greedy["repetition_penalty"]) == (
        ids,
        "skill",
        0,
        1.0,
    )
    assert sampled | {"model": "base", "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0, "seed": 5} == sampled
    assert (sampled["stop"], sampled["max_tokens"]) == (["\n\n"], 9)


def test_without_cross_scores_a_pair_costs_two_requests_and_the_second_time_none(serve, tokenizer, cache):
    server = serve(style="llama_cpp", echo=False)
    engine = source(server.url, tokenizer, cross_scores=False)
    ids = [engine.encode(t) for t in TEXTS]
    cost = Cost()
    pairs = score_pairs(engine, cache, ids, GREEDY, cost)
    assert (len(server.bodies), cost.model_calls) == (20, 20)
    assert all(p.base_on_fine_tuned is None and p.fine_tuned_on_base is None for p in pairs)
    assert score_pairs(engine, cache, ids, GREEDY, Cost()) == pairs
    assert len(server.bodies) == 20
    # Asked for later, only the scores are computed.
    scored = serve()
    later = source(scored.url, tokenizer)
    cost = Cost()
    complete = score_pairs(later, cache, ids, GREEDY, cost)
    assert [(p.base, p.fine_tuned) for p in complete] == [(p.base, p.fine_tuned) for p in pairs]
    assert all(body["echo"] for body in scored.bodies)
    assert cost.model_calls == 20


@pytest.mark.parametrize("statuses", [(429,), (500, 503), (0,)], ids=["429", "5xx", "time-out"])
def test_a_failed_request_is_tried_again(serve, tokenizer, statuses, caplog):
    server = serve(before=fail_first(*statuses))
    engine = source(server.url, tokenizer, timeout_seconds=0.3)
    with caplog.at_level(logging.INFO):
        response = collect(engine.generate([engine.encode(TEXTS[0])], "base", GREEDY))[0]
    assert response.text.startswith(" something")
    assert len(server.bodies) == len(statuses) + 1
    assert f"1 requests ({len(statuses)} retries), 7 prompt and 3 completion tokens" in caplog.text


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (lambda server, body: (500, "out of memory"), ["status 500 after 2 retries", "out of memory"]),
        (lambda server, body: (429, "slow down"), ["status 429 after 2 retries", "lower concurrency (now 32)"]),
        (lambda server, body: (404, "no model"), ["status 404", "/v1"]),
        (lambda server, body: (400, "too long"), ["status 400: too long"]),
        (lambda server, body: (200, "<html>"), ["isn't that of an OpenAI-compatible server", "<html>"]),
        (lambda server, body: (200, '{"choices": []}'), ["isn't that of an OpenAI-compatible server"]),
        (lambda server, body: time.sleep(1), ["no response within 0.2 s after 2 retries", "timeout_seconds"]),
    ],
    ids=["500", "429", "404", "400", "html", "no choice", "slow"],
)
def test_what_goes_wrong_is_one_message_with_its_repair(serve, tokenizer, before, words):
    server = serve(before=before)
    engine = source(server.url, tokenizer, max_retries=2, timeout_seconds=0.2)
    with pytest.raises(TuneshiftError) as error:
        collect(engine.generate([engine.encode(TEXTS[0])], "base", GREEDY))
    for word in [f"engine.server ({server.url})", *words]:
        assert word in str(error.value)


def test_a_server_that_is_not_there_is_named(tokenizer):
    engine = source("http://127.0.0.1:9/v1", tokenizer, max_retries=0)
    with pytest.raises(
        TuneshiftError, match=r"engine.server \(http://127.0.0.1:9/v1\): POST /completions for 'base': can't be"
    ):
        collect(engine.generate([engine.encode(TEXTS[0])], "base", GREEDY))


def test_what_was_finished_before_an_error_is_kept(serve, tokenizer, cache):
    broken = [True]

    def before(server: FakeServer, body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "broken") if broken[0] and len(server.bodies) > 6 else None

    server = serve(before=before)
    engine = source(server.url, tokenizer, concurrency=2)
    ids = [engine.encode(t) for t in TEXTS]
    with pytest.raises(TuneshiftError, match="broken"):
        generate(engine, cache, ids, "base", GREEDY, Cost())
    broken[0] = False
    cost = Cost()
    generate(engine, cache, ids, "base", GREEDY, cost)
    assert cost == Cost(model_calls=4, cache_hits=6)


def test_as_many_requests_are_in_flight_as_allowed_and_no_more(serve, tokenizer):
    server = serve(before=lambda server, body: time.sleep(0.05))
    engine = source(server.url, tokenizer, concurrency=4)
    all_pairs(engine)
    assert server.most_in_flight == 4


def test_closing_early_stops_asking(serve, tokenizer):
    closed = threading.Event()

    def before(server: FakeServer, body: dict[str, Any]) -> None:
        if len(server.bodies) > 2:
            closed.wait(10)

    server = serve(before=before)
    engine = source(server.url, tokenizer, concurrency=2)
    batches = engine.generate([engine.encode(t) for t in TEXTS], "base", GREEDY)
    next(batches)
    batches.close()
    closed.set()
    time.sleep(0.3)
    assert len(server.bodies) <= 4 < len(TEXTS), "two answered and two in flight"


def test_an_address_is_no_identity_and_a_revision_is(tokenizer):
    def prints(**settings: Any) -> list[str]:
        return [source(**{"url": "http://a/v1", "tokenizer": tokenizer} | settings).fingerprint(s) for s in SIDES]

    usual = prints()
    assert usual[0] != usual[1]
    assert prints(url="http://b/v1", concurrency=3, timeout_seconds=5, max_retries=0) == usual
    assert all(a != b for a, b in zip(prints(revision="2"), usual, strict=True))
    assert all(a != b for a, b in zip(prints(extra_body={"x": 1}), usual, strict=True))
    other = source("http://a/v1", tokenizer)
    other.models["fine_tuned"] = ServedModel(model="skill", extra_body={"lora": [{"id": 0, "scale": 0.5}]})
    assert other.fingerprint("base") == usual[0]
    assert other.fingerprint("fine_tuned") != usual[1]


def test_ten_thousand_cached_prompts_need_no_server(tokenizer, cache):
    engine = source("http://127.0.0.1:9/v1", tokenizer, max_retries=0)
    prompts = [engine.encode(f"Query: {i}\nIntent:") for i in range(10_000)]
    for start in range(0, len(prompts), 2500):
        part = prompts[start : start + 2500]
        responses, scores = {}, {}
        for ids in part:
            both = {s: Response(f" {s}", [5, 6, len(s), 0], "stop", -1.0, -0.1) for s in SIDES}
            for side, other in (SIDES, SIDES[::-1]):
                responses[cache.response_key(engine.fingerprint(side), ids, GREEDY)] = both[side]
                scores[cache.score_key(engine.fingerprint(side), ids, both[other].token_ids)] = -2.0
        cache.put(responses, scores)
    cost = Cost()
    pairs = score_pairs(engine, cache, prompts, GREEDY, cost)
    assert len(pairs) == cost.cache_hits == 10_000
    assert pairs[0].fine_tuned.text == " fine_tuned"


# Preflight


def test_preflight_passes_a_server_that_has_both_models(serve, tokenizer):
    check = preflight(source(serve().url, tokenizer), TEXTS)
    assert (check.problems, check.warnings) == ([], [])


def test_preflight_names_the_models_that_are_there(serve, tokenizer):
    server = serve(sides={"base": "base", "other-skill": "fine_tuned"})
    (problem,) = preflight(source(server.url, tokenizer), TEXTS).problems
    for word in [server.url, "no model 'skill'", "base, other-skill", "engine.fine_tuned.model"]:
        assert word in problem


def test_preflight_stops_when_the_server_leaves_the_adapter_out(serve, tokenizer):
    server = serve(sides={"base": "base", "skill": "base"})
    check = preflight(source(server.url, tokenizer), TEXTS)
    assert "give the same answers" in check.problems[0]
    assert "doesn't apply the adapter" in check.problems[0]


def test_preflight_stops_when_the_base_gets_the_adapter_in_a_mixed_batch(serve, tokenizer):
    def before(server: FakeServer, body: dict[str, Any]) -> None:
        if len(server.bodies) > len(TEXTS):
            server.sides["base"] = "fine_tuned"

    (problem,) = preflight(source(serve(before=before).url, tokenizer), TEXTS).problems
    assert "'base' answers otherwise when 'skill' is asked at the same time" in problem


def test_preflight_stops_when_prompt_log_probabilities_lack_the_adapter(serve, tokenizer):
    server = serve(echo_sides={"base": "base", "skill": "base"})
    (problem,) = preflight(source(server.url, tokenizer), TEXTS).problems
    for word in ["'skill'", "aren't those that", "engine.cross_scores: false"]:
        assert word in problem
    assert preflight(source(server.url, tokenizer, cross_scores=False), TEXTS).problems == []


@pytest.mark.parametrize(
    "options",
    [
        {"echo": False, "style": "llama_cpp"},
        {"before": lambda server, body: (400, "Only no echo is supported") if body.get("echo") else None},
    ],
    ids=["ignored", "refused"],
)
def test_a_server_without_prompt_log_probabilities_is_told_with_what_to_do(serve, tokenizer, options):
    server = serve(**options)
    with pytest.raises(TuneshiftError) as error:
        preflight(source(server.url, tokenizer), TEXTS)
    for word in [server.url, "log-probabilities of prompt tokens", "engine.cross_scores: false"]:
        assert word in str(error.value)
    assert preflight(source(server.url, tokenizer, cross_scores=False), TEXTS).problems == []


def test_a_server_without_token_ids_is_told(serve, tokenizer):
    with pytest.raises(TuneshiftError, match="doesn't return the ids and log-probabilities"):
        preflight(source(serve(style="plain").url, tokenizer), TEXTS)


def test_preflight_stops_when_the_tokenizer_is_another_models(serve, tokenizer, tmp_path):
    other = tmp_path / "other"
    save_tokenizer(other)
    text = (other / "tokenizer.json").read_text()
    # The ids of two letters change places.
    vocabulary = text.replace('"n": ', '"?": ', 1).replace('"t": ', '"n": ', 1).replace('"?": ', '"t": ', 1)
    assert vocabulary != text
    (other / "tokenizer.json").write_text(vocabulary)
    problems = preflight(source(serve().url, other), TEXTS).problems
    assert "source.base isn't the model that is served" in problems[0]


# The generator


def test_a_chat_generator_sends_a_message_and_a_text_generator_the_text(serve):
    server = serve()
    sampling = Decoding(99, temperature=1.0, top_k=0, top_p=0.9)
    for chat in (True, False):
        generator = ServedGenerator(OpenAIServer(Server(base_url=server.url), "generator.server"), "base", chat)
        request = (generator.chat_ids if chat else generator.encode)("Generate more 🂡:\n1. seed")
        (response,) = collect(generator.generate([request], "base", sampling, seeds=[7]))
        assert response.text.startswith("1. Is ")
        assert (response.token_ids, math.isnan(response.sum_logprob)) == ([], True)
    chat_body, text_body = server.bodies
    assert chat_body["messages"] == [{"role": "user", "content": "Generate more 🂡:\n1. seed"}]
    assert text_body["prompt"] == "Generate more 🂡:\n1. seed"
    # top_k: 0 means standard fields only: OpenAI's own API refuses others.
    assert set(chat_body) == {"model", "messages", "max_completion_tokens", "temperature", "top_p", "seed"}


def test_half_a_character_in_a_generators_answer_is_replaced(serve):
    said = {"choices": [{"message": {"content": "a \ud83d b \ud83d\ude00"}, "finish_reason": "stop"}]}
    server = serve(before=lambda server, body: (200, json.dumps(said)))
    generator = ServedGenerator(OpenAIServer(Server(base_url=server.url), "generator.server"), "base", True)
    [answer] = collect(generator.generate([generator.encode("list")], "base", Decoding(8)))
    assert answer.text == "a \ufffd b \U0001f600"


def test_a_generators_answers_are_cached_by_model_and_kind(serve, cache):
    server = serve()

    def ask(chat: bool, **settings: Any) -> None:
        generator = ServedGenerator(
            OpenAIServer(Server(base_url=server.url, **settings), "generator.server"), "base", chat
        )
        prompts = [generator.encode("list")]
        generate(generator, cache, prompts, "base", Decoding(64, temperature=1.0), Cost(), seeds=[1])

    for _ in range(2):
        ask(True)
        ask(False)
        ask(True, revision="2")
    assert len(server.bodies) == 3


# The graph


class ServedModels(FakeModels):
    """Source and generator as configured, and the rest without models."""

    def resource(self) -> EngineResource:
        class Served(type(super().resource())):  # type: ignore[misc]
            source = EngineResource.source
            generator = EngineResource.generator

        return Served()


@pytest.fixture
def served_project(
    transfer_folder: Path, edit_config: Callable[[str, Any], None], tokenizer: Path, tmp_path: Path
) -> Iterator[Callable[[FakeServer], Project]]:
    """A project whose source and generator are on a server. Of the source there is only a tokenizer here."""
    shutil.copytree(tokenizer, transfer_folder / "models" / "served" / "tiny-base")
    (tmp_path / "instance").mkdir()

    def make(server: FakeServer, **settings: Any) -> Project:
        address = {"base_url": server.url, **settings}
        models = {"base": {"model": "base"}, "fine_tuned": {"model": "skill"}}
        edit_config("source.base", "models/served/tiny-base")
        edit_config("engine", {"type": "openai", "server": address, **models})
        edit_config("generator.server", address)
        edit_config("generator.model", "base")
        project = Project(transfer_folder, instance)
        project.models = ServedModels()
        return project

    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as instance:
        yield make


def test_the_whole_graph_runs_on_a_server_and_the_second_time_without_it(serve, served_project, edit_config):
    server = serve()
    project = served_project(server)
    project.run()
    pairs = project.rows("SELECT ppl_fine_tuned, ppl_base, ppl_base_cross, ppl_fine_tuned_cross FROM scored_pairs")
    assert len(pairs) >= 8
    assert all(value and value > 1 for pair in pairs for value in pair)
    assert project.rows("SELECT count(*) FROM filtered_dataset")[0][0] > 0
    asked = len(server.bodies)
    edit_config("engine.server.concurrency", 7)
    edit_config("generator.server.base_url", "http://127.0.0.1:9/v1")
    assert project.run().materialized == [], "where a server is and how it is asked changes nothing"
    assert len(server.bodies) == asked
    edit_config("engine.server.revision", "2")
    assert ("scored_pairs", "round_01") in project.run().materialized
    assert len(server.bodies) > asked


def test_the_whole_graph_runs_without_cross_scores(serve, served_project, edit_config):
    project = served_project(serve(style="llama_cpp", echo=False))
    edit_config("engine.cross_scores", False)
    project.run()
    assert project.rows("SELECT count(ppl_base_cross), count(ppl_base) > 8 FROM scored_pairs") == [(0, True)]
    assert project.rows("SELECT count(*) > 0 FROM filtered_dataset") == [(True,)]


def test_a_preflight_problem_names_the_file(serve, served_project):
    project = served_project(serve(sides={"base": "base", "skill": "base"}))
    with pytest.raises(TuneshiftError, match=r"seed_set failed: .*transfer.yaml: .*doesn't apply the adapter"):
        project.run()


def test_the_api_key_is_sent_and_written_nowhere(serve, served_project, monkeypatch, tmp_path, caplog, capfd):
    """Not even when the server repeats it in its error message."""
    monkeypatch.setenv("MY_KEY", KEY)
    broken = [True]

    def before(server: FakeServer, body: dict[str, Any]) -> tuple[int, str] | None:
        said = f"bad request: {server.headers[-1]}"
        assert KEY in said
        return (400, said) if broken[0] and "messages" in body else None

    server = serve(before=before)
    project = served_project(server, api_key_env="MY_KEY")
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(TuneshiftError, match="bad request") as error:
            project.run()
        broken[0] = False
        project.run()
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert project.rows("SELECT count(*) > 0 FROM scored_pairs") == [(True,)]
    export(project.store, project.transfer, tmp_path / "exported")
    tables = project.rows("SELECT database_name || '.' || schema_name || '.' || table_name FROM duckdb_tables()")
    events = [entry for run in project.instance.get_runs() for entry in project.instance.all_logs(run.run_id)]
    assert any("bad request" in str(event) for event in events)
    # Files of DuckDB and Parquet are compressed.
    rows = [project.rows(f"SELECT * FROM {table}") for (table,) in tables]
    assert len(rows) > 20
    rows.append(pl.read_parquet(tmp_path / "exported" / "dataset.parquet").rows())
    out, err = capfd.readouterr()
    for text in [*traceback.format_exception(error.value), caplog.text, out, err, str(rows), str(events)]:
        assert KEY not in text
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def test_what_the_environment_holds_for_another_service_is_not_sent(serve, tokenizer, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Secret: {KEY}\nAuthorization: Bearer {KEY}")
    monkeypatch.setenv("MY_KEY", "mine")
    server = serve()
    preflight(source(server.url, tokenizer, api_key_env="MY_KEY"), TEXTS[:1])
    assert server.headers and all(KEY not in str(headers) for headers in server.headers)
    assert {headers.get("authorization") for headers in server.headers} == {"Bearer mine"}


def test_no_proxy_is_asked_for_this_machine(serve, tokenizer, monkeypatch):
    proxy, server = serve(), serve()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("MY_KEY", KEY)
    preflight(source(server.url, tokenizer, api_key_env="MY_KEY"), TEXTS[:1])
    assert server.headers and not proxy.headers


def test_a_missing_key_is_named_by_its_variable(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(TuneshiftError, match=r"engine.server.api_key_env: the environment variable MY_KEY isn't set"):
        OpenAIServer(Server(base_url="http://127.0.0.1:9/v1", api_key_env="MY_KEY"), "engine.server")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_named_by_its_variable(serve, tokenizer, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", KEY)
    server = serve(before=lambda server, body: (status, f"bad key {KEY}"))
    with pytest.raises(TuneshiftError, match="refuses the API key") as error:
        collect(source(server.url, tokenizer, api_key_env="MY_KEY").generate([[5]], "base", GREEDY))
    assert "MY_KEY" in str(error.value) and KEY not in str(error.value)
