#!/bin/sh
# One question to the endpoint, with nothing but curl.
set -eu
: "${OPENAI_BASE_URL:?Name the endpoint, such as http://127.0.0.1:8080/v1.}"
: "${OPENAI_API_KEY:?Give the key that the endpoint knows you by.}"

# The key goes in by standard input: others on this machine can read a command line.
printf 'header = "Authorization: Bearer %s"\n' "$OPENAI_API_KEY" |
    curl --config - --silent --show-error --fail-with-body "$OPENAI_BASE_URL/chat/completions" \
        --header 'Content-Type: application/json' \
        --data '{
            "model": "'"${OPENAI_MODEL:-smollm2-135m-instruct}"'",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 32,
            "temperature": 0
        }'
