"""How far to trust a learned score and what was drawn with it."""
