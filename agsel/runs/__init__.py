"""A run that cannot be lost: checkpoints, resume, preemption, the watchdog, and the Trainer that knows them."""
