"""Rows in: datasets as people have them, made into prompts and completions or conversations, and into tokens."""
