#!/usr/bin/env python3
"""Makes a record of a report in plain words: structured.py 'The fan of server 7 is loud.'

The schema holds while the answer is written, token by token: a small model cannot leave it either.
"""

import sys
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, Field

REPORT = "Server 7 is hot and slow since this morning, please come soon."


class Ticket(BaseModel):
    component: Literal["cooling", "power", "network", "software"]
    server: int = Field(ge=1, le=99)
    urgent: bool
    summary: str = Field(max_length=60)


client = OpenAI()  # takes OPENAI_BASE_URL and OPENAI_API_KEY
completion = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[
        {"role": "system", "content": "Make a ticket of the user's report, as JSON."},
        {"role": "user", "content": " ".join(sys.argv[1:]) or REPORT},
    ],
    response_format={
        "type": "json_schema",
        "json_schema": {"name": "ticket", "schema": Ticket.model_json_schema()},
    },
    max_tokens=128,
    temperature=0,
)
ticket = Ticket.model_validate_json(completion.choices[0].message.content or "")
print(ticket.model_dump_json(indent=2))
