"""Speed and memory of training methods side by side; README.md beside this file has the numbers.

What to measure: `configurations`, `compared_methods`, `plans`. Measuring, on the ranks: `measured_ranks` runs the
`bare_loop` over an engine of `starters`, or a `whole_run` of launch/train.py, watched by a `stopwatch`. What comes of
it: `rows`, `table`, `picture`; over numbers of GPUs `series`, `scaling_table`, `scaling_picture`. The commands are
`command`, `scaling`, and `predicted` for predictions beside what was measured. What choosing elements costs: `scoring`,
a command of its own, and `scored_ranks`.
"""
