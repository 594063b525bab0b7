"""The search: for a model, a task and goals, the recipes that no other beats, each with a checkpoint.

    frontier = leanformers.slim("minilm", "sentiment", goals=["latency<=0.5x"], out="runs/mine")
    frontier.best.folder        # from_pretrained loads it

Nothing heavy is imported until a search starts.
"""

from leanformers.frontier.goals import GRAMMAR, Goal, parse, parse_all
from leanformers.frontier.pareto import dominates, hypervolume, non_dominated
from leanformers.frontier.result import Frontier, Point
from leanformers.frontier.search import Effort, Search
from leanformers.frontier.slim import slim
from leanformers.frontier.space import Space

__all__ = [
    "GRAMMAR",
    "Effort",
    "Frontier",
    "Goal",
    "Point",
    "Search",
    "Space",
    "dominates",
    "hypervolume",
    "non_dominated",
    "parse",
    "parse_all",
    "slim",
]
