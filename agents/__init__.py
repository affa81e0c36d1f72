"""What users of a world reach for, on the public API only: planners, inference, counterfactuals, an anomaly monitor."""

from agents.action_inference import ActionPosterior, fit_temperature, infer_action, label_video
from agents.anomaly.calibration import MonitorConfig
from agents.anomaly.channels import Clip, episode_clip
from agents.anomaly.env import MonitoredEnv
from agents.anomaly.monitor import AnomalyMonitor, AnomalyRecord
from agents.counterfactual import Counterfactual, counterfactual
from agents.drawing import draw_plan
from agents.mpc import MPCAgent
from agents.objectives import (
    BehaviourPenalty,
    Custom,
    GoalLikelihood,
    LatentDistance,
    Moment,
    Objective,
    PredictedReward,
    SurprisePenalty,
    TerminalValue,
    TerminationPenalty,
)
from agents.planners import Futures, Plan, Planner, imagine
from agents.presets import PRESETS, Search, preset
from agents.proposals import propose_actions, propose_behaviour

__all__ = [
    "PRESETS",
    "ActionPosterior",
    "AnomalyMonitor",
    "AnomalyRecord",
    "BehaviourPenalty",
    "Clip",
    "Counterfactual",
    "Custom",
    "Futures",
    "GoalLikelihood",
    "LatentDistance",
    "MPCAgent",
    "Moment",
    "MonitorConfig",
    "MonitoredEnv",
    "Objective",
    "Plan",
    "Planner",
    "PredictedReward",
    "Search",
    "SurprisePenalty",
    "TerminalValue",
    "TerminationPenalty",
    "counterfactual",
    "draw_plan",
    "episode_clip",
    "imagine",
    "fit_temperature",
    "infer_action",
    "label_video",
    "preset",
    "propose_actions",
    "propose_behaviour",
]
