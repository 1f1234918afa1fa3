import random
from itertools import combinations, pairwise

import numpy as np
import pytest

from tuneshift_dag.method.prompting import (
    PromptPool,
    distinct_bigrams,
    mean_similarity,
    normalize,
    novel_bigrams,
    prompt_id,
)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  Where is\tmy CARD?\n", "where is my card"),
        ("snake_case, twice", "snake_case twice"),
        ("3+4?", "3+4"),
        ("Can’t I?", "cant i"),
        ("ﬁne ①", "fine 1"),
        ("?!…", ""),
        ("My card(s) (both) [new]", "my card s both new"),
        # Code and formulas stay as they are, and their lines too.
        ("f(X)[0]?", "f(X)[0]?"),
        ("if a:\n    b  \nc\n", "if a:\n    b\nc"),
        ("2 * (3 + 4)!", "2 * (3 + 4)!"),
        ("What is 3²?", "what is 3^2"),
        ("Dear Sir,\n\nWhere is it?", "dear sir where is it"),
    ],
)
def test_normalize_drops_case_and_punctuation_only(prompt, expected):
    assert normalize(prompt) == expected


def test_prompt_id_is_that_of_the_normalized_prompt():
    assert prompt_id("Where is my card?") == prompt_id("where is my CARD")
    assert prompt_id("Where is my card?") != prompt_id("Where is my cat?")
    assert len(prompt_id("x")) == 16 and int(prompt_id("x"), 16) >= 0


def pool_of(near_duplicate: float, *known: str) -> PromptPool:
    pool = PromptPool(near_duplicate, overlong=lambda prompt: False)
    pool.add(known, "held_out")
    return pool


def test_pool_rejects_each_item_with_its_reason():
    pool = PromptPool(near_duplicate=0.7, overlong=lambda prompt: len(prompt) > 40)
    pool.add(["Where is my card?"], "seed")
    pool.add(["How do I close my account?"], "held_out")
    items = [
        "...",
        "x" * 41,
        "WHERE is my card",
        "How do I close my account",
        "Can I pay abroad with this card?",
        "can i pay abroad with this card",
        "Can I pay abroad with that card?",
        "y" * 40,
    ]
    accepted, rejected = pool.sort(items)
    assert [(a.position, a.prompt, a.prompt_id) for a in accepted] == [
        (i, items[i], prompt_id(items[i])) for i in (4, 7)
    ]
    assert [(r.position, r.reason) for r in rejected] == [
        (0, "empty"),
        (1, "overlong"),
        (2, "seed"),
        (3, "held_out"),
        (5, "duplicate"),
        (6, "near_duplicate"),
    ]
    assert all(r.prompt == items[r.position] for r in rejected)


def test_the_limit_of_near_duplicates_is_exclusive():
    first, second = "a b c d", "a b x d"  # ROUGE-L 2 * 3 / 8
    for limit, count in ((0.74, 1), (0.75, 2)):
        accepted, _ = pool_of(limit).sort([first, second])
        assert len(accepted) == count


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.8])
def test_near_duplicates_are_those_of_a_brute_force_rouge_l(limit):
    rng = random.Random(0)
    # Few words and many repetitions.
    prompts = {" ".join(rng.choices("abcde", k=rng.randint(1, 9))) for _ in range(120)}
    items = rng.sample(sorted(prompts), len(prompts))
    expected: list[str] = []
    for item in items:
        if all(_rouge_l(item.split(), other.split()) <= limit for other in expected):
            expected.append(item)
    accepted, rejected = pool_of(limit).sort(items)
    assert [a.prompt for a in accepted] == expected
    assert {r.reason for r in rejected} == {"near_duplicate"}


# A prompt, and what is nearly or quite the same: another mark, space, particle or spelling of a number.
COPIES = [
    ("我昨天给朋友转账，但是她说没有收到。", "我昨天给朋友转账但是她说还没有收到"),
    ("怎么修改我的银行卡密码？", "怎么 修改 我的 银行卡 密码"),
    ("カードの暗証番号を変更するにはどうすればいいですか？", "カードの暗証番号を、変更するにはどうしたらいいですか"),
    ("ฉันจะเปลี่ยนรหัสบัตรได้อย่างไร", "ฉัน\u200bจะ\u200bเปลี่ยน\u200bรหัส\u200bบัตร\u200bของฉัน\u200bได้อย่างไร"),
    ("ខ្ញុំចង់ប្តូរលេខសម្ងាត់កាតរបស់ខ្ញុំ", "ខ្ញុំចង់ប្តូរលេខសម្ងាត់កាតខ្ញុំ"),
    ("أين بطاقتي؟", "أين بطاقتي"),
    ("¿Dónde está mi tarjeta nueva?", "Dónde está mi tarjeta nueva"),
    ("मेरा कार्ड कहाँ है।", "मेरा कार्ड कहाँ है"),
    ("Where is my new card, please?", "Where is my new card"),
    ("I paid 1,000 euros for it.", "I paid 1000 euros for it"),
    ("Wake me at 09:00 on the 5.00th day", "Wake me at 9:00 on the 5th day"),
    ("What is 12 + 5 in all?", "What's 12 + 5 in all?"),
    ("Use Python 3 to call f(x) now", "use Python 3 to call f(x) now!"),
    ("def f(x):\n    return x + 1", "def f(y):\n    return y + 1"),
]


@pytest.mark.parametrize(("prompt", "copy"), COPIES)
def test_a_near_copy_is_found_in_every_script(prompt, copy):
    for one, other in ((prompt, copy), (copy, prompt)):
        _, rejected = pool_of(0.7, one).sort([other])
        assert [r.reason for r in rejected] in (["near_duplicate"], ["held_out"])


@pytest.mark.parametrize(
    "prompts",
    [
        ["12 + 5", "12 + 7", "12 - 5", "12 * 5", "12 / 5", "12 ^ 5", "125", "-12 + 5"],
        ["What is 3² in all?", "What is 3 in all?", "What is 32 in all?", "What is -3 in all?", "What is ½ in all?"],
        ["Is 3 < 4 or not so?", "Is 3 > 4 or not so?", "Is 3 ≤ 4 or not so?", "Is 3 = 4 or not so?"],
        ["Solve x + y = z for y", "Solve x - y = z for y", "Solve x * y = z for y", "Solve x / y = z for y"],
        ["What is 2 * (3 + 4)?", "What is (2 * 3) + 4?"],
        ["What is 5% of my 20 euros?", "What is 5 of my 20 euros?"],
        ["Where is order 123 of mine?", "Where is order 456 of mine?", "Where is order of mine?"],
        ["我有12个苹果，吃了5个，还剩几个？", "我有12个苹果，吃了7个，还剩几个？"],
        ["Tom habe 1,5 Liter im Topf", "Tom habe 15 Liter im Topf", "Tom habe 1.05 Liter im Topf"],
        ["f(x)[0]?", "f x 0", "f[x](0)", "f(x)(0)"],
        ["def f(x):\n    return x + 1", "def f(x):\n    return x + 2", "def f(x):\n    return x - 1"],
        ["if a:\n    b()\nc()", "if not (a or b):\n    c()"],
    ],
)
def test_numbers_and_signs_make_another_prompt(prompts):
    accepted, rejected = pool_of(0.7).sort(prompts)
    assert [a.prompt for a in accepted] == prompts and not rejected
    assert len({a.prompt_id for a in accepted}) == len(prompts)


@pytest.mark.parametrize(
    "prompts",
    [
        [
            "怎么修改我的银行卡密码？",
            "为什么我在国外取现要收手续费？",
            "我两周前申请的卡还没有收到。",
            "请告诉我怎么开新账户。",
        ],
        [
            "海外でカードを使えますか",
            "今朝のチャージが残高に反映されていません",
            "新しい口座を開設する方法を教えてください",
        ],
        ["ฉันส่งเงินให้เพื่อนเมื่อวานนี้แต่เธอยังไม่ได้รับ", "ยอดเติมเงินเมื่อเช้านี้ไม่แสดงในบัญชีของฉัน", "ช่วยบอกวิธีเปิดบัญชีใหม่หน่อย"],
        ["أين بطاقتي؟", "كيف أغير الرقم السري؟", "لماذا دفعت رسوما؟"],
    ],
)
def test_other_questions_of_a_script_are_new(prompts):
    assert len(pool_of(0.7).sort(prompts)[0]) == len(prompts)


def test_hyphens_and_lists_of_prose_are_no_signs():
    _, rejected = pool_of(0.7, "Book a half-hour call - a short one - with Tom").sort(
        ["Book a half hour call, a short one, with Tom", "Book a half-hour call/a short one with Tom"]
    )
    assert [r.reason for r in rejected] == ["near_duplicate"] * 2


def _rouge_l(a: list[str], b: list[str]) -> float:
    table = [[0] * (len(b) + 1)]
    for word in a:
        row = [0]
        for (diagonal, above), other in zip(pairwise(table[-1]), b, strict=True):
            row.append(diagonal + 1 if word == other else max(above, row[-1]))
        table.append(row)
    return 2 * table[-1][-1] / (len(a) + len(b))


def test_repeated_bigrams_lower_the_share() -> None:
    assert distinct_bigrams(["where is my card"]) == 1
    assert distinct_bigrams(["where is my card", "Where is my money?"]) == 4 / 6


def test_novelty_counts_what_no_known_prompt_has() -> None:
    assert novel_bigrams(["where is my money"], ["Where is my card?"]) == 1 / 3
    assert novel_bigrams(["where is my card"], ["where is my card"]) == 0


def test_characters_of_scripts_without_spaces_are_words() -> None:
    assert distinct_bigrams(["我的卡", "我的 车"]) == 3 / 4
    assert novel_bigrams(["用Python写"], ["用Python"]) == 1 / 2


def test_without_two_words_there_is_no_figure() -> None:
    assert distinct_bigrams(["card", ""]) is None
    assert novel_bigrams([], ["where is my card"]) is None


def test_mean_similarity_is_that_of_all_pairs() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert mean_similarity(vectors) == pytest.approx(np.mean([a @ b for a, b in combinations(vectors, 2)]), abs=1e-6)
    assert mean_similarity(vectors[[0, 0, 0]]) == pytest.approx(1)
    assert mean_similarity(np.eye(3, dtype=np.float32)) == 0


def test_one_prompt_is_like_nothing() -> None:
    assert mean_similarity(np.eye(1, 3, dtype=np.float32)) is None
    assert mean_similarity(np.zeros((0, 3), np.float32)) is None
