"""What a user sees of a search: front, tables, plots, console."""
