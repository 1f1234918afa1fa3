"""Whether a worked answer comes to the right number, as lm-evaluation-harness decides it for GSM8K.

Both ways of finding the number are those of its task ``gsm8k``, version 3: *strict* takes the number after the
first ``#### ``, the format of GSM8K's own answers (Cobbe et al. 2021, arXiv 2110.14168); *flexible* takes the last
number of the response. A model that was never shown the format can only score by the second.
"""

import re

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")


def strict_number(response: str) -> str | None:
    """The number after the first ``#### ``, normalized; None without one."""
    found = _STRICT.search(response)
    return _normalize(found[1]) if found else None


def flexible_number(response: str) -> str | None:
    """The last number of the response, normalized; None without one."""
    found = _FLEXIBLE.findall(response)
    return _normalize(found[-1][0] or found[-1][1]) if found else None


def expected_number(answer: str) -> str | None:
    """The number of a held-out answer: what follows its last ``#### ``, or all of it; None when that is no number."""
    number = _normalize(answer.strip())
    return number if _NUMBER.fullmatch(number) else None


def next_question(template: str) -> str:
    """Where a response is over because the model asks itself the next question: a line that opens as the template does.

    The harness stops at ``Question:`` for the same reason. Without it, the last number of a base model's response
    would be that of another question.
    """
    opening = template.split("{prompt}")[0].rstrip().rsplit("\n", 1)[-1]
    return f"\n{opening}" if opening else ""


def _normalize(text: str) -> str:
    """What the harness compares: no thousands separators or dollar signs, nothing up to ``#### ``, no final point."""
    text = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", text)
