"""The words of training captions, which checkpoints keep to tell which words of a prompt the model never saw."""

import collections
import re
from typing import Any, Dict, Iterable, List, Tuple

MAX_WORDS = 20_000  # the most frequent ones
EXAMPLES = 12
EXAMPLE_CHARACTERS = 120


def split_words(text: str) -> List[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def summarize_captions(captions: Iterable[str], examples: Iterable[str]) -> Dict[str, Any]:
    """Return a checkpoint's `captions` entry: {"words": {word: count}, "examples": [caption]}."""
    counts = collections.Counter(word for caption in captions for word in split_words(caption))
    short = (caption for caption in examples if caption and len(caption) <= EXAMPLE_CHARACTERS)
    return {"words": dict(counts.most_common(MAX_WORDS)), "examples": list(dict.fromkeys(short))[:EXAMPLES]}


def read_summary(entry: Any) -> Tuple[Dict[str, int], List[str]]:
    """Return the words and examples of a checkpoint's `captions` entry, without what has no business in one."""
    entry = entry if isinstance(entry, dict) else {}
    words, examples = entry.get("words"), entry.get("examples")
    words = list(words.items())[:MAX_WORDS] if isinstance(words, dict) else []
    examples = examples[:EXAMPLES] if isinstance(examples, list) else []
    return (
        {word: count for word, count in words if isinstance(word, str) and isinstance(count, int)},
        [one[:EXAMPLE_CHARACTERS] for one in examples if isinstance(one, str)],
    )
