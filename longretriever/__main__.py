"""`python -m longretriever` is `longretriever`."""

from longretriever.cli import main

main()
