"""The token store: tokenised documents on disk, memory-mapped, with a manifest."""
