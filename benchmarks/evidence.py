"""Writes ``docs/evidence.md`` and its pictures from a store of its own, which it fills first where it must.

    python -m benchmarks.evidence [--home .tuneshift/evidence] [--only one two three labels worked]

What was scored stays in the store: a killed run goes on where it was, and a second one takes seconds and writes the
same page. Sentences that say what came out are written from the figures.
"""

import argparse
import io
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from benchmarks import closed_loop, evidence_loops, open_loop, skill_pools, soft_labels, worked_answers
from benchmarks.pages import DOCS, picture, table, took, write_page
from tuneshift_dag import reports
from tuneshift_dag.config import Transfer
from tuneshift_dag.home import database_file
from tuneshift_dag.reports import escape_markdown, plots
from tuneshift_dag.reports.truth import sweep_truth
from tuneshift_dag.store import Store

PAGE = DOCS / "evidence.md"
HOME = DOCS.parent / ".tuneshift" / "evidence"
BAR = 0.9
"""AUC that the best rule is to reach in the pool with as many prompts off the skill as in it."""
EXAMPLES = 5
Pools = list[dict[str, Any]]

HEAD = """# Evidence: where the filter matters

Written by `python -m benchmarks.evidence` from a store of its own (`--home`, by default `.tuneshift/evidence`), which
it fills first; a killed one goes on, and `--only` writes some of the sections. Nothing here is edited by hand. What was
tried on the way is in [experiments.md](experiments.md).

The claim of the paper, taken apart: (a) among mixed prompts the filter picks those that carry the skill; (b) it steers
the loop, since what is kept seeds the next round. And of answers that are all in the skill: (c) it keeps the right
ones. The end says what is missing.
"""

NOT_RUN = """## What was not run

- More than five loop seeds.
- One source adapter for each of the two skills: the intervals are for new prompts or new loops, not for new adapters.
- GSM8K itself.
- Nothing here was run on a GPU or on a model above 270 million parameters.

The loop of another transfer, whose base knows nothing, is in [evidence_banking.md](evidence_banking.md).
"""


def main() -> None:
    titles = {
        "one": "Step one: does a rule find the skill?",
        "two": "Step two: does the filter steer the loop?",
        "three": "Step three: which of the same pairs?",
        "labels": "The source's token distributions as labels",
        "worked": "Worked answers: does a rule keep the right ones?",
    }
    sections = {"one": step_one, "two": step_two, "three": step_three, "labels": labels, "worked": worked}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=HOME, help="Folder of its store.")
    parser.add_argument(
        "--only", nargs="+", choices=titles, default=list(titles), help="Leave other sections as they are."
    )
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    os.environ["TUNESHIFT_HOME"] = str(home)
    store = Store(database_file())
    for name in arguments.only:
        written = {titles[name]: sections[name](store, home / "transfers")}
        write_page(PAGE, list(titles.values()), written, HEAD, NOT_RUN)
    print(PAGE)


def step_one(store: Store, folder: Path) -> str:
    """Which prompts and answers the rules keep."""
    transfers = {tokens: skill_pools.make_transfer(folder, tokens) for tokens in skill_pools.LENGTHS}
    for transfer in transfers.values():
        skill_pools.score(store, transfer)
    return "\n".join([*_rules_and_shares(store, transfers), took(store, list(transfers.values()))])


def step_two(store: Store, folder: Path) -> str:
    """What the loop drifts to under each filter, and the targets of what each has kept."""
    loop = closed_loop.make_transfer(folder)
    closed_loop.compare(loop)
    text = evidence_loops.steered(loop, closed_loop.drift(store, loop), reports.comparison(store, loop))
    return f"{text}\n{took(store, [loop, *loop.loops.values()])}"


def step_three(store: Store, folder: Path) -> str:
    """What each rule makes of the pairs that loops without a filter came to."""
    loop = closed_loop.make_transfer(folder)
    transfer = open_loop.make_transfer(store, loop)
    closed_loop.compare(transfer)
    found = evidence_loops.drifted(closed_loop.drifted(store, loop))
    grown = [own for own, _ in closed_loop.prompts(store, loop, "unfiltered")]
    return f"""{found}
### The targets

All loop seeds' pairs together, guards on; `both` and `surprise_ratio` keep what passes their threshold, and
`seed_similarity` ranks.

{evidence_loops.targets(transfer, reports.comparison(store, transfer))}
{took(store, [transfer, *grown])}"""


def labels(store: Store, folder: Path) -> str:
    """Whether the source's token distributions teach a target more than its text."""
    transfer = open_loop.make_transfer(store, closed_loop.make_transfer(folder))
    pairs = soft_labels.kept(store, transfer, soft_labels.PAIRS)
    return evidence_loops.labels(transfer, len(pairs), soft_labels.compare(transfer, pairs, folder.parent))


def worked(store: Store, folder: Path) -> str:
    """Whether the rules keep the right ones of answers that are worked out in steps."""
    sums = worked_answers.make_transfer(folder)
    found = _right_sums(worked_answers.sweep(store, sums))
    slots = skill_pools.make_transfer(folder, skill_pools.LENGTHS[0])
    skill_pools.score(store, slots)
    return f"{found}\n{_one_threshold(store, slots, sums)}\n{took(store, [sums])}"


def _rules_and_shares(store: Store, transfers: dict[int, Transfer]) -> Iterable[str]:
    short, long = skill_pools.LENGTHS
    packaged = skill_pools.sweep(store, transfers[short])
    guarded = skill_pools.sweep(store, transfers[long])
    bare = skill_pools.sweep(store, transfers[long], guards=False)
    skill = skill_pools.sweep(store, transfers[long], "skill", guards=False)
    _, near = skill_pools.sweep(store, transfers[long], "near", guards=False)
    half = 1 + skill_pools.SHARES.index(0.5)  # the first is the whole pool
    columns = {
        f"answers up to {short} tokens, guards on (as packaged)": packaged[half],
        f"up to {long}, guards on": guarded[half],
        f"up to {long}, guards off": bare[half],
    }

    yield (
        f"{skill_pools.IN_SKILL} requests of `meeting_slots_chat` with their codes and {skill_pools.GENERAL} questions"
        " off the skill, all written by rule (`benchmarks/off_skill.py`) and none of them trained on, are answered by"
        " the source before and after its fine-tune and scored. A rule should keep the requests whose code is right."
        " The fine-tune was on as many general instructions, answered by its own base, as on requests, so it changes"
        " little off the skill. Pools with other shares off the skill are drawn from these pairs. Intervals are 95 %"
        " (Wilson; DeLong for AUC).\n"
    )
    yield table([_counts(store, transfers[tokens]) for tokens in transfers])
    yield f"### AUC with half of the prompts off the skill\n\nRight codes against all other pairs.\n\n{_aucs(columns)}"
    yield "".join(_verdict(name, pool) for name, pool in columns.items())
    yield (
        "With the guards on, what they drop (cut-off answers above all) comes last, whatever the rule: the row `random`"
        " is what they do alone. The rest of this page is without them, so that a rule has to find the skill itself.\n"
    )
    shares = {f"{share:.0%} off": pool for share, pool in zip(skill_pools.SHARES, bare[1:], strict=True)}
    shares[f"{near['off_skill']:.0%} off, near the skill"] = near
    yield f"### AUC by the share of prompts off the skill\n\n{_aucs(shares)}"
    yield (
        "The near prompts speak of meetings, days and times, and ask for no entry in a calendar.\n\n"
        + picture("evidence_auc", _auc_by_share(list(skill_pools.SHARES), bare[1:]), "AUC by share off the skill")
        + picture(
            "evidence_precision_recall", plots.precision_recall(bare[1:]), "Precision and recall of every threshold"
        )
    )
    yield (
        "### What the AUC is made of\n\nTwo questions in one: is the prompt in the skill, and is the answer right?\n\n"
        + _aucs({"in the skill, or off it": skill[half], "in the skill: right, or wrong": bare[1]})
    )
    yield f"Medians by kind of prompt:\n\n{table(_medians(store, transfers[long]))}"
    best = _best(bare[half])
    yield (
        f"Where `{best['rule']}` errs: the pairs with the largest margin that aren't right, and the right ones with the"
        f" smallest.\n\n{table(_errors(skill_pools.pairs(store, transfers[long], best['rule'])))}"
    )
    yield (
        "### Every rule and threshold, half of the prompts off the skill\n\n"
        f"As packaged (up to {short} tokens, guards on)."
        " Of `top_excess`, `balanced_confidence` and `random` the threshold is the share that is kept.\n\n"
        + table([_cell(cell) for cell in packaged[half]["cells"]])
    )
    yield (
        "The same for every pool, with counts:\n\n```\nexport TUNESHIFT_HOME=.tuneshift/evidence"
        " TUNESHIFT_TRANSFERS=.tuneshift/evidence/transfers\n"
        f"tuneshift sweep skill_pool_{short} --truth $TUNESHIFT_TRANSFERS/skill_pool_{short}/truth.jsonl \\\n    "
        + " ".join(f"--off-skill {share:g}" for share in skill_pools.SHARES)
        + "\n```\n"
    )


def _right_sums(pool: dict[str, Any]) -> str:
    best = _best(pool)["rule"]
    shown = [cell for cell in pool["cells"] if cell["rule"] in ("both", best)]
    right = pool["right"] / (pool["right"] + pool["wrong"])
    return f"""SmolLM2-135M-Instruct is taught {worked_answers.TRAINING} sums in words with their steps
(`benchmarks/worked_answers.py`, asked as in `transfers/gsm8k_llama`), and answers {pool["right"] + pool["wrong"]}
others, of which it gets {right:.0%} right. All are in the skill, so a rule can only tell right from wrong. Guards off;
prompts by rule and not by a generator.

{_aucs({"AUC of the right answers": pool})}
What `both`{"" if best == "both" else f" and the best rule, `{best}`,"} keeps:

{table([{name: value for name, value in _cell(cell).items() if name != "off"} for cell in shown])}"""


def _one_threshold(store: Store, slots: Transfer, sums: Transfer) -> str:
    """What one threshold of a rule does on both pools, with the guards of the product."""
    tried = {"both": [1.1, 1.3, 1.5], "surprise_ratio": [20.0, 40.0, 60.0]}
    rows = []
    for rule, thresholds in tried.items():
        found = [
            sweep_truth(store, transfer, transfer.folder / "truth.jsonl", [rule], thresholds, shares)["pools"][-1]
            for transfer, shares in ((slots, [0.5]), (sums, []))
        ]
        for cells in zip(*(pool["cells"] for pool in found), strict=True):
            row = {"rule": f"`{rule}`", "threshold": f"{cells[0]['threshold']:g}"}
            for name, cell in zip(("codes, half off the skill", "worked answers"), cells, strict=True):
                row[name] = "-" if cell["precision"] is None else f"{cell['precision']:.2f}, {cell['recall']:.2f}"
            rows.append(row)
    return f"""### One threshold for both kinds of answers

Precision and recall of right answers, with the guards on: of the codes of step one (answers up to
{slots.config.response.max_new_tokens} tokens), and of the worked answers.

{table(rows)}"""


def _counts(store: Store, transfer: Transfer) -> dict[str, Any]:
    found = skill_pools.pairs(store, transfer, "unfiltered")
    counts = dict(found.group_by("kind").len().iter_rows())
    steps = store.read("SELECT max(finished_at)::DATE::VARCHAR FROM steps", schema=transfer.name).item()
    seconds = skill_pools.seconds(store, transfer)
    return {
        "longest answer": f"{transfer.config.response.max_new_tokens} tokens",
        **{f"in skill, {kind}": counts.get(kind, 0) for kind in ("right", "wrong")},
        "off the skill": counts.get("general", 0),
        "near it": counts.get("near", 0),
        "cut off": f"{(found['fine_tuned_finish'] == 'length').mean():.0%}",
        "scored": f"{steps}, {seconds:.0f} s on {platform.machine()}" if seconds else steps,
    }


def _best(pool: dict[str, Any]) -> dict[str, Any]:
    return max((row for row in pool["rules"] if row["auc"] is not None), key=lambda row: row["auc"])


def _told(row: dict[str, Any]) -> str:
    return "" if row["auc"] is None else f"{row['auc']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _aucs(pools: dict[str, dict[str, Any]]) -> str:
    """A row for each rule, a column for each pool."""
    together = zip(*(pool["rules"] for pool in pools.values()), strict=True)
    return table(
        [
            {"rule": f"`{of[0]['rule']}`" + (f", {of[0]['threshold']:g}" if of[0]["threshold"] else "")}
            | {name: _told(row) for name, row in zip(pools, of, strict=True)}
            for of in together
        ]
    )


def _verdict(name: str, pool: dict[str, Any]) -> str:
    best = _best(pool)
    if best["low"] >= BAR:
        reached = f"reaches {BAR:g}, and so does its whole interval"
    else:
        reached = f"reaches {BAR:g}, and its interval doesn't" if best["auc"] >= BAR else f"stays below {BAR:g}"
    return f"- {name[0].upper()}{name[1:]}: the best rule, `{best['rule']}` at {_told(best)}, {reached}.\n"


def _medians(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    found = skill_pools.pairs(store, transfer, "unfiltered").with_columns(
        same=pl.col("fine_tuned_response").str.strip_chars() == pl.col("base_response").str.strip_chars()
    )
    rows = []
    for kind in ("right", "wrong", "general", "near"):
        own = found.filter(pl.col("kind") == kind)
        numbers = {
            "PPL_f(y_f)": own["ppl_fine_tuned"].median(),
            "PPL_b(y_b)": own["ppl_base"].median(),
            "PPL_b(y_f)": own["ppl_base_cross"].median(),
        }
        rows.append(
            {"kind": kind, "pairs": len(own)}
            | {name: "" if value is None else f"{value:.3g}" for name, value in numbers.items()}
            | {"tokens of y_f": f"{own['fine_tuned_tokens'].median():g}"}
            | {"y_f is y_b": f"{own['same'].mean():.0%}"}
        )
    return rows


def _errors(found: pl.DataFrame) -> list[dict[str, Any]]:
    judged = found.filter(pl.col("judged") & (pl.col("kind") != "near"))
    right = pl.col("kind") == "right"
    shown = pl.concat([judged.filter(~right).head(EXAMPLES), judged.filter(right).tail(EXAMPLES)])
    numbers = ("ppl_fine_tuned", "ppl_base", "ppl_base_cross")
    return [
        {"kind": row["kind"], "margin": f"{row['margin']:.3g}"}
        | {name: f"{row[name]:.3g}" for name in numbers}
        | {name: escape_markdown(row[name][:100]) for name in ("prompt", "fine_tuned_response", "base_response")}
        for row in shown.iter_rows(named=True)
    ]


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    def told(name: str) -> str:
        if cell[name] is None:
            return ""
        return f"{cell[name]:.3f} ({cell[f'{name}_low']:.3f} to {cell[f'{name}_high']:.3f})"

    mine = " (its filter)" if cell["current"] else ""
    return {
        "rule": f"`{cell['rule']}`",
        "threshold": f"{cell['threshold']:g}{mine}",
        **{name: cell[name] for name in ("kept", "right", "wrong", "off")},
        "precision": told("precision"),
        "recall": told("recall"),
    }


def _auc_by_share(shares: list[float], pools: Pools) -> bytes:
    """A line for each rule, a band for its interval."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for rules in zip(*(pool["rules"] for pool in pools), strict=True):
        (line,) = axes.plot(shares, [row["auc"] for row in rules], "o-", ms=4, label=rules[0]["rule"].replace("_", " "))
        low, high = ([row[end] for row in rules] for end in ("low", "high"))
        axes.fill_between(shares, low, high, color=line.get_color(), alpha=0.12)
    axes.axhline(BAR, color="#7d8590", linestyle="--", linewidth=1)
    axes.set(xlabel="Share of prompts off the skill", ylabel="AUC of right answers", xticks=shares, ylim=(0, 1.02))
    axes.tick_params(colors="#7d8590")
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color("#7d8590")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, labelcolor="#7d8590")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, transparent=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
