"""Which rank reduces which region: one that has much of it already, for what stays at home is neither sent nor received.

With cuts at quantiles every rank selects k entries and every region gets k, so the mean share of a rank in a region is k / P. A
rank that owns a region of which it holds k / P or more sends and receives at most k (P - 1) / P entries in split-and-reduce.
Where there are such owners for all ranks at once, they are found. Otherwise the sum of what stays, each counted up to k / P, is
as large as can be, and a rank may send or receive up to k.
"""

import numpy as np
from numpy.typing import NDArray

MOST_RANKS = 128  # the assignment costs about the cube; beyond, regions keep their ranks

Counts = NDArray[np.int64]


def assign_owners(counts_PR: Counts) -> list[int]:
    """Return the owner of each region.

    Args:
        counts_PR: entries of rank p in region r, ``(ranks, regions)``, as many of each.
    """
    ranks = len(counts_PR)
    if ranks == 1 or ranks > MOST_RANKS:
        return list(range(ranks))
    share = int(counts_PR.sum()) // ranks**2
    # What reaches the share counts more than any sum above it can.
    worth = np.minimum(counts_PR, share) * (int(counts_PR.max()) * ranks + 1) + counts_PR
    return least_cost_assignment(int(worth.max()) - worth)


def least_cost_assignment(cost_PR: Counts) -> list[int]:
    """Return for each column the row that it is given, each row once, with the least sum of costs.

    The Hungarian method with potentials, in whole numbers: a row after the other joins along the cheapest alternating path
    (Kuhn, 1955; the shortest-path form is due to Jonker and Volgenant, 1987). Equal inputs give equal results on all ranks.

    Args:
        cost_PR: whole numbers from 0 on, square.
    """
    count = len(cost_PR)
    far = np.iinfo(np.int64).max
    of_row, of_column = np.zeros(count, np.int64), np.zeros(count + 1, np.int64)  # potentials; the last column is a stand-in
    owner = np.full(count + 1, -1)
    for row in range(count):
        column = count
        owner[column] = row
        nearest = np.full(count, far)
        came_from = np.full(count, count)
        done = np.zeros(count + 1, np.bool_)
        while owner[column] >= 0:
            done[column] = True
            reduced = cost_PR[owner[column]] - of_row[owner[column]] - of_column[:count]
            closer = (reduced < nearest) & ~done[:count]
            nearest[closer], came_from[closer] = reduced[closer], column
            open_columns = np.flatnonzero(~done[:count])
            following = open_columns[np.argmin(nearest[open_columns])]
            step = nearest[following]
            of_row[owner[done]] += step
            of_column[done] -= step
            nearest[open_columns] -= step
            column = int(following)
        while column != count:  # turn the path over
            owner[column] = owner[came_from[column]]
            column = int(came_from[column])
    return owner[:count].tolist()
