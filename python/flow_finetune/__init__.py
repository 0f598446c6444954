"""The lean loop: score, train, evaluate, report."""
