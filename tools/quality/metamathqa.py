"""The rows and the text of PEFT's MetaMathQA comparison, in the files that `metamathqa.yaml` names.

    python tools/quality/metamathqa.py data/metamathqa

writes `train.jsonl`, the rows of MetaMathQA that 5,000 steps of 4 take there, and `text.txt`, the beginnings of the
articles by which it measures what was forgotten. Both are read from the hub, as far as they are needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset

from agsel.data.sources import read_files

ROWS = 20_000
"""5,000 steps of 4."""
LONGEST = 1_300
"""Characters of query and response together, the space between them included; longer rows are left out."""
ARTICLES = 100
BEGINNING = 3_000
"""Characters of an article, about the 768 tokens of PEFT's."""


def rows_to_train(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """The first `ROWS` of at most `LONGEST` characters."""
    short = (row for row in rows if len(f"{row['query']} {row['response']}") <= LONGEST)
    for row in itertools.islice(short, ROWS):
        yield {"query": row["query"], "response": row["response"]}


def text_of(articles: Iterable[dict[str, Any]]) -> str:
    """The beginnings of the first `ARTICLES`."""
    return "\n\n".join(article["text"][:BEGINNING].strip() for article in itertools.islice(articles, ARTICLES))


def read(name: str) -> Iterable[dict[str, Any]]:
    """The rows of a file or of a hub dataset, one after another."""
    return read_files([Path(name)]) if Path(name).is_file() else load_dataset(name, split="train", streaming=True)


def write(options: argparse.Namespace) -> None:
    """Both files."""
    options.output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows_to_train(read(options.rows))]
    (options.output / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    text = text_of(read(options.articles))
    (options.output / "text.txt").write_text(text, encoding="utf-8")
    print(f"{len(lines):,} rows to train and {len(text):,} characters of text in {options.output}")


def main() -> None:
    """Write the files, or say in one line why not."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", default="meta-math/MetaMathQA", help="hub dataset, or file with query and response")
    parser.add_argument("--articles", default="HuggingFaceFW/finewiki", help="hub dataset, or file with text")
    options = parser.parse_args()
    try:
        write(options)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read or write: {error}; name files of your own (--rows, --articles), or another folder")
    except KeyError as error:
        sys.exit(f"there is no column {error}: --rows needs query and response, --articles text")


if __name__ == "__main__":
    main()
