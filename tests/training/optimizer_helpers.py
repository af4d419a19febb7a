"""Moving the optimizer state of one parameter, for tests of it alone."""

from l1ra.layers.row_moves import RowMoves, row_sources
from l1ra.training.optimizer_state import plan_state


def move_state(optimizer, param, plan, old_shape):
    moves = RowMoves()
    plan_state(moves, optimizer, {param: (row_sources(plan), old_shape)})
    moves.run()
