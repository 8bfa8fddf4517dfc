"""The quality study: its second task, and what came of its runs."""
