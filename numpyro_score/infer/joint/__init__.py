"""Joint laws of the sites of a model, or columns of a table, and their conditionals."""
