"""Studies: several runs from one store that differ in one thing, with one table and one picture.

`members` says what the runs of a study vary, `costs` what they read, `plan` prepares a study's folder and refuses what
can't be done, `running` trains, predicts and judges what is not done yet, `results` keeps what came of each run,
`summary` takes means and spreads, `tables`, `picture` and `writing` tell them.
"""

from dsu.study.members import Asked, Kind
from dsu.study.picture import draw_study
from dsu.study.plan import Member, Study, open_study
from dsu.study.results import Result
from dsu.study.running import run_study
from dsu.study.tables import default_figures, study_tables
from dsu.study.writing import write_record, write_study

__all__ = [
    "Asked",
    "Kind",
    "Member",
    "Result",
    "Study",
    "default_figures",
    "draw_study",
    "open_study",
    "run_study",
    "study_tables",
    "write_record",
    "write_study",
]
