"""Studies: several runs from one store that differ in one thing, with one table and one picture.

`plan` decides what the runs vary and read, prepares the study's folder and refuses invalid requests. `running` trains,
predicts and evaluates what is missing, `results` keeps each run's results and computes means and spreads, and `telling`
presents them.
"""
