"""The Lightning callback: when it collects, when it edits, and what it leaves beside a checkpoint."""
