"""Training loops to compare with, each written the way its community writes it."""
