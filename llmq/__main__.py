"""`python -m llmq` is the command `llmq`."""

from llmq.cli import main

main()
