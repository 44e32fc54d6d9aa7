"""Weight sets: what they hold, where the files come from, and proof that they are the right ones."""
