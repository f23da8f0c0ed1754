#!/usr/bin/env python3
"""Answers from this repository's documentation: retrieval.py 'Which power cable does a board need?'

WordLlama, an embedding model that runs here, finds the nearest passage (docs/examples.md).
"""

import sys
from pathlib import Path

import wordllama
from openai import OpenAI

DOCS = Path(__file__).resolve().parent.parent / "docs"

passages = [
    (f"docs/{page.name}", paragraph.strip())
    for page in sorted(DOCS.glob("*.md"))
    for paragraph in page.read_text().split("\n\n")
    if 100 < len(paragraph) < 1500  # neither headings nor whole tables
]
# Its tokenizer too is in its package, where it looks if told that this is its cache.
embedder = wordllama.WordLlama.load(
    cache_dir=Path(wordllama.__file__).parent, disable_download=True
)
question = " ".join(sys.argv[1:]) or "Which power cable does a board need?"
near = embedder.embed([question], norm=True) @ embedder.embed([p for _, p in passages], norm=True).T
page, passage = passages[near.argmax()]
print(f"{page}:\n{passage}\n")

client = OpenAI()  # takes OPENAI_BASE_URL and OPENAI_API_KEY
completion = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[
        {"role": "system", "content": f"Answer from this text, in one sentence:\n{passage}"},
        {"role": "user", "content": question},
    ],
    max_tokens=48,
    temperature=0,
)
print(completion.choices[0].message.content)
