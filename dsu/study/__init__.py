"""Studies: several runs from one store that differ in one thing, with one table and one figure.

`plan` defines the runs, checks the request and the study's folder. `running` trains, predicts and evaluates whatever is
missing (`parallel`: several runs at once), `results` stores each run's results and computes means and spreads, and
`reporting` writes the tables and the figure.
"""
