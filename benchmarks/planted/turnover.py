"""Which ranks come and go: every row of every adapter, from when it was dealt to when it was cut."""

from __future__ import annotations

from typing import Any

from l1ra import RankController
from l1ra.allocation.plan import LayerPlan

__all__ = ["Turnover"]


class Turnover:
    """Hears each adapter's changes of rank; the controller's history knows numbers of ranks, not which row went.

    Attributes:
        wasted: rows that were dealt and cut again so far.
    """

    def __init__(self, controller: RankController) -> None:
        self._controller = controller
        # Of each row: whether it was dealt (True) or is there from the start.
        self._dealt = {name: [False] * layer.rank for name, layer in controller.adapters.items()}
        self._events: dict[int, list[int]] = {}
        self.wasted = 0
        for name in controller.adapters:
            self._listen(name)

    def _listen(self, name: str) -> None:
        layer = self._controller.adapters[name]
        planned = layer.plan_resize

        def plan_resize(moves: Any, plan: LayerPlan, *args: Any, **kwargs: Any) -> None:
            planned(moves, plan, *args, **kwargs)
            rows = self._dealt[name]
            gone = set(range(len(rows))) - set(plan.keep)
            self.wasted += sum(rows[k] for k in gone)
            self._dealt[name] = [rows[k] for k in plan.keep] + [True] * plan.grow
            event = self._events.setdefault(self._controller.steps, [0, 0])
            event[0] += len(gone)
            event[1] += plan.grow

        layer.plan_resize = plan_resize

    def reallocations(self) -> list[dict[str, int]]:
        """``step``, ranks ``cut`` and ranks ``dealt`` of each reallocation; one that changed nothing has zeros.

        Raises:
            RuntimeError: an adapter has changed its rank unheard.
        """
        if any(len(rows) != self._controller.adapters[name].rank for name, rows in self._dealt.items()):
            raise RuntimeError("an adapter changed its rank without plan_resize: Turnover has to listen elsewhere.")
        steps = sorted({entry["step"] for entry in self._controller.history[1:]} | set(self._events))
        events = [(step, *self._events.get(step, (0, 0))) for step in steps]
        return [{"step": step, "cut": cut, "dealt": dealt} for step, cut, dealt in events]
