"""Studies: several runs from one store that differ in one thing, with one table and one picture.

`plan` says what the runs vary and read, prepares a study's folder and refuses what can't be done, `running` trains,
predicts and judges what is not done yet, `results` keeps what came of each run and takes means and spreads, `telling`
tells them.
"""
