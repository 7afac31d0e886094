"""A student made from its teacher: cut out of it, searched for, or made of its experts."""

from daekit.students.experts import ExpertScores, measure_experts
from daekit.students.importance import Importance, at_random, choose, first_n, measure_importance, sort_teacher
from daekit.students.moe import dense_to_mixtral, fewer_experts, mixtral_to_dense
from daekit.students.norms import fit_norms
from daekit.students.selection import Selection
from daekit.students.shapes import Shape, count_parameters
from daekit.students.slicing import slice_model, view_model

__all__ = [
    "ExpertScores",
    "Importance",
    "Selection",
    "Shape",
    "at_random",
    "choose",
    "count_parameters",
    "dense_to_mixtral",
    "fewer_experts",
    "first_n",
    "fit_norms",
    "measure_experts",
    "measure_importance",
    "mixtral_to_dense",
    "slice_model",
    "sort_teacher",
    "view_model",
]
