"""Check user input: files, numbers and splits, each in one place."""
