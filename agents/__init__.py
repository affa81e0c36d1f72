"""What users of a world reach for: planners, action inference and counterfactuals, on the public API only."""

from agents.action_inference import ActionPosterior, infer_action, label_video
from agents.counterfactual import Counterfactual, counterfactual
from agents.drawing import draw_plan
from agents.mpc import MPCAgent
from agents.objectives import (
    Custom,
    LatentDistance,
    Moment,
    Objective,
    PredictedReward,
    SurprisePenalty,
    TerminationPenalty,
)
from agents.planners import Futures, Plan, Planner, imagine
from agents.presets import PRESETS, Search, preset

__all__ = [
    "PRESETS",
    "ActionPosterior",
    "Counterfactual",
    "Custom",
    "Futures",
    "LatentDistance",
    "MPCAgent",
    "Moment",
    "Objective",
    "Plan",
    "Planner",
    "PredictedReward",
    "Search",
    "SurprisePenalty",
    "TerminationPenalty",
    "counterfactual",
    "draw_plan",
    "imagine",
    "infer_action",
    "label_video",
    "preset",
]
