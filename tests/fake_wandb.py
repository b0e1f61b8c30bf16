"""A run of W&B as far as its rows go, without W&B; the tests of `log_to` hold a real run to the same."""


class FakeWandb:
    """What W&B does with a log: a row is open until a later step or a commit; a step that has passed is refused."""

    __module__ = "wandb.sdk.wandb_run"

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.axes: dict[str, str] = {}
        self._row: dict[str, float] = {}
        self._step = 0
        self._finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float], step: int | None = None, commit: bool | None = None) -> None:
        if self._finished:
            raise RuntimeError("the run is finished")
        if step is not None and step < self._step:
            return
        if step is not None and step > self._step:
            self._close(step)
        self._row |= values
        if commit or (step is None and commit is None):
            self._close(self._step + 1)

    def finish(self) -> None:
        self._close(self._step)
        self._finished = True

    def _close(self, step: int) -> None:
        if self._row:
            self.rows.append(self._row)
        self._row, self._step = {}, step
