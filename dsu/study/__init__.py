"""Studies: several runs from one store that differ in one thing, with one table and one picture.

`plan` says what the runs vary and read, prepares a study's folder and refuses what can't be done, `running` trains,
predicts and judges what is not done yet, `results` keeps what came of each run and takes means and spreads, `telling`
tells them.
"""

from dsu.study.plan import Asked, Kind, Member, Study, open_study
from dsu.study.results import Result
from dsu.study.running import run_study
from dsu.study.telling import StudyTable, default_figures, draw_study, study_tables, write_record, write_study

__all__ = [
    "Asked",
    "Kind",
    "Member",
    "Result",
    "Study",
    "StudyTable",
    "default_figures",
    "draw_study",
    "open_study",
    "run_study",
    "study_tables",
    "write_record",
    "write_study",
]
