"""The overflow rows of one rank, which it lends to sources whose rows do not fit their slots."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Loan:
    """Overflow rows that a source may fill."""

    offset: int
    rows: int


@dataclass(slots=True)
class Room:
    """Overflow rows: free pieces, sorted by offset."""

    free: list[Loan] = field(default_factory=list)

    def lend(self, most: int) -> Loan | None:
        """The largest free piece, or part of it."""
        if not self.free:
            return None
        piece = max(self.free, key=lambda loan: loan.rows)
        loan = Loan(piece.offset, min(piece.rows, most))
        piece.offset += loan.rows
        piece.rows -= loan.rows
        if not piece.rows:
            self.free.remove(piece)
        return loan

    def give_back(self, loan: Loan) -> None:
        self.free.append(Loan(loan.offset, loan.rows))
        self.free.sort(key=lambda piece: piece.offset)
        merged: list[Loan] = []
        for piece in self.free:
            if merged and merged[-1].offset + merged[-1].rows == piece.offset:
                merged[-1].rows += piece.rows
            else:
                merged.append(piece)
        self.free = merged
