"""Makes a student from its teacher: a part of it, given or searched for, or a mixture of MoE experts."""

from daekit.students.experts import measure_experts
from daekit.students.figure import search_svg
from daekit.students.importance import Importance, at_random, choose, config_of_shape, first_n, measure_importance, sort_teacher
from daekit.students.moe import dense_to_mixtral, fewer_experts, mixtral_to_dense
from daekit.students.norms import fit_norms
from daekit.students.search import Round, read_log, run_search
from daekit.students.selection import Selection
from daekit.students.shapes import Shape, count_parameters
from daekit.students.slicing import slice_model, view_model
from daekit.students.space import Space, Window, space_of
from daekit.students.strategies import Evolution, Strategy, draw, evolve, grid

__all__ = [
    "Evolution",
    "Importance",
    "Round",
    "Selection",
    "Shape",
    "Space",
    "Strategy",
    "Window",
    "at_random",
    "choose",
    "config_of_shape",
    "count_parameters",
    "dense_to_mixtral",
    "draw",
    "evolve",
    "fewer_experts",
    "first_n",
    "fit_norms",
    "grid",
    "measure_experts",
    "measure_importance",
    "mixtral_to_dense",
    "read_log",
    "run_search",
    "search_svg",
    "slice_model",
    "sort_teacher",
    "space_of",
    "view_model",
]
