"""`punchline bench`: every way to score a group in one process and one run, checked against the plain way, beside the machine's limit."""
