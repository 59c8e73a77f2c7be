"""Studies behind docs/experiments.md: each resumable, one JSON line a result."""
