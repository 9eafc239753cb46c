"""What a network costs: multiply-adds, parameters, bytes and seconds."""

from pyeff.measure.cost import LayerCost, LevelCost, layer_costs, measure_cost
from pyeff.measure.latency import measure_latency
from pyeff.measure.memory import peak_activation_bytes

__all__ = [
    "LayerCost",
    "LevelCost",
    "layer_costs",
    "measure_cost",
    "measure_latency",
    "peak_activation_bytes",
]
