"""Safe bytes on disk: atomic writes, names of outputs, JSON, hashes, and reading without unpickling."""
