"""What a run measured and what it left behind: records, progress, and the report of a run."""
