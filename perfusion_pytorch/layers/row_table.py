"""A table of tensors with one row for each of many things that come and go."""

from collections.abc import Mapping

import torch
from torch import Tensor

CPU = torch.device("cpu")
GROWTH = 1.5
FIRST_CAPACITY = 4


class RowTable:
    """Named columns, each a tensor (capacity, ...), with a row for each thing that is in the table.

    A row keeps its number until it is removed. Adding and removing take the same time however many rows there
    are, but for the copy when the table is full, which happens ever more rarely. The table is kept in main
    memory, and copied once to each further device that reads it.

    Example:
        >>> table = RowTable()
        >>> table.add({"dual": torch.tensor([1.0, 2.0]), "beta": torch.tensor(0.7)})
        0
        >>> table.on(torch.device("cpu"))["dual"].shape
        torch.Size([4, 2])
    """

    def __init__(self) -> None:
        self.capacity = 0
        self.free: list[int] = []
        self.columns: dict[torch.device, dict[str, Tensor]] = {CPU: {}}

    def add(self, values: Mapping[str, Tensor]) -> int:
        """Add a row, and return its number.

        Args:
            values: the row's tensor for each column; the first row's decide the columns.
        """
        if not self.free:
            self._grow(values)
        self._take_dtypes(values)
        row = self.free.pop()
        self.write(row, values)
        return row

    def write(self, row: int, values: Mapping[str, Tensor]) -> None:
        """Write some columns of a row, in place."""
        for columns in self.columns.values():
            for name, value in values.items():
                columns[name][row] = value.to(columns[name].device)

    def write_column(self, name: str, column: Tensor) -> None:
        """Write all rows of a column, in place."""
        for columns in self.columns.values():
            columns[name].copy_(column)

    def remove(self, row: int) -> None:
        """Set a row to zero and free its number, in place."""
        for columns in self.columns.values():
            for column in columns.values():
                column[row] = 0
        self.free.append(row)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the columns on a device, for reading."""
        if device not in self.columns:
            self.columns[device] = {name: column.to(device) for name, column in self.columns[CPU].items()}
        return self.columns[device]

    def _grow(self, values: Mapping[str, Tensor]) -> None:
        before = self.columns[CPU]
        capacity = max(FIRST_CAPACITY, int(self.capacity * GROWTH))
        columns = {
            name: torch.zeros(capacity, *value.shape, dtype=before.get(name, value).dtype)
            for name, value in values.items()
        }
        for name, column in before.items():
            columns[name][: self.capacity] = column
        self.columns = {CPU: columns}
        self.free = list(range(capacity - 1, self.capacity - 1, -1))  # the lowest number is taken first
        self.capacity = capacity

    def _take_dtypes(self, values: Mapping[str, Tensor]) -> None:
        """Widen the columns that do not hold a value's dtype: float16 and bfloat16 go into float32."""
        columns = self.columns[CPU]
        wider = {
            name: columns[name].to(torch.promote_types(columns[name].dtype, value.dtype))
            for name, value in values.items()
            if torch.promote_types(columns[name].dtype, value.dtype) != columns[name].dtype
        }
        if wider:
            self.columns = {CPU: columns | wider}
