"""What a model has learnt: rows to judge, divided among the ranks; likelihood and answers of each; one summary.

tasks -> questions -> units of work -> measures -> kept results -> summary
"""
