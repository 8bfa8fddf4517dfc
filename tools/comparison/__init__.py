"""What methods learn and what they cost, side by side, by a plan; `comparing` is the command.

What to compare: `plan`, read from a file by `plan_file` or from `METHOD:RATE` by `method_rates`, and checked by
`refusals`. Doing it: `runs` trains and measures one run in `children`, on one of the `places`, when `schedule` has
room and time for it; `records` keeps what came of it, and its `origin`. What that says: `chosen_rates`,
`differences` with their intervals, `comparison_table`, `pareto`.
"""
