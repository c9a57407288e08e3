"""WHAT survives a power cut: atomic files, versioned documents, bounded spool, lock."""
