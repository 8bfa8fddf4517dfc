"""Memory, traffic and time of a run before it starts, from a rehearsal of its steps on the meta device."""
