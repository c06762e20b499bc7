"""State that agents share."""
